"""What an SBI extension is, and what it may ask of the VM.

Each file of this folder ends in one `Extension`; __init__.py lists them. Their functions are called on the
thread of the vCPU that executed ecall, with that vCPU out of the guest. They see the VM through `Caller`
only (kvmcore/vm/hypercalls.py implements it). A guest's wrong call is an SBI error, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from protocol.abi.structs_riscv import SBI_SUCCESS, SbiExt

U64 = (1 << 64) - 1


class Caller(Protocol):
    """The vCPU that made the call, and the VM around it. Harts are named by their ids."""

    hart_id: int

    def spec_version(self) -> int:
        """SBI specification version: major << 24 | minor."""

    def implementation_version(self) -> int:
        """The version that goes with implementation id 3 (KVM): Linux's version code."""

    def machine_id(self, name: str) -> int:
        """mvendorid, marchid or mimpid."""

    def probe(self, eid: int) -> int:
        """1 if the guest may use the extension `eid`, else 0."""

    def is_forwarded(self, eid: int) -> bool:
        """Whether calls of `eid` go to user space as they are (experimental and vendor ranges)."""

    def harts(self) -> Sequence[int]:
        """The ids of all harts."""

    def set_timer(self, when: int) -> None:
        """Timer interrupt at `when`; clears a pending one."""

    def send_ipi(self, hart: int) -> None:
        """Make the supervisor software interrupt of a hart pending."""

    def fence_i(self, harts: Sequence[int]) -> None:
        """fence.i on these harts; returns when it is done there."""

    def sfence_vma(self, harts: Sequence[int], start: int, size: int, asid: int | None) -> None:
        """sfence.vma on these harts for [start, start + size), size U64: all; returns when it is done
        there.
        """

    def is_memory(self, gpa: int) -> bool:
        """Whether a memslot covers the address."""

    def hart_status(self, hart: int) -> int:
        """HSM state: 0 started, 1 stopped, 4 suspended."""

    def hart_start(self, hart: int, pc: int, opaque: int) -> bool:
        """Start a stopped hart; False if it is not stopped."""

    def hart_stop(self) -> None:
        """The calling hart is stopped from the end of this call on."""


class After(Enum):
    """What happens when an SBI function has done its work."""

    RETURN = "return"
    """a0 and a1 are set, the guest goes on behind the ecall."""
    SLEEP = "sleep"
    """As RETURN, after an interrupt has become pending (or for no reason)."""
    FORWARD = "forward"
    """User space answers: KVM_EXIT_RISCV_SBI."""
    SHUTDOWN = "shutdown"
    """Every hart stops where it is; user space is told: system event 1. `value` is the reason."""
    RESET = "reset"
    """As SHUTDOWN, system event 2."""


class Result(NamedTuple):
    """`error` goes to a0, `value` to a1."""

    error: int = SBI_SUCCESS
    value: int = 0
    after: After = After.RETURN


Function = Callable[[Caller, int, Sequence[int]], Result]


class Extension(NamedTuple):
    """One SBI extension: the range of its ids, its switch in ONE_REG (None: always there), its functions.

    `call(caller, function id, a0..a5)`.
    """

    name: str
    first: int
    last: int
    switch: SbiExt | None
    call: Function


def selected(caller: Caller, mask: int, base: int) -> tuple[list[int], bool]:
    """The harts that (hart_mask, hart_mask_base) names, and whether every bit of it named one.

    A base of -1 means all harts.
    """
    harts = caller.harts()
    if base == U64:
        return list(harts), True
    chosen = [hart for hart in harts if 0 <= hart - base < 64 and mask >> (hart - base) & 1]
    return chosen, len(chosen) == mask.bit_count()
