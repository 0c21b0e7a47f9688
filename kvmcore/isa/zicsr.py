"""Zicsr: the six CSR instructions (Unprivileged ISA, chapter 6). What each CSR is stands in csrs.py.

The csr operand is always known when these run: native code has a handler for each CSR.
"""

from __future__ import annotations

from typing import NoReturn

from kvmcore.ir.value import Value, u64
from kvmcore.isa import csrs
from kvmcore.isa.csrs import Csr
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import illegal_instruction

#: Zkr: entropy. kvmcore leaves it to user space, which has some.
SEED = 0x015


def _leave(h: Hart, number: int, value: Value, mask: Value) -> NoReturn:
    """Out of the guest; the answer becomes rd (KVM_EXIT_RISCV_CSR)."""
    h.set("exit_csr", number)
    h.set("exit_data", value)
    h.set("exit_mask", mask)
    h.exit("CSR")


def _find(h: Hart, number: int, value: Value, mask: Value, writes: bool) -> Csr:
    """The CSR, if it exists, is for this privilege, and may be written where that is wanted (2.1)."""
    if number == SEED:
        if not writes or ~(h.enabled("zkr") & (h.get("mode") != 0)):
            raise illegal_instruction()
        _leave(h, number, value, mask)
    csr = csrs.BY_NUMBER.get(number)
    if csr is None or (writes and not csr.writable):
        raise illegal_instruction()
    if number & 0x300 and h.get("mode") == 0:
        raise illegal_instruction()
    if number in csrs.NEED_IMSIC and h.get("imsic_present") == 0:
        if ~h.enabled("ssaia"):
            raise illegal_instruction()
        _leave(h, number, value, mask)
    if csr.check is not None:
        csr.check(h)
    return csr


def _read(h: Hart, rd: Reg, number: Value) -> None:
    """csrrs and csrrc with x0 or 0: nothing is written, not even the same value."""
    h.x[rd] = _find(h, int(number), u64(0), u64(0), writes=False).read(h)


def _write(h: Hart, rd: Reg, number: Value, value: Value, mask: Value) -> None:
    """The bits of `mask` become those of `value`; rd gets the old content."""
    csr = _find(h, int(number), value, mask, writes=True)
    if csr.change is not None:
        old = csr.change(h, value, mask)
    else:
        assert csr.write is not None
        old = csr.read(h)
        new = (old & ~mask) | (value & mask)
        csr.write(h, new)
        if csr.context and ((old ^ new) & csr.context) != 0:
            h.context_changed()
    h.x[rd] = old
    # Only S-mode writes these CSRs, and it takes interrupts only if they are enabled.
    if csr.interrupts and h.get("sstatus_sie") != 0:
        h.check_interrupts()


_ONES = u64(-1)


@insn("csrrw", "csr rs1 001 rd 1110011")
def csrrw(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    _write(h, rd, csr, h.x[rs1], _ONES)


@insn("csrrs", "csr rs1 010 rd 1110011")
def csrrs(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    if rs1 == 0:
        _read(h, rd, csr)
    else:
        _write(h, rd, csr, _ONES, h.x[rs1])


@insn("csrrc", "csr rs1 011 rd 1110011")
def csrrc(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    if rs1 == 0:
        _read(h, rd, csr)
    else:
        _write(h, rd, csr, u64(0), h.x[rs1])


@insn("csrrwi", "csr zimm 101 rd 1110011")
def csrrwi(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    _write(h, rd, csr, zimm, _ONES)


@insn("csrrsi", "csr zimm 110 rd 1110011")
def csrrsi(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    if zimm == 0:
        _read(h, rd, csr)
    else:
        _write(h, rd, csr, _ONES, zimm)


@insn("csrrci", "csr zimm 111 rd 1110011")
def csrrci(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    if zimm == 0:
        _read(h, rd, csr)
    else:
        _write(h, rd, csr, u64(0), zimm)
