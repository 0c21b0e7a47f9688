"""KVM_RUN without Python: device exits that native code answers or writes into kvm_run, WFI, the doorbell's hand-over.

`run_on` runs a hart until something is for Python or for the client; `serve_runs` waits for RUNs at the doorbell and does
them. Both leave to Python (vm/vcpu.py), with the vCPU's `owner` held in the middle of a RUN, for all that is rare. The page
is hostile: of it only the request, the immediate_exit and kick flags and an answer's data are read. Waiting spins at first
where it has been short lately, at most SPIN_TICKS: there may be only two cores.
"""

from __future__ import annotations

from kvmcore.engine import machine_state, native_bus
from kvmcore.engine.exits import ExitKind, Wanted
from kvmcore.engine.native_bus import FUTEX, FUTEX_WAIT_PRIVATE, aligned_device
from kvmcore.engine.native_hart import (
    EXITED,
    OK,
    FunctionHart,
    atomic,
    call,
    compare_exchange,
    load,
    pause,
    returns,
    store,
    syscall,
)
from kvmcore.engine.softmmu import p1, p2, p3
from kvmcore.ir.value import Value, const, select, u64
from protocol.abi import run_page
from protocol.abi.exits import Exit

NS_PER_TICK = 100
"""Of the guest's time, machine.FREQUENCY."""
SPIN_TICKS = 500
"""50 us: longer waits sleep."""
BEST_SCORE, FAILED_SPIN, CROWDED_SPIN = 64, 32, 1000
"""From a score of 0 on waits spin first. A spin that was not in vain gains 1, as does a sleep that was short, up to
BEST_SCORE; one in vain costs FAILED_SPIN, and CROWDED_SPIN if somebody else had the core: who spins then loses its turn to
him, for milliseconds.
"""
CROWDED_TICKS = 370
"""So long without us running, or longer: the host's own interruptions are shorter."""
_LOOP = 1000
"""Instructions between two pauses of one loop, at most."""
_MANY_PAUSES, _FEW_PAUSES, _NAP_TICKS = 2048, 64, 300
"""From so many pauses on a hart sleeps, then after each so many more, for so long: 30 us."""
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 0x7FFFFFFF
_LONGEST_SLEEP = 3600 * 10_000_000
_LOOK_TICKS = 10_000_000
"""Words of the page may be written by the client: nobody sleeps on them for longer than a second without looking."""
_STIP = 1 << 5
_NO_TIMER = (1 << 64) - 1


def _count(h: FunctionHart, name: str, by: Value | int = 1) -> None:
    h.set(name, h.get(name) + by)


# -- sleeping ------------------------------------------------------------------------------------------------


def set_timeout(h: FunctionHart) -> None:
    """(ticks) -> address of that time as a struct timespec."""
    ticks = p1()
    h.set_at("timeout", 0, ticks.udiv(u64(10_000_000)))
    h.set_at("timeout", 1, ticks.urem(u64(10_000_000)) * NS_PER_TICK)
    returns(h.address("timeout"))


def sleep_hart(h: FunctionHart) -> None:
    """(seen, ticks): wait until `wake` is not `seen`, at most that long; may return early."""
    where, _ = call("set_timeout", h.s, p2())
    store(h.address("sleeping"), const(32, 1), "atomic")
    syscall(FUTEX, h.address("wake"), FUTEX_WAIT_PRIVATE, p1(), where)
    store(h.address("sleeping"), const(32, 0), "atomic")
    returns(u64(0))


