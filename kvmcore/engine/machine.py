"""The engine's half of a VM and of its vCPUs: what kvmcore/vm uses to run guest code.

`Machine` owns what harts share (slots, code pages, time), `Hart` one hart's state and its way into native code.
hart.run() is called by the vCPU's own thread; kick(), set_pending(), clear_pending(), inject_msi() and the flush
requests by any thread; everything else only while that hart is outside run().
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from kvmcore.engine.hart_state import HartState
from kvmcore.engine.loader import Image


class SlotView(NamedTuple):
    """Guest memory as native code sees it: `size` bytes at guest-physical `gpa`, at host address `hva`.

    hva 0: there is nothing behind it; any access leaves with ERROR(EFAULT). dirty_bitmap: host address of a bitmap,
    one bit per page, or 0 when writes are not logged.
    """

    gpa: int
    size: int
    hva: int
    readonly: bool = False
    dirty_bitmap: int = 0


class Machine:
    """What the harts of one VM share."""

    def __init__(self, image: Image, max_harts: int = 1024) -> None:
        raise NotImplementedError

    def set_slots(self, slots: Sequence[SlotView]) -> None:
        """Replace guest memory. Sorted or not, but without overlap. With all harts stopped: inside quiesce()."""
        raise NotImplementedError

    def set_time(self, delta: int) -> None:
        """Guest time is the host's 10 MHz count plus `delta` (modulo 2**64)."""
        raise NotImplementedError

    def time(self) -> int:
        """The guest's time CSR now."""
        raise NotImplementedError

    @contextmanager
    def quiesce(self) -> Iterator[None]:
        """Inside, no hart of the machine is in native code; those that are about to enter wait. Nests."""
        raise NotImplementedError
        yield

    def close(self) -> None:
        """Free everything. No hart may run any more."""
        raise NotImplementedError


class Hart:
    """One hart. `state` is its architectural state: valid, and writable, while the hart is outside run()."""

    state: HartState

    def __init__(self, machine: Machine, index: int, hartid: int) -> None:
        raise NotImplementedError

    def run(self) -> int:
        """Run guest code until an exit; returns its ExitKind. The GIL is released meanwhile."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Inside native code. May be called by any thread."""
        raise NotImplementedError

    @property
    def flush_pending(self) -> bool:
        """A flush that was requested is not done yet. It is done before the hart runs guest code again."""
        raise NotImplementedError

    def kick(self) -> None:
        """Any thread: make run() return KICK, now or the next time it is called (once)."""
        raise NotImplementedError

    def set_pending(self, bit: int) -> None:
        """Any thread: set a bit of sip (1 SSIP, 9 SEIP). Seen by a running hart; a sleeping one must be woken."""
        raise NotImplementedError

    def clear_pending(self, bit: int) -> None:
        """Any thread: clear a bit of sip."""
        raise NotImplementedError

    def inject_msi(self, identity: int) -> None:
        """Any thread: set a bit of eip. Identities the hart has not are ignored."""
        raise NotImplementedError

    def enable_imsic(self, identities: int) -> None:
        """Give the hart an IMSIC with identities 1 to `identities` (63 to 2047)."""
        raise NotImplementedError

    def read_imsic(self, name: str, index: int = 0) -> int:
        """eidelivery, eithreshold, eip[index] or eie[index]."""
        raise NotImplementedError

    def write_imsic(self, name: str, index: int, value: int) -> None:
        """Set one of them; bits that do not exist stay 0."""
        raise NotImplementedError

    def flush_tlb(self, va: int | None = None, asid: int | None = None) -> None:
        """Any thread: request sfence.vma; done at the hart's next safe point (flush_pending until then)."""
        raise NotImplementedError

    def flush_icache(self) -> None:
        """Any thread: request fence.i; done at the hart's next safe point."""
        raise NotImplementedError

    def complete_mmio(self, data: int) -> None:
        """Finish MMIO_READ (data, not extended) or MMIO_WRITE: rd is written, pc advances."""
        raise NotImplementedError

    def complete_csr(self, value: int) -> None:
        """Finish CSR: rd gets `value`, the old content; pc advances."""
        raise NotImplementedError

    def advance(self, length: int) -> None:
        """pc += length, one instruction retired."""
        raise NotImplementedError

    def deadline_ns(self) -> int | None:
        """Nanoseconds until the timer interrupt becomes pending (0: it is, or another enabled one is); None: never."""
        raise NotImplementedError

    def read_csr(self, name: str) -> int:
        """A supervisor CSR by name ("sstatus", "sip", "fcsr", "siselect"), as the guest in S-mode would read it."""
        raise NotImplementedError

    def write_csr(self, name: str, value: int) -> None:
        """Write one; what it cannot hold is dropped, as the guest's write would be."""
        raise NotImplementedError

    def set_extensions(self, names: frozenset[str]) -> None:
        """Which extensions instructions of this hart may use (names in lower case)."""
        raise NotImplementedError

    def reset(self) -> None:
        """A new hart's state: everything 0, S-mode, no timer. Identity, extensions and the IMSIC stay."""
        raise NotImplementedError
