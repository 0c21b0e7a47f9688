"""Machines and harts: what the native code of one VM works on, and how Python drives it.

A `Machine` owns what its harts share (memory slots, decoded pages, time); a `Hart` owns one hart's state and
runs it. Called by kvmcore/vm: run() on the vCPU's thread, the rest from any thread. The GIL is free while
guest code runs. Must never know of ioctls or kvm_run.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from errno import EOPNOTSUPP
from functools import cache
from typing import TYPE_CHECKING

from kvmcore.engine import blocks, hart_state, machine_state
from kvmcore.engine.completion import destination, is_plain, packed, plain_access
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.hart_state import HartState
from kvmcore.engine.host_clock import HostClock
from kvmcore.engine.loader import Image
from protocol.channel import process_memory

if TYPE_CHECKING:
    from kvmcore.engine.hot_code import HotCode

STIP = 1 << 5
U64 = (1 << 64) - 1
PAGE = 4096
#: Bytes of decoded pages that one machine may hold.
POOL_BYTES = 38 << 20
#: And with the template code and regions that it has been in lately, which are other machines' as well.
CODE_BYTES = 64 << 20
_CODE_SOON = 4 << 20
"""What it may come to be in until somebody looks again."""
_FEW_BYTES = 1 << 20
"""Of decoded pages: they are cleared, more are given back to the host."""
_LARGE_BYTES = 1 << 20
_IDLE_INSTRUCTIONS = 100_000_000
"""Between two looks."""
_IMSIC_SPAN = 64 << 20
#: Ticks of the time CSR in a second.
FREQUENCY = 10_000_000


@dataclass(frozen=True, slots=True)
class SlotView:
    """Guest memory [gpa, gpa + size) at host address hva; hva 0: nothing is mapped there (EFAULT).

    dirty_bitmap: host address of a bitmap, one bit per 4 KiB, or 0 when writes are not logged.
    userfault_bitmap: the same for pages that are not there yet, whose access is PAGE_ABSENT; 0: all are.
    """

    gpa: int
    size: int
    hva: int
    readonly: bool = False
    dirty_bitmap: int = 0
    userfault_bitmap: int = 0


class _PageHeader(ctypes.Structure):
    """Of a decoded page (machine_state.PAGE_GPA and so on)."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("gpa", "host", "next", "checked", "identity", "used")]
    gpa: int
    host: int
    next: int
    used: int


_GPA, _HOST, _NEXT, _USED = (
    offset // 8
    for offset in (machine_state.PAGE_GPA, machine_state.PAGE_HOST, machine_state.PAGE_NEXT, machine_state.PAGE_USED)
)
"""Words of a decoded page's header."""
_NO_SLOTS, _NO_IMSICS = (machine_state.Slot * 0)(), (ctypes.c_uint64 * 0)()