def halt(h: FunctionHart) -> None:
    """(seen): WFI found nothing pending: wait for an interrupt, another thread, or the timer. May return for nothing."""
    _count(h, "wfi_exit_stat")
    if load(h.address("attention"), 32, "volatile") != 0:
        returns(u64(0))
    started = h.time()
    left = u64(_LONGEST_SLEEP)
    if (h.get("stimecmp") != _NO_TIMER) & ((h.get("sie") & _STIP) != 0):
        until = h.get("stimecmp")
        if until <= started:
            returns(u64(0))
        left = select(until - started < _LONGEST_SLEEP, until - started, left)
    if ~h.get("halt_spin").slt(0) & (left > SPIN_TICKS):
        _count(h, "halt_attempted_poll")
        price, woken = call("spin_for_wake", h.s, p1(), started + SPIN_TICKS, started)
        if woken == OK:
            _gain(h, "halt_spin")
            spun = h.time() - started
            _count(h, "halt_successful_poll")
            _count(h, "halt_poll_success_ns", spun * NS_PER_TICK)
            returns(u64(0))
        _count(h, "halt_poll_fail_ns", SPIN_TICKS * NS_PER_TICK)
        h.set("halt_spin", h.get("halt_spin") - price)
    h.set("blocking", 1)
    call("sleep_hart", h.s, p1(), left)
    h.set("blocking", 0)
    slept = h.time() - started
    _count(h, "halt_wakeup")
    nanoseconds = slept * NS_PER_TICK
    _count(h, "halt_wait_ns", nanoseconds)
    bits = u64(64) - nanoseconds.clz()
    bucket = select(bits < 31, bits, u64(31))
    h.set_at("halt_wait_hist", bucket, h.get_at("halt_wait_hist", bucket) + 1)
    _judge(h, "halt_spin", slept)
    returns(u64(0))


def _judge(h: FunctionHart, score: str, slept: Value) -> None:
    """A wait that slept was so long."""
    before = h.get(score)
    h.set(score, before + ((slept <= SPIN_TICKS) & before.slt(0)).zext(64))


def _gain(h: FunctionHart, score: str) -> None:
    """A spin was not in vain."""
    before = h.get(score)
    h.set(score, before + before.slt(BEST_SCORE).zext(64))


def spin_for_wake(h: FunctionHart) -> None:
    """(seen, until, time of the last look): OK when `wake` has changed, else what that costs."""
    if load(h.address("wake"), 32, "volatile").zext(64) != p1():
        returns(u64(0))
    now = h.time()
    if now - p3() >= CROWDED_TICKS:
        returns(u64(CROWDED_SPIN), EXITED)
    if now >= p2():
        returns(u64(FAILED_SPIN), EXITED)
    pause()
    returns(*call("spin_for_wake", h.s, p1(), p2(), now))


def relax(h: FunctionHart) -> None:
    """(icount) of a `pause`: a hart that waits in a loop for long leaves its core to whom it waits for, a while at a time.

    What KVM does on pause-loop exits. Whoever wakes the hart, or has an interrupt for it, ends that.
    """
    now, before = p1(), h.get("pauses")
    pauses = select(now - h.get("paused_at") < _LOOP, before + 1, u64(0))
    h.set("paused_at", now)
    h.set("pauses", pauses)
    if pauses < _MANY_PAUSES:
        returns(u64(0))
    h.set("pauses", u64(_MANY_PAUSES - _FEW_PAUSES))
    seen = load(h.address("wake"), 32, "atomic").zext(64)
    if load(h.address("attention"), 32, "volatile") == 0:
        call("sleep_hart", h.s, seen, u64(_NAP_TICKS))
    returns(u64(0))


# -- running -------------------------------------------------------------------------------------------------


def run_on(h: FunctionHart) -> None:
    """-> ExitKind, when something is for Python; USER when it is for the client and in kvm_run."""
    seen = load(h.address("wake"), 32, "atomic").zext(64)
    kind, _ = call("run_once", h.s)
    if kind == int(ExitKind.WFI):
        call("halt", h.s, seen)
        returns(*call("run_on", h.s))
    if (kind == int(ExitKind.MMIO_READ)) | (kind == int(ExitKind.MMIO_WRITE)):
        access, known = call("known_access", h.s)
        if known == OK:
            kind, done = call("device_access", h.s, access)
            if done == OK:
                returns(*call("run_on", h.s))
            returns(kind)
    returns(kind)


