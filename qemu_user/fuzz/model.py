"""The documented rules of KVM as a small model in Python: a second opinion on what an operation should answer.

Written from KVM_ABI's text (sections 1.2, 1.7, 1.8, 1.9), not from kvmcore's code, and held against what real kernels
were recorded to do (tests/conformance). It says nothing where the rules depend on more than it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from protocol.abi.capabilities import Cap
from protocol.abi.ioctls import BY_NAME, UNKNOWN_ERRNO, find
from qemu_user.fuzz.executor import Outcome
from qemu_user.fuzz.rules import MAKES
from qemu_user.fuzz.sequence import Op

PAGE = 4096
LOG_DIRTY, READONLY = 1, 2
_GPA_SURE = 1 << 41
"""Guest addresses up to here exist whatever VM_GPA_BITS was set to."""
_HVA_SURE = (1 << 47) - PAGE
_ABSENT = {"CREATE_IRQCHIP", "SET_MEMORY_ATTRIBUTES", "PRE_FAULT_MEMORY"}
"""Known to the ABI, and to no RISC-V kernel."""
_MAX_PAGES = (1 << 31) - 1


@dataclass(frozen=True)
class Arch:
    """Where architectures differ: limits, and what an unknown request is answered with."""

    memslots: int
    vcpu_ids: int
    unknown: dict[str, str]
    irqfd_needs_chip: bool


RISCV = Arch(32767, 1024, dict(UNKNOWN_ERRNO), False)
X86 = Arch(32764, 4096, {"system": "EINVAL", "vm": "ENOTTY", "vcpu": "EINVAL", "device": "ENOTTY"}, True)


@dataclass(frozen=True)
class _Slot:
    gpa: int
    size: int
    hva: Any
    flags: int


class Model:
    """One VM. expect() before the operation, learn() after it, with what really came of it."""

    def __init__(self, arch: Arch = RISCV, *, extended: bool = True) -> None:
        """`extended`: whether kvmcore's extensions are there (Compat)."""
        self._arch, self._extended = arch, extended
        self._slots: dict[int, _Slot] = {}
        self._vcpu_ids: set[int] = set()
        self._open: dict[tuple[str, int], bool] = {("system", 0): True, ("vm", 0): True}
        self._count: dict[str, int] = {}
        self._ring = self._aia = False
        self._said = False
        """Whether the session's socket has been used: memory may be where no operation of the sequence has mapped any."""

    # -- what should come ---------------------------------------------------------------------------------------------

    def expect(self, op: Op) -> str | None:
        """The errno's name, "" for success, None for no opinion."""
        if op.do != "ioctl" or op.name not in BY_NAME:
            return None
        if not self._open.get(op.on, False):
            return "EBADF"
        row = BY_NAME[op.name]
        kind = op.on[0]
        if op.name in _ABSENT and self._arch is RISCV:
            return self._arch.unknown.get(kind, "ENOTTY")
        if find(kind, row.number) is None or (row.extension and not self._extended):
            return self._arch.unknown.get(kind, "ENOTTY")
        if row.argument is not None and op.members is None:
            return "EFAULT" if row.copies_in and not row.extension else None
        rule = getattr(self, f"_{op.name.lower()}", None)
        answer: str | None = rule(op, op.members or {}) if rule is not None else None
        return answer

    def _get_api_version(self, op: Op, m: dict[str, Any]) -> str:
        return "EINVAL" if op.arg else ""

    def _check_extension(self, op: Op, m: dict[str, Any]) -> str:
        return ""

    def _create_vcpu(self, op: Op, m: dict[str, Any]) -> str:
        if op.arg >= self._arch.vcpu_ids:
            return "EINVAL"
        return "EEXIST" if op.arg in self._vcpu_ids else ""

    def _set_user_memory_region(self, op: Op, m: dict[str, Any]) -> str | None:
        return "EINVAL" if m.get("flags", 0) & ~(LOG_DIRTY | READONLY) else self._region(m)

    def _set_user_memory_region2(self, op: Op, m: dict[str, Any]) -> str | None:
        flags = m.get("flags", 0)
        if flags & ~0xF:
            return "EINVAL"
        return None if flags & 0xC else self._region(m)

    def _region(self, m: dict[str, Any]) -> str | None:
        """Section 1.7, in the order of the kernel's checks."""
        gpa, size, hva, flags = (
            m.get("guest_phys_addr", 0),
            m.get("memory_size", 0),
            m.get("userspace_addr", 0),
            m.get("flags", 0),
        )
        number = m.get("slot", 0)
        offset = hva["map"] if isinstance(hva, dict) else hva
        if size % PAGE or gpa % PAGE or offset % PAGE:
            return "EINVAL"
        if number >> 16 or number >= self._arch.memslots or gpa + size > 1 << 64 or gpa + size == 1 << 64:
            return "EINVAL"
        if size // PAGE > _MAX_PAGES:
            return "EINVAL"
        if not isinstance(hva, dict) and hva + size > _HVA_SURE:
            return None
        old = self._slots.get(number)
        if size == 0:
            return "" if old else "EINVAL"
        if old is not None:
            if old.flags & ~3:
                return None
            if (old.size, old.hva) != (size, hva) or (old.flags ^ flags) & READONLY:
                return "EINVAL"
            if (old.gpa, old.flags) == (gpa, flags):
                return ""
        if any(gpa < other.gpa + other.size and other.gpa < gpa + size for n, other in self._slots.items() if n != number) and (
            old is None or old.gpa != gpa
        ):
            return "EEXIST"
        unsure = gpa + size > _GPA_SURE or (self._said and not isinstance(hva, dict))
        return None if unsure else ""

    def _get_dirty_log(self, op: Op, m: dict[str, Any]) -> str | None:
        if self._ring:
            return "ENXIO"
        number = m.get("slot", 0)
        if number >> 16 or number >= self._arch.memslots:
            return "EINVAL"
        slot = self._slots.get(number)
        if slot is None or not slot.flags & LOG_DIRTY:
            return "ENOENT"
        where = m.get("dirty_bitmap", 0)
        needed = -(-slot.size // PAGE // 64) * 8
        if isinstance(where, dict) and "out" in where:
            return "" if where["out"] >= needed else "EFAULT"
        return "EFAULT" if where in (0, 1, 1 << 63) else None

    def _reset_dirty_rings(self, op: Op, m: dict[str, Any]) -> str | None:
        return None if self._ring else "EINVAL"

    def _ioeventfd(self, op: Op, m: dict[str, Any]) -> str | None:
        flags, length = m.get("flags", 0), m.get("len", 0)
        if flags & 4:
            return None
        if length not in (0, 1, 2, 4, 8) or m.get("addr", 0) + length > 1 << 64 or flags & ~0x1F or (not length and flags & 1):
            return "EINVAL"
        return None

    def _register_coalesced_mmio(self, op: Op, m: dict[str, Any]) -> str | None:
        return "EINVAL" if m.get("pio", 0) > 1 else None

    def _enable_cap(self, op: Op, m: dict[str, Any]) -> str | None:
        ring = m.get("cap") in (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL)  # whose flags nobody looks at
        return "EINVAL" if m.get("flags", 0) and not ring else None

    def _irq_line(self, op: Op, m: dict[str, Any]) -> str | None:
        return None if self._aia else "ENXIO"

    def _signal_msi(self, op: Op, m: dict[str, Any]) -> str | None:
        return None if self._aia else "EINVAL"

    def _create_guest_memfd(self, op: Op, m: dict[str, Any]) -> str | None:
        size = m.get("size", 0)
        if m.get("flags", 0) & ~3 or size == 0 or size % PAGE or size >> 63:
            return "EINVAL"
        return None if size > 1 << 40 else ""

    def _get_mp_state(self, op: Op, m: dict[str, Any]) -> str:
        return ""

    def _set_mp_state(self, op: Op, m: dict[str, Any]) -> str | None:
        state = m.get("mp_state", 0)
        return "" if state in (0, 5) else None if state == 2 else "EINVAL"

    # -- what came ------------------------------------------------------------------------------------------------------

    def learn(self, op: Op, outcome: Outcome) -> None:
        """Follow what has happened."""
        self._said |= op.do == "say"
        if op.do == "eventfd":
            self._made("eventfd")
        if op.do == "close" and not outcome.errno:
            self._open[op.on] = False
        if outcome.errno or op.do != "ioctl":
            return
        m = op.members or {}
        if (kind := MAKES.get(op.name)) and (op.name != "CREATE_DEVICE" or not m.get("flags", 0) & 1):
            self._made(kind)
        if op.name == "CREATE_VCPU":
            self._vcpu_ids.add(op.arg)
        elif op.name == "CREATE_DEVICE":
            self._aia |= m.get("type") == 11 and not m.get("flags", 0) & 1
        elif op.name.startswith("SET_USER_MEMORY_REGION"):
            if m.get("memory_size", 0):
                self._slots[m.get("slot", 0)] = _Slot(
                    m.get("guest_phys_addr", 0), m["memory_size"], m.get("userspace_addr", 0), m.get("flags", 0)
                )
            else:
                self._slots.pop(m.get("slot", 0), None)
        elif op.name == "ENABLE_CAP" and m.get("cap") in (Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_ACQ_REL):
            self._ring = True

    def _made(self, kind: str) -> None:
        position = self._count.get(kind, 0)
        self._count[kind] = position + 1
        self._open[kind, position] = True

    @property
    def disjoint(self) -> bool:
        """The invariant of memory slots."""
        ends = sorted((slot.gpa, slot.gpa + slot.size) for slot in self._slots.values())
        return all(first[1] <= second[0] for first, second in pairwise(ends))
