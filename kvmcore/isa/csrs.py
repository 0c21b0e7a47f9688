"""The CSRs that a guest in S or U mode sees: one entry each, with its reading and its writing.

Called by zicsr.py, which checks privilege and read-only numbers, for every CSR instruction, and by the
reference for CSRs by name. A CSR without an entry is an illegal instruction. Never touches memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvmcore.ir.value import Value, select, u64
from kvmcore.isa import imsic, traps
from kvmcore.isa.hart import Hart
from kvmcore.isa.paging import LEVELS
from kvmcore.isa.traps import illegal_instruction

Read = Callable[[Hart], Value]
Write = Callable[[Hart, Value], None]
Change = Callable[[Hart, Value, Value], Value]

SIE_MASK = 1 << traps.SSI | 1 << traps.STI | 1 << traps.SEI
SSTATUS_UXL = 2 << 32
SD = 1 << 63
SUM, MXR = 1 << 18, 1 << 19
ALL = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Csr:
    """One CSR. Without `write` and `change` it is read-only.

    context: bits of it that say how addresses are translated; interrupts: whether a write may make one due;
    check: raises Trap where an access is illegal, or leaves.
    change(h, value, mask) replaces reading and writing where other threads write too: the bits of `mask`
    become those of `value`, the others stay as they are at that moment; it gives the old content.
    """

    number: int
    name: str
    read: Read
    write: Write | None = None
    context: int = 0
    interrupts: bool = False
    check: Callable[[Hart], None] | None = None
    change: Change | None = None

    @property
    def writable(self) -> bool:
        return self.write is not None or self.change is not None


def _field(name: str) -> Read:
    return lambda h: h.get(name)


def _masked(name: str, mask: int = ALL) -> Write:
    return lambda h, value: h.set(name, value & mask)


# -- sstatus (12.1.1) ------------------------------------------------------------------------------


def read_sstatus(h: Hart) -> Value:
    fs = h.get("fs").zext(64)
    value = (
        (h.get("sstatus_sie").zext(64) << 1)
        | (h.get("sstatus_spie").zext(64) << 5)
        | (h.get("sstatus_spp").zext(64) << 8)
        | (fs << 13)
        | (h.get("sum").zext(64) << 18)
        | (h.get("mxr").zext(64) << 19)
        | SSTATUS_UXL
    )
    return value | select(fs == 3, u64(SD), u64(0))


def write_sstatus(h: Hart, value: Value) -> None:
    for name, bit, mask in (
        ("sstatus_sie", 1, 1), ("sstatus_spie", 5, 1), ("sstatus_spp", 8, 1),
        ("sum", 18, 1), ("mxr", 19, 1),
    ):  # fmt: skip
        h.set(name, ((value >> bit) & mask).trunc(8))
    fs = ((value >> 13) & 3).trunc(8)
    h.set("fs", select(h.enabled("f"), fs, 0))


# -- interrupts ------------------------------------------------------------------------------------


def change_sip(h: Hart, value: Value, mask: Value) -> Value:
    """Only SSIP is writable (12.1.3); KVM_INTERRUPT and IPIs change sip from other threads."""
    bits = mask & (1 << traps.SSI)
    if (value & bits) != 0:
        return traps.pending(h, h.atomic_or("sip", bits))
    if bits != 0:
        return traps.pending(h, h.atomic_and("sip", ~bits))
    return traps.pending(h)


def write_satp(h: Hart, value: Value) -> None:
    """12.1.11: a write with an unsupported MODE has no effect."""
    mode = value >> 60
    supported = mode == 0
    for number in LEVELS:
        supported = supported | (mode == number)
    h.set("satp", select(supported, value, h.get("satp")))


def write_stvec(h: Hart, value: Value) -> None:
    """12.1.2: MODE is 0 or 1."""
    h.set("stvec", value & ~2)


def write_senvcfg(h: Hart, value: Value) -> None:
    """12.1.10: FIOM, CBIE (2 is reserved), CBCFE, CBZE."""
    cbie = (value >> 4) & 3
    h.set("senvcfg", (value & 0xC1) | (select(cbie == 2, u64(0), cbie) << 4))


# -- floating point (Unprivileged ISA, 20.2) -------------------------------------------------------


def _fp_on(h: Hart) -> None:
    if h.get("fs") == 0:
        raise illegal_instruction()


def _write_frm(h: Hart, value: Value) -> None:
    h.set("fs", 3)
    h.set("frm", (value & 7).trunc(8))


def _write_fflags(h: Hart, value: Value) -> None:
    h.set("fs", 3)
    h.set("fflags", (value & 31).trunc(8))


def _write_fcsr(h: Hart, value: Value) -> None:
    _write_frm(h, value >> 5)
    _write_fflags(h, value)


def _read_fcsr(h: Hart) -> Value:
    return h.get("fflags").zext(64) | (h.get("frm").zext(64) << 5)


# -- counters --------------------------------------------------------------------------------------


def _counter(index: int) -> Callable[[Hart], None]:
    def check(h: Hart) -> None:
        """12.1.5: scounteren guards U-mode."""
        if (h.get("mode") == 0) & ((h.get("scounteren") >> index).trunc(1) == 0):
            raise illegal_instruction()

    return check


def _instret(h: Hart) -> Value:
    return h.instret() + h.get("instret_base")


# -- AIA -------------------------------------------------------------------------------------------


def _has_aia(h: Hart) -> None:
    if ~h.enabled("ssaia"):
        raise illegal_instruction()


def _has_sstc(h: Hart) -> None:
    if ~h.enabled("sstc"):
        raise illegal_instruction()


def _selected(h: Hart) -> None:
    """AIA 2.2: what siselect does not name cannot be accessed."""
    if ~imsic.valid(h.get("siselect")):
        raise illegal_instruction()


def _read_stopei(h: Hart) -> Value:
    identity = h.routine(imsic.top)
    return identity | (identity << 16)


def _read_stopi(h: Hart) -> Value:
    """AIA 5.4.3: the interrupt of highest priority that is pending and enabled, with priority 1."""
    due = traps.pending(h) & h.get("sie")
    top = select((due & (1 << traps.STI)) != 0, u64(traps.STI << 16 | 1), u64(0))
    top = select((due & (1 << traps.SSI)) != 0, u64(traps.SSI << 16 | 1), top)
    return select((due & (1 << traps.SEI)) != 0, u64(traps.SEI << 16 | 1), top)


CSRS: tuple[Csr, ...] = (
    Csr(0x001, "fflags", lambda h: h.get("fflags").zext(64), _write_fflags, check=_fp_on),
    Csr(0x002, "frm", lambda h: h.get("frm").zext(64), _write_frm, check=_fp_on),
    Csr(0x003, "fcsr", _read_fcsr, _write_fcsr, check=_fp_on),
    Csr(0x100, "sstatus", read_sstatus, write_sstatus, context=SUM | MXR, interrupts=True),
    Csr(0x104, "sie", _field("sie"), _masked("sie", SIE_MASK), interrupts=True),
    Csr(0x105, "stvec", _field("stvec"), write_stvec),
    Csr(0x106, "scounteren", _field("scounteren"), _masked("scounteren", 0xFFFFFFFF)),
    Csr(0x10A, "senvcfg", _field("senvcfg"), write_senvcfg),
    Csr(0x140, "sscratch", _field("sscratch"), _masked("sscratch")),
    Csr(0x141, "sepc", _field("sepc"), _masked("sepc", ~1)),
    Csr(0x142, "scause", _field("scause"), _masked("scause")),
    Csr(0x143, "stval", _field("stval"), _masked("stval")),
    Csr(0x144, "sip", traps.pending, change=change_sip, interrupts=True),
    Csr(0x14D, "stimecmp", _field("stimecmp"), _masked("stimecmp"), interrupts=True, check=_has_sstc),
    Csr(0x150, "siselect", _field("siselect"), _masked("siselect", 0xFFF), check=_has_aia),
    Csr(0x151, "sireg", imsic.read, change=imsic.change, interrupts=True, check=_selected),
    Csr(0x15C, "stopei", _read_stopei, change=lambda h, value, mask: imsic.claim(h), interrupts=True),
    Csr(0x180, "satp", _field("satp"), write_satp, context=ALL),
    Csr(0xDB0, "stopi", _read_stopi, check=_has_aia),
    Csr(0xC00, "cycle", _instret, check=_counter(0)),
    Csr(0xC01, "time", lambda h: h.time(), check=_counter(1)),
    Csr(0xC02, "instret", _instret, check=_counter(2)),
    *(Csr(0xC00 + n, f"hpmcounter{n}", lambda h: u64(0), check=_counter(n)) for n in range(3, 32)),
)

#: CSRs that an access leaves native code for while the hart has no IMSIC: as KVM, kvmcore forwards them.
NEED_IMSIC = frozenset({0x151, 0x15C})

BY_NUMBER = {csr.number: csr for csr in CSRS}
BY_NAME = {csr.name: csr for csr in CSRS}