def known_access(h: FunctionHart) -> None:
    """-> completion.packed of exit_insn; EXITED when Python has not told yet."""
    raw = h.get("exit_insn")
    slot = (raw * machine_state.ACCESS_HASH >> 24) & (machine_state.ACCESSES - 1)
    access = load(h.machine("accesses") + slot.zext(64) * 8)
    returns(access, select((access >> 32) == raw.zext(64), u64(OK), u64(EXITED)))


def device_access(h: FunctionHart) -> None:
    """(access) -> ExitKind; OK when the access is done, EXITED when it is the client's or Python's."""
    access, kind = p1(), h.get("exit_kind").zext(64)
    busy = h.address("in_bus")
    store(busy, const(32, 1), "atomic")  # before any table is looked at: Machine keeps old ones meanwhile
    if ~aligned_device(h):
        store(busy, const(32, 0), "atomic")
        returns(kind, EXITED)
    write = (access >> 13) & 1
    if write != 0:
        bus = load(h.machine("bus"), 64, "atomic")
        taken = u64(EXITED)
        if bus != 0:
            entries = bus + machine_state.BUS_HEAD
            _, taken = call("bus_store", h.s, entries, entries + load(bus) * machine_state.BUS_ENTRY)
        if taken == OK:
            store(busy, const(32, 0), "atomic")
            _count(h, "exits")
            _count(h, "mmio_exit_kernel")
            call("complete", h.s, access, u64(0))
            returns(kind)
    store(busy, const(32, 0), "atomic")
    page = h.get("run_page")
    if page == 0:
        returns(kind, EXITED)
    _count(h, "exits")
    _count(h, "mmio_exit_user")
    if write != 0:
        store(page + run_page.MMIO_DATA, h.get("exit_data"))
    store(page + run_page.MMIO_PHYS_ADDR, h.get("exit_gpa"))
    store(page + run_page.MMIO_LEN, h.get("exit_len"))
    store(page + run_page.MMIO_IS_WRITE, write.trunc(8))
    store(page + run_page.EXIT_REASON, const(32, int(Exit.MMIO)))
    h.set("pending_access", access)
    returns(u64(int(ExitKind.USER)), EXITED)


def complete(h: FunctionHart) -> None:
    """(access, data): finish the load or store that left; as Hart.complete_mmio."""
    access, data = p1(), p2()
    if (access >> 13) & 1 == 0:
        shift = 64 - 8 * ((access >> 8) & 15)
        high = data << (shift & 63)
        value = select(((access >> 12) & 1) != 0, high.sar(shift & 63), high >> (shift & 63))
        h.set_at("x", access & 0xFF, value)
    h.set("pc", h.get("pc") + ((access >> 16) & 7))
    h.set("icount", h.get("icount") + 1)
    returns(u64(0))


# -- the doorbell --------------------------------------------------------------------------------------------


def serve_runs(h: FunctionHart) -> None:
    """-> Wanted, or the ExitKind in the middle of a RUN."""
    page = h.get("run_page")
    sample = load(page + run_page.DOORBELL_BELL, 32, "atomic")
    if atomic("xchg", h.address("summons"), const(32, 0)) != 0:
        returns(u64(int(Wanted.SUMMONED)))
    wanted = load(page + run_page.DOORBELL_REQUEST, 32, "volatile")
    if wanted != h.get("served"):
        h.set("served", wanted)
        kind, _ = call("take_run", h.s)
        if kind != int(ExitKind.USER):
            returns(kind)
        call("answer_run", h.s)
        returns(*call("serve_runs", h.s))
    call("await_ring", h.s, sample.zext(64))
    returns(*call("serve_runs", h.s))


