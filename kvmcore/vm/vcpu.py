"""The vCPU: its thread, its shared page, and the loop of KVM_RUN (KVM_ABI 1.5, 1.12).

All ioctls of a vCPU are serialised by `mutex`, in order, behind a running KVM_RUN; only kicks, interrupts and
power changes come from other threads. What an exit means is kvmcore/vm/exits.py's business, what an ecall means is
kvmcore/sbi's: this file decides only whether the thread runs the guest, sleeps, or returns to the client. The page
is hostile: nothing read from it decides more than "run again" or "leave with EINTR".
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from errno import EINTR, EIO, ENOMEM
from typing import TYPE_CHECKING

from kvmcore.engine import blocks
from kvmcore.engine.exits import ExitKind, Wanted
from kvmcore.engine.hart_state import SLICE
from kvmcore.engine.machine import Hart
from kvmcore.vm import exits
from kvmcore.vm.accelerator import make_hart
from kvmcore.vm.dirty import DirtyRing
from kvmcore.vm.hypercalls import Hypercalls
from kvmcore.vm.objects import VmChild
from kvmcore.vm.one_reg import Registers
from kvmcore.vm.statistics import VcpuStats
from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.channel.doorbell import Doorbell
from protocol.channel.latency import VCPU_SLICE_NS, woken_soon
from protocol.channel.shared_memory import Mapping, create_memfd

if TYPE_CHECKING:
    from kvmcore.vm.vm import Vm

log = logging.getLogger("kvmcore.vcpu")

_PAUSE_SECONDS = 20e-6
_BRIEF_ENTRIES = 64
RUNNABLE = 0
STOPPED = 5
Job = Callable[[], None]


class Mutex:
    """Who may work on a vCPU: a word of the hart's block, so that native code takes it for a RUN."""

    def __init__(self, hart: Hart) -> None:
        self._hart = hart

    def acquire(self, blocking: bool = True) -> bool:
        """False: not `blocking`, and somebody has it. Only the vCPU's thread waits, for ioctls that are done elsewhere."""
        while not self._hart.acquire():
            if not blocking:
                return False
            time.sleep(_PAUSE_SECONDS)
        return True

    def release(self) -> None:
        self._hart.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class Vcpu(VmChild):
    """One vCPU. `hart` is its architectural state in the engine; `pending` belongs to exits.py."""

    kind = "vcpu"

    def __init__(self, vm: Vm, vcpu_id: int, index: int) -> None:
        super().__init__(vm)
        self.id = vcpu_id
        self.index = index
        self.hart = make_hart(vm.accel, vm.machine, index, vcpu_id)
        self.mp_state = RUNNABLE if index == 0 else STOPPED
        self.ran_once = False
        self.pending: exits.Pending | None = None
        """The exit that the next RUN completes. Private: the shared page says nothing about it."""
        self.registers = Registers(self)
        self.stats = VcpuStats(self.hart)
        self.mutex = Mutex(self.hart)
        self.hypercalls = Hypercalls(self)
        ring_bytes = vm.memory.dirty.ring_bytes
        self.dirty_ring = DirtyRing(ring_bytes, f"kvm-dirty-ring:{vcpu_id}") if ring_bytes else None
        self.signal_mask: bytes | None = None
        self.sleep_now = False
        """Set by exits.py when an SBI call suspends the hart until an interrupt, as WFI would."""
        self.brief = False
        """Whether the RUN under way ends soon (FLAG_BRIEF)."""
        self._page: _Private | _Shared | None = None
        self._reset: tuple[int, int] | None = None
        self.hart.answer_exits(0)
        self._jobs: deque[Job] = deque()
        self._thread: threading.Thread | None = None

    # -- kvm_run: shared with the client when it is to be mapped, or a thread looks at its doorbell ------------------

    @property
    def run_page(self) -> _Private | _Shared:
        """kvm_run's page and what leads to it."""
        if self._page is None:
            self._page = _Private()
            self.hart.answer_exits(self._page.address)
        return self._page

    def _share(self) -> _Shared:
        """On the I/O thread, while no other thread is at this vCPU. KvmError(ENOMEM)."""
        if not isinstance(self._page, _Shared):
            made = _Shared(self)
            if self._page is not None:
                made.view[: run_page.PAGE] = self._page.view
                self._page.close()
            self._page = made
            self.hart.answer_exits(made.address)
        return self._page

    @property
    def page(self) -> memoryview:
        """Page 0 of what the client maps, kvm_run and the doorbell words; page 1 is the VM's coalesced ring."""
        return self.run_page.view

    @property
    def doorbell(self) -> Doorbell:
        """By which a client that maps the page hands over KVM_RUN, and anybody kicks."""
        return self.run_page.doorbell

    def shared_fds(self) -> list[int]:
        """Memfds of kvm_run's page, of the coalesced ring's page (map them one behind the other), of the dirty ring."""
        ring = [self.dirty_ring.fd] if self.dirty_ring is not None else []
        memfd = self._share().memfd
        self._start_thread()  # whoever maps the page may ring the doorbell
        return [memfd, self.vm.ring_memfd, *ring]

    # -- the thread -------------------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        """On the I/O thread. A dead VM's does not start."""
        if self._thread is None:
            bell = self._share().doorbell
            if self.vm.thread_begins():
                self._thread = threading.Thread(target=self._live, args=(bell,), name=f"vcpu-{self.id}", daemon=True)
                self._thread.start()

    def submit(self, job: Job) -> None:
        """Run `job` on the vCPU's thread, with the mutex held, after everything that was there before it.

        On the I/O thread, or on the vCPU's own.
        """
        self._jobs.append(job)
        self._start_thread()
        if self._thread is None:
            self._drain()
        else:
            self.hart.summon()
            self.doorbell.ring()

    def try_now(self, job: Callable[..., None], *arguments: object) -> bool:
        """Run `job` here and now if the vCPU is idle and nothing waits; False if it must be submitted. On the I/O thread."""
        if self._thread is None:  # nobody else can be at it
            job(*arguments)
            return True
        if self._jobs or not self.mutex.acquire(blocking=False):
            return False
        try:
            self.hart.state.ready = 0  # whatever it changes, the next RUN looks at all of it
            job(*arguments)
        finally:
            self.mutex.release()
        return True

    def _live(self, bell: Doorbell) -> None:
        woken_soon(VCPU_SLICE_NS)
        try:
            self._serve(bell)
            self._drain()
        finally:
            self.vm.thread_ends()

    def _drain(self) -> None:
        """The VM is dead: what still waits is told so."""
        while self._jobs:
            with self.mutex:
                self._jobs.popleft()()

    def _serve(self, bell: Doorbell) -> None:
        state = self.hart.state  # `served` is 0: the page was new when the thread was started, and a RUN may be asked for
        while not self.vm.dead:
            what = self.hart.serve_runs()
            if what == Wanted.SUMMONED:
                while self._jobs and not self.vm.dead:
                    job = self._jobs.popleft()
                    with self.mutex:
                        self.hart.state.ready = 0
                        job()
                continue
            if what == Wanted.BUSY:
                self.mutex.acquire()
                what = Wanted.RUN
            try:
                ret, errno = self._run_for_doorbell(None if what == Wanted.RUN else what)
                state.ready = self._is_plain()
            finally:
                self.mutex.release()
            bell.answer(state.served, ret, errno)

    def _is_plain(self) -> bool:
        """Whether native code may do the next RUN. What other threads change from now on makes it leave with KICK."""
        return (
            self.vm.published
            and type(self.hart) is Hart
            and self.dirty_ring is None
            and self.pending is None
            and self._reset is None
            and self.mp_state == RUNNABLE
        )

    def _run_for_doorbell(self, left: int | None) -> tuple[int, int]:
        """`left`: the RUN is under way, and has left native code so."""
        try:
            return self.run(left), 0
        except KvmError as error:
            return -1, error.errno or EIO
        except Exception:
            log.exception("vCPU %d: internal error in KVM_RUN", self.id)
            return -1, EIO

    # -- KVM_RUN ----------------------------------------------------------------------------------------------

    def run(self, left: int | None = None) -> int:
        """KVM_RUN; the caller holds the mutex. 0: look at exit_reason. KvmError: EINTR, EIO, EFAULT, EOPNOTSUPP. `left`: an
        ExitKind, in the middle of one.
        """
        try:
            if left is None:
                self._begin()
            return self._run_briefly() if self.brief else self._run(left)
        finally:
            exits.after_run(self)

    def _begin(self) -> None:
        self.vm.check_alive()
        self.ran_once = True
        exits.complete(self)
        if self.page[run_page.IMMEDIATE_EXIT]:
            self._apply_reset()  # a hart_start under way is part of the state that a client is about to save
            self.doorbell.take_kick()
            raise KvmError(EINTR, "RUN", "immediate_exit")
        self.vm.begin_running()
        self.set_exit_reason(Exit.UNKNOWN)
        self.registers.entering()

    @property
    def private(self) -> bool:
        """Whether nobody but the I/O thread can change the page."""
        return self._thread is None

    @property
    def may_wait(self) -> bool:
        """Whether even a brief RUN may be kept waiting: by an eventfd that its owner has filled up."""
        return not self.vm.eventfds.empty

    def _run_briefly(self) -> int:
        """At most hart_state.SLICE instructions at a time, as often as the guest leaves for us, so many times."""
        hart = self.hart
        end = int(hart.state.icount) + SLICE
        try:
            for _ in range(_BRIEF_ENTRIES):
                self._apply_reset()
                if self.vm.dead or self.doorbell.take_kick() or self.mp_state == STOPPED or int(hart.state.icount) >= end:
                    break
                if not exits.before_entry(self):
                    return 0
                hart.be_brief()
                kind = hart.run()
                if kind in (ExitKind.KICK, ExitKind.WFI):
                    break
                if kind == ExitKind.USER or not exits.serve(self, kind):
                    return 0
                if self.sleep_now:
                    self.sleep_now = False
                    break
        finally:
            hart.be_no_longer_brief()
        self.set_exit_reason(Exit.INTR)
        self.stats.signal_exits += 1
        raise KvmError(EINTR, "RUN", "brief")

    def _run(self, left: int | None) -> int:
        while True:
            seen = self.hart.state.wake
            if self.vm.dead:
                raise KvmError(EIO, "RUN", "the VM is dead")
            if self.doorbell.take_kick():
                self.set_exit_reason(Exit.INTR)
                self.stats.signal_exits += 1
                raise KvmError(EINTR, "RUN", "kicked")
            self._apply_reset()
            if self.mp_state == STOPPED:
                self.hart.sleep(seen, None)
                continue
            if left is None and not exits.before_entry(self):
                return 0
            kind, left = self.hart.run(left), None
            if kind == ExitKind.KICK:
                continue
            if kind == ExitKind.USER:
                return 0
            if kind == ExitKind.WFI:  # of the reference; native code sleeps by itself
                self.stats.wfi_exit_stat += 1
                self._sleep(seen)
            elif not exits.serve(self, kind):
                return 0
            elif self.sleep_now:
                self.sleep_now = False
                self._sleep(seen)

    def _sleep(self, seen: int) -> None:
        """WFI found nothing pending: sleep until an interrupt, a kick, or the timer. May wake for nothing."""
        self.stats.blocking = 1
        started = time.monotonic_ns()
        self.hart.sleep(seen, self.hart.deadline_ns())
        self.stats.halted(time.monotonic_ns() - started)
        self.stats.blocking = 0

    @property
    def sleeping(self) -> bool:
        """Whether the thread is blocked in WFI: HSM's state SUSPENDED."""
        return bool(self.stats.blocking)

    def set_exit_reason(self, reason: int) -> None:
        """Write kvm_run.exit_reason."""
        run_page.U32.pack_into(self.page, run_page.EXIT_REASON, reason)

    # -- from other threads -----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Make RUN return EINTR: the one that runs now, or else the next one."""
        self.doorbell.set_kick()
        self.poke()

    def poke(self) -> None:
        """Make a running or sleeping RUN look at kicks, power and resets; it does not return for that alone."""
        self.hart.kick()
        self.hart.wake()

    def wake(self) -> None:
        """An interrupt has become pending (hart.set_pending was called): end a WFI."""
        self.hart.wake()

    def power_on(self) -> None:
        """mp_state RUNNABLE: a RUN that blocks because the vCPU is stopped goes on."""
        self.mp_state = RUNNABLE
        self.hart.wake()

    def power_off(self) -> None:
        """mp_state STOPPED: the guest code stops at its next safe point, and RUN blocks."""
        self.mp_state = STOPPED
        self.poke()

    def request_reset(self, pc: int, opaque: int) -> None:
        """HSM hart_start: on its next way into the guest the hart starts at `pc` with a0 = id, a1 = `opaque`."""
        self._reset = (pc, opaque)
        self.power_on()

    def _apply_reset(self) -> None:
        if self._reset is not None:
            (pc, opaque), self._reset = self._reset, None
            exits.reset_hart(self, pc, opaque)

    def shut_down(self) -> None:
        """The VM is dead: leave the guest, answer EIO, end the thread."""
        if self._thread is None:
            return  # nobody is in the guest; what the I/O thread does is brief
        self.hart.kick()
        self.hart.wake()
        self.hart.summon()
        self.doorbell.ring()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end, but no longer than that."""
        if self._thread is not None:
            self._thread.join(seconds)

    def release(self) -> None:
        """The VM is gone and the thread has ended: give memory and descriptors back."""
        self._jobs.clear()
        if self._page is not None:
            self._page.close()
            self._page = None
        if self.dirty_ring is not None:
            self.dirty_ring.close()
            self.dirty_ring = None


class _Private:
    """The page of a vCPU whose client does not map it."""

    def __init__(self) -> None:
        self._block = blocks.take(run_page.PAGE)
        self.address = self._block.address
        self.view = memoryview(self._block.map)
        self.doorbell = Doorbell(self.view, self.address, run_page.DOORBELL_BELL)

    def close(self) -> None:
        blocks.give_back(self._block, [(0, run_page.PAGE)])


class _Shared:
    """What a vCPU and its client both map."""

    def __init__(self, vcpu: Vcpu) -> None:
        """KvmError(ENOMEM): no descriptor or no memory for it."""
        try:
            self.memfd = create_memfd(f"kvm-vcpu:{vcpu.id}", run_page.PAGE)
            try:
                self.mapping = Mapping([(self.memfd, 0, run_page.PAGE), (vcpu.vm.ring_memfd, 0, run_page.PAGE)])
            except BaseException:
                os.close(self.memfd)
                raise
        except OSError as error:
            raise KvmError(ENOMEM, reason=f"the vCPU's shared page: {error}") from error
        self.address, self.view = self.mapping.address, self.mapping.view
        self.doorbell = Doorbell(self.view, self.address, run_page.DOORBELL_BELL)

    def close(self) -> None:
        self.mapping.close()
        os.close(self.memfd)