class Machine:
    """What the harts of one VM share."""

    def __init__(self, image: Image, max_harts: int = 1024, pool_bytes: int = POOL_BYTES) -> None:
        self.image = image
        self.harts: list[Hart] = []
        self._max_harts = max_harts
        self.gate = threading.RLock()
        """Held while decoded pages are dropped or regions put into them: quiesce() takes it."""
        self._open = threading.Event()
        self._open.set()
        self._block = blocks.take(ctypes.sizeof(machine_state.MachineState))
        self.state = machine_state.MachineState.from_buffer(self._block.map)
        self.pool_bytes = pool_bytes
        self._pool = blocks.take(pool_bytes)
        self._no_slot = machine_state.Slot()
        self.clock = HostClock.shared(image)
        self._begin()

    def _begin(self) -> None:
        """What a new machine has, where the block is zeros."""
        self._large = False
        self._icount_seen = 0
        self._slots = _NO_SLOTS
        self._imsics = _NO_IMSICS
        self._retired: list[object] = []
        self._hand = 0
        """Number of the decoded page that the next look for one to give up begins at."""
        self.flushes_of_pool = self.pages_given_up = 0
        self._bus: ctypes.Array[ctypes.c_uint64] | None = None
        self.hot_code: HotCode | None = None
        state = self.state
        state.pool, state.pool_size = self._pool.address, self.pool_bytes
        state.main_slot = ctypes.addressof(self._no_slot)
        state.one = 1
        state.aplic_start = U64
        state.templates = state.regions = 1 << 32  # a record's offset has 32 bits: none
        self.set_time(0)

    def renew(self) -> None:
        """As a new machine, for the next VM of this process: no hart runs any more, and none is used again."""
        self._give_up_all()
        ctypes.memset(self._block.address, 0, machine_state.OFFSET["buckets"])
        self._begin()

    def translate(self, path: str) -> None:
        """From now on hot code is translated, by the translator that listens on `path`."""
        from kvmcore.engine.hot_code import HotCode

        self.hot_code = HotCode(self, self.image, path)
        for hart in self.harts:
            hart.state.sample_count = 0

    @property
    def address(self) -> int:
        """Host address of the machine's block."""
        return ctypes.addressof(self.state)

    def close(self) -> None:
        """Give everything back now; no hart runs any more. The object must not be used afterwards, nor its harts."""
        self._give_up_all()
        del self.state
        blocks.give_back(self._pool, [])
        blocks.give_back(self._block, [(0, machine_state.OFFSET["buckets"])])

    def _give_up_all(self) -> None:
        for hart in self.harts:
            hart.close()
        self.harts.clear()
        hot, self.hot_code = self.hot_code, None
        if hot is not None:
            hot.close()
        self._use_small_pages()
        self.forget_decoded()

    # -- memory ----------------------------------------------------------------------------------------------
    @property
    def slots(self) -> ctypes.Array[machine_state.Slot]:
        """The memory map."""
        return self._slots

    def set_slots(self, views: Sequence[SlotView]) -> None:
        """Replace the memory map; harts must be stopped (`quiesce`).

        All translations go, and decoded pages, if memory is not where it was.
        """
        ordered = sorted(views, key=lambda view: view.gpa)
        slots = (machine_state.Slot * len(ordered))()
        for slot, view in zip(slots, ordered, strict=True):
            slot.start, slot.end = view.gpa, view.gpa + view.size
            slot.delta = (view.hva - view.gpa) & U64
            slot.flags = machine_state.SLOT_READONLY if view.readonly else 0
            if not view.hva:
                slot.flags |= machine_state.SLOT_ABSENT
            slot.dirty, slot.userfault = view.dirty_bitmap, view.userfault_bitmap
        self.state.slots, self.state.slot_count = ctypes.addressof(slots), len(slots)
        there = [slot for slot in slots if not slot.flags & machine_state.SLOT_ABSENT and not slot.userfault]
        main = max(there, key=lambda slot: int(slot.end - slot.start), default=self._no_slot)
        self.state.main_slot = ctypes.addressof(main)
        before, self._slots = self._slots, slots
        self._retire(before)
        places = [[(slot.start, slot.end, slot.delta, slot.flags) for slot in table] for table in (before, slots)]
        if places[0] != places[1]:  # else the dirty log goes on or off, or memory has come
            self.forget_decoded()
        for hart in self.harts:
            hart.flush_tlb()

    def set_imsics(self, pages: Mapping[int, Hart]) -> None:
        """Guest-physical addresses of IMSIC pages: stores to running harts' pages need no exit."""
        start, end = min(pages, default=0), max(pages, default=-PAGE) + PAGE
        if end - start > _IMSIC_SPAN:
            return  # far apart: they work all the same, by exits
        table = (ctypes.c_uint64 * ((end - start) // PAGE))()
        for gpa, hart in pages.items():
            table[(gpa - start) // PAGE] = hart.address
        with self.quiesce():
            self.state.imsic_start, self.state.imsic_size = start, end - start
            self.state.imsic_harts = ctypes.addressof(table)
            self._imsics = table

    def set_aplic(self, gpa: int) -> None:
        """Accesses to the APLIC at `gpa` are exits, whatever else is there."""
        self.state.aplic_start = gpa

    def set_bus(self, entries: Sequence[tuple[int, int, int, int, int]], ring: int) -> bool:
        """Replace what device stores meet first: machine_state.BusEntry as (start, size, kind, match, descriptor); `ring`: the
        coalesced ring's address. False: a hart still uses the old ones, being blocked in one's eventfd.
        """
        words = [len(entries), *(word for entry in entries for word in entry)]
        table = (ctypes.c_uint64 * len(words))(*words)
        self.state.ring = ring
        self.state.bus = ctypes.addressof(table)
        before, self._bus = self._bus, table
        for _ in range(_BUS_LOOKS):
            if self._retire(before):
                return True
            time.sleep(_BUS_PAUSE)
        return False

    def _retire(self, table: object) -> bool:
        """A table is replaced; False: it is kept, because a hart may be reading it from outside guest code."""
        self._barrier()  # the new table is there before we look
        if any(hart.state.in_bus for hart in self.harts):
            if table not in self._retired:
                self._retired.append(table)
            return False
        self._retired.clear()
        return True

    def _barrier(self) -> None:
        """What was written is visible to the harts before anything behind this is read, which a host may do first."""
        self.image.atomic_or(self.address + machine_state.OFFSET["one"], 0)

    def lock_ring(self) -> None:
        """For a store by Python into the coalesced ring; native code does without when it is taken."""
        while self.image.atomic_or(self.address + machine_state.OFFSET["ring_lock"], 1) & 1:
            time.sleep(0)

    def unlock_ring(self) -> None:
        """The store is done."""
        self.image.atomic_and(self.address + machine_state.OFFSET["ring_lock"], 0)

    def note_access(self, raw: int) -> None:
        """Native code may finish this plain load or store from now on."""
        word = packed(raw)
        self.state.accesses[((raw * machine_state.ACCESS_HASH & 0xFFFFFFFF) >> 24) % machine_state.ACCESSES] = word

    def forget_decoded(self) -> None:
        """Drop all decoded pages; no hart is in native code."""
        if self.hot_code is not None:
            self.hot_code.pages_go(None)
        if self.state.pool_used:
            ctypes.memset(ctypes.addressof(self.state.buckets), 0, ctypes.sizeof(self.state.buckets))
            if self.state.pool_used <= _FEW_BYTES:
                ctypes.memset(self._pool.address, 0, self.state.pool_used)
            else:
                self._pool.map.madvise(mmap.MADV_DONTNEED)
        self.state.pool_used = self.state.free = self._hand = 0
        self.flushes_of_pool += 1
        for hart in self.harts:
            hart.flush_icache()

    def reclaim_decoded(self) -> None:
        """Called by a hart that found the pool full."""
        with self.quiesce():
            if not self.state.free and self.state.pool_used + machine_state.PAGE_STRIDE > self.pool_bytes:
                self._give_up_pages(self._unused_pages())

    @property
    def code_bytes(self) -> int:
        """Decoded pages, and the host's pages of template code and regions that this process has been in."""
        return int(self.state.pool_used) + self.image.shared_bytes()

    def bound_code(self) -> None:
        """Called some times a second, by any thread, so that there is no more than CODE_BYTES."""
        if self.code_bytes > CODE_BYTES - _CODE_SOON:
            self.image.leave_shared()

    def pool_grows(self) -> None:
        """Decoded pages have been made: a program that needs many of them is better off with the host's large pages, an idle VM
        without."""
        if not self._large and self.state.pool_used > _LARGE_BYTES:
            self._large = True
            with suppress(OSError):  # a host kernel without them: big programs miss its TLB more often
                self._pool.map.madvise(mmap.MADV_HUGEPAGE)

    def _use_small_pages(self) -> None:
        """What comes into the pool from now on takes no more memory than it needs, until pool_grows()."""
        if self._large:
            self._large = False
            with suppress(OSError):
                self._pool.map.madvise(mmap.MADV_NOHUGEPAGE)

    def look_if_idle(self) -> None:
        """Called now and then: a machine that has done next to nothing since the last time gives memory back: what malloc has
        kept, and decoded pages, all but those that it has entered meanwhile.
        """
        from kvmcore.engine import warm_pages

        self.bound_code()
        count = sum(hart.state.icount for hart in self.harts)
        done, self._icount_seen = count - self._icount_seen, count
        if done > _IDLE_INSTRUCTIONS:
            return
        process_memory.trim()
        if self.state.pool_used < _FEW_BYTES:
            return
        with self.quiesce():
            pages = range(self.state.pool, self.state.pool + self.state.pool_used, machine_state.PAGE_STRIDE)
            headers = [_PageHeader.from_address(page) for page in pages]
            used = [header.gpa for header in headers if header.host and header.used]
            if len(used) < len(headers) * 3 // 4:
                self._use_small_pages()
                self.forget_decoded()
                made = warm_pages.make(self, used)
                if self.hot_code is not None:
                    self.hot_code.came_back(made)
            for header in headers[: self.state.pool_used // machine_state.PAGE_STRIDE]:
                header.used = 0
            for hart in self.harts:
                hart.forget_fetches()

    def _give_up_pages(self, gone: set[int]) -> None:
        """Free these decoded pages; no hart is in native code."""
        if self.hot_code is not None:
            self.hot_code.pages_go(gone)
        words, pool, buckets, free = self._pool_words(), self.state.pool, self.state.buckets, self.state.free
        for page in gone:
            at = (page - pool) // 8
            following, bucket = words[at + _NEXT], (words[at + _GPA] >> 12) % machine_state.PAGE_BUCKETS
            before = buckets[bucket]
            if before == page:
                buckets[bucket] = following
            while before != page:
                link = (before - pool) // 8 + _NEXT
                before = words[link]
                if before == page:
                    words[link] = following
            words[at + _HOST], words[at + _NEXT] = 0, free
            free = page
        self.state.free = free
        self.pages_given_up += len(gone)
        for hart in self.harts:
            hart.forget_fetches()

    def _unused_pages(self) -> set[int]:
        """Addresses of an eighth of the decoded pages, such as were not entered lately or often: the hand goes round and counts
        down what decoded_page counts up, so that pages which come back each time outlast those of a long way through much code.
        """
        count = self.state.pool_used // machine_state.PAGE_STRIDE
        wanted = max(1, count // 8)
        words, pool = self._pool_words(), self.state.pool
        found: set[int] = set()
        while len(found) < wanted:
            at = self._hand * (machine_state.PAGE_STRIDE // 8)
            self._hand = (self._hand + 1) % count
            if words[at + _USED] and words[at + _HOST]:
                words[at + _USED] -= 1
            else:
                found.add(pool + 8 * at)
        return found

    def _pool_words(self) -> ctypes.Array[ctypes.c_uint64]:
        return (ctypes.c_uint64 * (self.pool_bytes // 8)).from_address(self.state.pool)

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        """While in here no hart executes guest code and none starts to.

        Not to be entered from inside run().
        """
        with self.gate:
            nested = self.state.stop
            self._open.clear()
            self.state.stop = nested + 1
            self._barrier()  # a hart that enters now sees it, or is seen to run
            waiting = [hart for hart in self.harts if hart.state.running]
            for hart in waiting:
                hart.signal(hart_state.ATTENTION_STOP)
            pause = 0.0
            while any(hart.state.running for hart in waiting):
                time.sleep(pause)
                pause = 0.00005
            try:
                yield
            finally:
                self.state.stop = nested
                if not nested:
                    self._open.set()

    def wait_open(self) -> None:
        """Block while the machine is quiesced."""
        self._open.wait()

    # -- time ------------------------------------------------------------------------------------------------
    def set_time(self, delta: int) -> None:
        """Guest time is the host's count at FREQUENCY plus `delta` (modulo 2**64)."""
        self.state.time_mult = self.clock.multiplier(FREQUENCY)
        self.state.time_base = delta & U64

    def time(self) -> int:
        """What the time CSR reads now."""
        return int((((self.image.ticks() * self.state.time_mult) >> 52) + self.state.time_base) & U64)

    def ns_until(self, when: int) -> int:
        """Nanoseconds until the time CSR reads `when`; 0 if it has."""
        left = when - self.time()
        return max(0, left * 1_000_000_000 // FREQUENCY)


class Hart:
    """One hart. `state` is its block; its fields may be changed while the hart is not in run()."""

    def __init__(self, machine: Machine, index: int, hartid: int) -> None:
        self.machine, self.index, self.hartid = machine, index, hartid
        self._block = blocks.take(hart_state.SIZE)
        self.state = HartState.from_buffer(self._block.map)
        self._address = self._block.address
        self._run: Callable[[int], int] = machine.image.run
        self._complete: Callable[[int], None] | None = None
        self.emulated = 0
        with machine.quiesce() if machine.harts else nullcontext():
            machine.harts.append(self)
            machine.state.harts = len(machine.harts)
        self.state.extensions = (1 << len(hart_state.EXTENSIONS)) - 1
        self._begin()

    def reset(self) -> None:
        """All architectural state as KVM gives it to a new vCPU: zeros, S-mode, timer off."""
        keep = (
            self.state.extensions,
            self.state.icount,
            self.state.imsic_present,
            self.state.imsic_identities,
        )
        ctypes.memset(self._address, 0, hart_state.offset("tlb_blocks"))
        state = self.state
        state.extensions, state.icount, state.imsic_present, state.imsic_identities = keep
        self._begin()

    def _begin(self) -> None:
        """What is not zero in a new hart."""
        state = self.state
        state.mode, state.stimecmp, state.hartid = 1, U64, self.hartid
        state.machine = self.machine.address
        state.dirty_budget = 1 << 62
        state.tlb = self._address + hart_state.offset("tlb_blocks")
        state.context_satp = U64  # no satp: the first entry chooses a bank
        for bank in range(hart_state.TLB_BANKS):
            state.bank_satp[bank] = U64
            state.data_fills[bank] = state.fetch_fills[bank] = hart_state.FILL_LOG + 1
        state.samples_wanted = hart_state.FEW_SAMPLES
        state.sample_count = 0 if self.machine.hot_code is not None else hart_state.SAMPLES

    @property
    def address(self) -> int:
        """Host address of the hart's block."""
        return self._address

    def close(self) -> None:
        """Give the block back; the hart must not be used afterwards."""
        del self.state
        blocks.give_back(self._block, _OUTSIDE_TLBS)

    # -- running ---------------------------------------------------------------------------------------------
    def run(self, left: int | None = None) -> int:
        """Execute guest code until something is for Python; ExitKind. pc is as ExitKind says. `left`: how native code has
        left already.
        """
        while True:
            kind = int(self._run(self._address)) if left is None else left
            left = None
            if kind == ExitKind.STOPPED:
                self.machine.wait_open()
            elif kind == ExitKind.KICK:
                if self._served():
                    return kind
            elif kind == ExitKind.WFI and self.state.attention & hart_state.ATTENTION_INTERRUPT:
                continue  # an interrupt came between the guest's look and our leaving
            elif kind == ExitKind.EMULATE:
                kind = self.emulate()
                if kind != ExitKind.NONE:
                    return kind
            elif kind == ExitKind.PROFILE:
                assert self.machine.hot_code is not None
                self.machine.hot_code.take(self)
            elif kind == ExitKind.POOL_FULL:
                self.machine.reclaim_decoded()
            elif kind in (ExitKind.MMIO_READ, ExitKind.MMIO_WRITE) and not is_plain(self.state.exit_insn):
                # As KVM: devices are read and written by integer loads and stores only.
                self.state.exit_errno = EOPNOTSUPP
                self.state.exit_kind = ExitKind.ERROR
                return int(ExitKind.ERROR)
            else:
                if kind in (ExitKind.MMIO_READ, ExitKind.MMIO_WRITE):
                    self.machine.note_access(self.state.exit_insn)
                return kind

    # -- KVM_RUN without Python ------------------------------------------------------------------------------
    def answer_exits(self, page: int) -> None:
        """From now on run() sleeps in WFI and serves the bus, and writes MMIO exits into the kvm_run at `page`: USER."""
        self.state.run_page = page
        self._run = self.machine.image.run_on

    def serve_runs(self) -> int:
        """Wait at the doorbell and do RUNs until Python is needed; Wanted or ExitKind. After answer_exits()."""
        return int(self.machine.image.serve_runs(self._address))

    def summon(self) -> None:
        """Make serve_runs() return SUMMONED; whoever calls rings the bell afterwards."""
        self.state.summons = 1

    def acquire(self) -> bool:
        """Take the vCPU, as a RUN does; False: it is taken."""
        return not self.machine.image.atomic_or(self._address + _OWNER, 1) & 1

    def release(self) -> None:
        """Give it back."""
        self.machine.image.atomic_and(self._address + _OWNER, ~1 & U64)

    def wake(self) -> None:
        """End a WFI, or any sleep(), of the hart."""
        self.machine.image.wake_hart(self._address)

    def sleep(self, seen: int, ns: int | None) -> None:
        """Until wake() has been called since `state.wake` was `seen`, at most `ns`. May return early."""
        ticks = _LONG if ns is None else min(_LONG, -(-ns * FREQUENCY // 1_000_000_000))
        self.machine.image.sleep_hart(self._address, seen, ticks)

    def _served(self) -> bool:
        """Out because of `attention`: whether the caller has to know."""
        both = hart_state.ATTENTION_KICK | hart_state.ATTENTION_STOP
        served = self.machine.image.atomic_and(self._address + _ATTENTION, ~both & U64)
        return bool(served & hart_state.ATTENTION_KICK)  # what was taken away, not what was there before

    def emulate(self) -> int:
        """One instruction by the reference; the ExitKind if it left."""
        from kvmcore.engine.reference import step  # only where it is needed: most guests never do

        self.emulated += 1
        return step(self)

    def signal(self, flags: int) -> None:
        """Set ATTENTION_* flags; a running hart sees them at its next taken branch at the latest."""
        self.machine.image.signal(self._address, flags)

    def kick(self) -> None:
        """Make run() return KICK: the one that runs now, or else the next one."""
        self.signal(hart_state.ATTENTION_KICK)

    def be_brief(self) -> None:
        """The next run() returns KICK after SLICE instructions, if not before."""
        self.machine.image.atomic_and(self._address + _ATTENTION, ~hart_state.ATTENTION_KICK & U64)
        self.machine.image.atomic_or(self._address + _ATTENTION, hart_state.ATTENTION_BRIEF)

    def be_no_longer_brief(self) -> None:
        """What be_brief() has asked for is done; a kick that came meanwhile is forgotten too."""
        both = hart_state.ATTENTION_KICK | hart_state.ATTENTION_BRIEF
        self.machine.image.atomic_and(self._address + _ATTENTION, ~both & U64)

    @property
    def running(self) -> bool:
        """Whether the hart is inside native code."""
        return bool(self.state.running)

    def advance(self, length: int) -> None:
        """Go behind an instruction that Python has done; it counts as retired."""
        self.state.pc = (self.state.pc + length) & U64
        self.state.icount += 1

    # -- completion ------------------------------------------------------------------------------------------
    def complete_mmio(self, data: int) -> None:
        """Finish the load or store that left with MMIO_READ (`data`: what the device gave) or MMIO_WRITE."""
        access = plain_access(self.state.exit_insn)
        if access.rd is not None:
            self.state.x[access.rd] = access.extend(data)
        self.advance(access.length)

    def complete_csr(self, value: int) -> None:
        """Finish a CSR access that left with CSR: `value` goes to rd."""
        self.state.x[destination(self.state.exit_insn)] = value & U64
        self.advance(4)

    # -- interrupts ------------------------------------------------------------------------------------------
    def set_pending(self, bit: int) -> None:
        """Set a bit of sip (1 SSIP, 9 SEIP), from any thread; a running hart looks at it soon."""
        self.machine.image.atomic_or(self._address + _SIP, 1 << bit)
        self.signal(hart_state.ATTENTION_INTERRUPT)

    def clear_pending(self, bit: int) -> None:
        """Clear a bit of sip, from any thread."""
        self.machine.image.atomic_and(self._address + _SIP, ~(1 << bit) & U64)

    def deadline_ns(self) -> int | None:
        """Nanoseconds until the timer interrupt; None: it is off or not enabled."""
        state = self.state
        if state.stimecmp == U64 or not state.sie & STIP:
            return None
        return self.machine.ns_until(state.stimecmp)

    # -- IMSIC -----------------------------------------------------------------------------------------------
    def enable_imsic(self, identities: int) -> None:
        """The hart has an IMSIC with identities 1 to `identities`."""
        self.state.imsic_identities = identities
        self.state.imsic_present = 1

    def inject_msi(self, identity: int) -> None:
        """Make an identity pending, from any thread."""
        self.machine.image.deliver(self._address, identity)

    def read_imsic(self, name: str, index: int = 0) -> int:
        """eidelivery, eithreshold, eip[index] or eie[index]."""
        field = getattr(self.state, name)
        return int(field[index] if name in ("eip", "eie") else field)

    def write_imsic(self, name: str, index: int, value: int) -> None:
        """Set one of them; bits of identities that do not exist stay 0."""
        identities = self.state.imsic_identities
        if name in ("eip", "eie"):
            below = max(0, min(64, identities + 1 - 64 * index))
            getattr(self.state, name)[index] = value & ((1 << below) - 1) & ~(index == 0)
        else:
            setattr(self.state, name, value & (1 if name == "eidelivery" else identities))
        self.signal(hart_state.ATTENTION_INTERRUPT)

    # -- CSRs by name ----------------------------------------------------------------------------------------
    def read_csr(self, name: str) -> int:
        """A supervisor CSR, as the guest in S-mode would read it."""
        from kvmcore.engine.reference import read_csr

        return read_csr(self, name)

    def write_csr(self, name: str, value: int) -> None:
        """Write one; what it cannot hold is dropped, as the guest's write would be."""
        from kvmcore.engine.reference import write_csr

        write_csr(self, name, value)

    def set_extensions(self, names: frozenset[str]) -> None:
        """Which extensions instructions of this hart may use (names in lower case)."""
        self.state.extensions = _bits(names)

    # -- forgetting ------------------------------------------------------------------------------------------
    def forget_fetches(self) -> None:
        """Empty the fetch TLBs; the hart is not in native code. Memory of banks that were never used is not touched,
        and what the second level holds has a stamp that is no block's any more."""
        state, size = self.state, hart_state.FETCH_TLB_ENTRIES * 16
        bank = state.bank
        for number in range(hart_state.TLB_BANKS):
            if number != bank:
                state.bank_epoch[number] = U64  # no hart's: it is emptied when it is chosen
        state.fetch_fills[bank] = 0
        at = self._address + hart_state.offset("tlb_blocks") + bank * hart_state.TLB_BANK
        for block in range(at, at + hart_state.TLB_BANK, hart_state.TLB_BLOCK):
            state.last_stamp += 1
            ctypes.c_uint64.from_address(block + _FETCH_STAMP).value = state.last_stamp
            ctypes.c_uint64.from_address(block + _FETCH_FOREIGN).value = 0
            ctypes.memset(block + hart_state.FETCH_TLB_OFFSET, 0xFF, size)

    def flush_tlb(self, va: int | None = None, asid: int | None = None) -> None:
        """Forget translations before the next instruction that a look at `attention` allows."""
        self.signal(hart_state.ATTENTION_FLUSH_TLB)

    def flush_icache(self) -> None:
        """fence.i on this hart, as flush_tlb."""
        self.signal(hart_state.ATTENTION_FLUSH_ICACHE)

    @property
    def flush_pending(self) -> bool:
        """Whether a requested flush has not been done yet."""
        flushes = hart_state.ATTENTION_FLUSH_TLB | hart_state.ATTENTION_FLUSH_ICACHE
        return bool(self.state.attention & flushes)


@cache
def _bits(extensions: frozenset[str]) -> int:
    return sum(1 << i for i, name in enumerate(hart_state.EXTENSIONS) if name in extensions)


_FETCH_STAMP, _FETCH_FOREIGN = hart_state.BLOCK_STAMPS + 8, hart_state.BLOCK_FOREIGN + 8
_SIP = hart_state.offset("sip")
_OWNER = hart_state.offset("owner")
_LONG = 3600 * FREQUENCY
_BUS_LOOKS, _BUS_PAUSE = 100, 0.0001
_ATTENTION = hart_state.offset("attention")
_TLBS = hart_state.offset("tlb_blocks")
_BEHIND_TLBS = hart_state.offset("region_status")
_OUTSIDE_TLBS = [(0, _TLBS), (_BEHIND_TLBS, hart_state.SIZE - _BEHIND_TLBS)]
"""What a new hart must find zero. A bank of the TLBs is emptied when it is chosen, whatever is in it, as after reset()."""