def take_run(h: FunctionHart) -> None:
    """-> BUSY, RUN, or how the RUN left the guest."""
    if ~compare_exchange(h.address("owner"), const(32, 0), const(32, 1)):
        returns(u64(int(Wanted.BUSY)))
    page = h.get("run_page")
    asked = load(page + run_page.IMMEDIATE_EXIT, 8, "volatile").zext(32) | load(page + run_page.DOORBELL_KICK, 32, "volatile")
    if (h.get("ready") == 0) | (asked != 0):
        returns(u64(int(Wanted.RUN)))
    access = h.get("pending_access")
    if access != 0:
        h.set("pending_access", 0)
        call("complete", h.s, access, load(page + run_page.MMIO_DATA, 64, "volatile"))
    store(page + run_page.EXIT_REASON, const(32, int(Exit.UNKNOWN)))
    returns(*call("run_on", h.s))


def answer_run(h: FunctionHart) -> None:
    """RUN number `served` returns 0."""
    page = h.get("run_page")
    store(h.address("owner"), const(32, 0), "atomic")
    store(page + run_page.DOORBELL_RET, const(32, 0), "volatile")
    store(page + run_page.DOORBELL_ERRNO, const(32, 0), "volatile")
    store(page + run_page.DOORBELL_REPLY, h.get("served"), "atomic")
    if load(page + run_page.DOORBELL_REPLY_SLEEPS, 32, "atomic") != 0:
        syscall(FUTEX, page + run_page.DOORBELL_REPLY, _FUTEX_WAKE, _EVERYBODY)
    returns(u64(0))


def await_ring(h: FunctionHart) -> None:
    """(sample): wait until the bell is not `sample`, at most a second."""
    bell, sample = h.get("run_page") + run_page.DOORBELL_BELL, p1()
    started = h.time()
    if ~h.get("spin").slt(0):
        price, rung = call("spin_for_ring", h.s, sample, started + SPIN_TICKS, started)
        if rung == OK:
            _gain(h, "spin")
            returns(u64(0))
        h.set("spin", h.get("spin") - price)
    sleeps = h.get("run_page") + run_page.DOORBELL_BELL_SLEEPS
    where, _ = call("set_timeout", h.s, u64(_LOOK_TICKS))
    store(sleeps, const(32, 1), "atomic")
    syscall(FUTEX, bell, _FUTEX_WAIT, sample, where)
    store(sleeps, const(32, 0), "atomic")
    _judge(h, "spin", h.time() - started)
    returns(u64(0))


def spin_for_ring(h: FunctionHart) -> None:
    """(sample, until, time of the last look): OK when the bell has been rung, else what that costs."""
    if load(h.get("run_page") + run_page.DOORBELL_BELL, 32, "volatile").zext(64) != p1():
        returns(u64(0))
    now = h.time()
    if now - p3() >= CROWDED_TICKS:
        returns(u64(CROWDED_SPIN), EXITED)
    if now >= p2():
        returns(u64(FAILED_SPIN), EXITED)
    pause()
    returns(*call("spin_for_ring", h.s, p1(), p2(), now))


FUNCTIONS = {
    "bus_store": (3, native_bus.bus_store),
    "coalesce": (3, native_bus.coalesce),
    "wake_hart": (1, native_bus.wake_hart),
    "deliver": (2, native_bus.deliver),
    "serve_irqfds": (1, native_bus.serve_irqfds),
    "set_timeout": (2, set_timeout),
    "sleep_hart": (3, sleep_hart),
    "relax": (2, relax),
    "halt": (2, halt),
    "spin_for_wake": (4, spin_for_wake),
    "run_on": (1, run_on),
    "known_access": (1, known_access),
    "device_access": (2, device_access),
    "complete": (3, complete),
    "serve_runs": (1, serve_runs),
    "take_run": (1, take_run),
    "answer_run": (1, answer_run),
    "await_ring": (2, await_ring),
    "spin_for_ring": (4, spin_for_ring),
}
"""For routines.FUNCTIONS."""
EXPORTS = {"run_on": 1, "serve_runs": 1, "serve_irqfds": 1, "sleep_hart": 3, "wake_hart": 1, "deliver": 2}
"""What Python calls, with the number of its parameters; the result is the first word."""
