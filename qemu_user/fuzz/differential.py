"""The same sequences on kvmcore and on a real KVM of another architecture: results, errnos and outputs must agree.

Save for DIFFERENCES, each with its reason (KVM_ABI section 7). An operation on which they disagree ends its sequence, for
what follows would be compared on different states; unless both have refused it, or what one has done shows nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from qemu_user.fuzz.executor import Outcome
from qemu_user.fuzz.sequence import Finding, Op


@dataclass(frozen=True)
class Difference:
    """A disagreement that is as it should be: where it applies (kvmcore's outcome, the other's), and why."""

    applies: Callable[[Op, Outcome, Outcome], bool]
    reason: str
    shows: bool = True
    """Whether later operations can tell (goes on if not)."""


def _named(*names: str) -> Callable[[Op, Outcome, Outcome], bool]:
    return lambda op, ours, theirs: op.name in names


def _errnos(ours_name: str, theirs_name: str) -> Callable[[Op, Outcome, Outcome], bool]:
    return lambda op, ours, theirs: (ours.errno, theirs.errno) == (ours_name, theirs_name)


def _member(op: Op, name: str) -> int:
    value = (op.members or {}).get(name, 0)
    return value if isinstance(value, int) else 0


def _first_argument(op: Op) -> int:
    """args[0] of KVM_ENABLE_CAP."""
    return int((op.members or {}).get("args", [0])[0])


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        lambda op, ours, theirs: op.on[0] == "vm" and (ours.errno, theirs.errno) == ("EINVAL", "ENOTTY"),
        "an unknown request on a VM is EINVAL on RISC-V, ENOTTY on x86",
    ),
    Difference(_named("CHECK_EXTENSION"), "capabilities are the architecture's", shows=False),
    Difference(_named("GET_VCPU_MMAP_SIZE"), "x86 has a page more, for port I/O", shows=False),
    Difference(
        lambda op, ours, theirs: op.name == "IRQFD" and theirs.errno == "EINVAL",
        "x86 has no irqfds without an interrupt controller; RISC-V drops their signals", shows=False,
    ),
    Difference(
        lambda op, ours, theirs: op.name == "CREATE_DEVICE" and _member(op, "type") in (4, 11),
        "VFIO's device is the host's, the AIA is RISC-V's",
    ),
    Difference(
        lambda op, ours, theirs: op.name == "GET_STATS_FD" and theirs.errno == "EMFILE", "the host's descriptors have run out",
    ),
    Difference(
        lambda op, ours, theirs: op.name == "CREATE_VCPU" and 1024 <= int(op.arg) < 4096,
        "x86 has ids up to 4095, RISC-V to 1023",
    ),
    Difference(
        lambda op, ours, theirs: 32764 <= _member(op, "slot") & 0xFFFFFFFF < 32767,
        "x86 keeps three slots for itself",
    ),
    Difference(_errnos("EFAULT", ""), "guest addresses beyond 59 bits: RISC-V refuses at once, x86 at the fault"),
    Difference(
        lambda op, ours, theirs: op.name.startswith("SET_USER_MEMORY_REGION") and theirs.errno == "EINVAL"
        and ours.errno in ("", "EFAULT") and _member(op, "guest_phys_addr") + _member(op, "memory_size") > 1 << 36,
        "how far guest addresses go: on x86 as far as the host's physical ones (EINVAL), on RISC-V 59 bits (EFAULT)",
    ),
    Difference(
        lambda op, ours, theirs: op.name == "SET_USER_MEMORY_REGION2" and bool(_member(op, "flags") & 0xC),
        "guest_memfd with a dirty log, and userfault slots, are extensions of kvmcore",
    ),
    Difference(
        lambda op, ours, theirs: op.name == "ENABLE_CAP" and _member(op, "cap") not in (168, 182, 223),
        "which capabilities can be switched on is the architecture's, but for the generic code's",
    ),
    Difference(
        lambda op, ours, theirs: op.name == "ENABLE_CAP" and 0 < _first_argument(op) < 1 << 14 and theirs.errno == "EINVAL",
        "how many entries of a dirty ring stay free, and so its least size, is the architecture's",
    ),
    Difference(
        lambda op, ours, theirs: op.name.startswith("SET_USER_MEMORY_REGION") and theirs.errno == "" and ours.errno == "EINVAL"
        and isinstance((op.members or {}).get("userspace_addr", 0), int),
        "which user addresses exist is the host's",
    ),
    Difference(
        lambda op, ours, theirs: op.name in ("IRQ_LINE", "SIGNAL_MSI", "SET_GSI_ROUTING")
        and {ours.errno, theirs.errno} <= {"ENXIO", "EINVAL", "EFAULT"},
        "without an interrupt controller all refuse; which check comes first is the architecture's",
    ),
)  # fmt: skip


def _same_output(op: Op, ours: Outcome, theirs: Outcome) -> bool:
    """Whether what a generic ioctl wrote is the same: the dirty log is the only one that writes through a pointer."""
    return op.name != "GET_DIRTY_LOG" or ours.out.get(1) == theirs.out.get(1)


class Running(Protocol):
    """A sequence under way on a target."""

    def begin(self, ops: list[Op]) -> None:
        """Have operations done in order; what can be sent is sent at once."""

    def outcomes(self) -> Iterator[Outcome]:
        """What comes of them."""

    def close(self) -> None:
        """Destroy its VM."""


@dataclass(frozen=True)
class Comparison:
    """How many operations were compared, and the first disagreement without a reason."""

    compared: int
    finding: Finding | None = None


def compare(ops: list[Op], ours: Running, theirs: Running) -> Comparison:
    """Perform a sequence on both."""
    done = 0
    try:
        ours.begin(ops)
        theirs.begin(ops)
        for op, here, there in zip(ops, ours.outcomes(), theirs.outcomes(), strict=True):
            done += 1
            if here.errno == there.errno and (here.errno or (here.ret == there.ret and _same_output(op, here, there))):
                continue
            known = next((known for known in DIFFERENCES if known.applies(op, here, there)), None)
            if known is None:
                return Comparison(done, Finding("differential", f"{op}: kvmcore {here}, the other KVM {there}", done - 1))
            if known.shows and not (here.errno and there.errno):
                break
    finally:
        ours.close()
        theirs.close()
    return Comparison(done)
