"""Zicsr: the six CSR instructions (Unprivileged ISA, chapter 6). What each CSR is stands in csrs.py.

The csr operand is always known when these run: native code has a handler for each CSR, the decoder chooses it.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmcore.ir.value import Value
from kvmcore.isa import csrs
from kvmcore.isa.csrs import Csr
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import illegal_instruction

SEED = 0x015
Change = Callable[[Value], Value]


def _find(h: Hart, number: Value, writes: bool) -> Csr:
    """The CSR, if it exists, is for this privilege, and may be written where that is wanted (2.1)."""
    csr = csrs.BY_NUMBER.get(int(number))
    if csr is None or (writes and csr.write is None):
        raise illegal_instruction()
    if csr.number & 0x300 and h.get("mode") == 0:
        raise illegal_instruction()
    if csr.check is not None:
        csr.check(h)
    return csr


def _access(h: Hart, rd: Reg, number: Value, change: Change | None, reads: bool = True) -> None:
    """Read, then write `change(old)`; None: only read."""
    csr = _find(h, number, change is not None)
    if change is None:
        h.x[rd] = csr.read(h)
        return
    assert csr.write is not None
    old = (csr.claim or csr.read)(h)
    csr.write(h, change(old))
    h.x[rd] = old
    if csr.context:
        h.context_changed()
    if csr.interrupts:
        h.check_interrupts()


@insn("csrrw", "csr rs1 001 rd 1110011")
def csrrw(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    if int(csr) == SEED:  # Zkr: kvmcore leaves it to user space, which has the entropy
        h.exit("CSR")
    value = h.x[rs1]
    _access(h, rd, csr, lambda old: value)


@insn("csrrs", "csr rs1 010 rd 1110011")
def csrrs(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    if rs1 == 0:
        _access(h, rd, csr, None)
    else:
        value = h.x[rs1]
        _access(h, rd, csr, lambda old: old | value)


@insn("csrrc", "csr rs1 011 rd 1110011")
def csrrc(h: Hart, rd: Reg, rs1: Reg, csr: Value) -> None:
    if rs1 == 0:
        _access(h, rd, csr, None)
    else:
        value = h.x[rs1]
        _access(h, rd, csr, lambda old: old & ~value)


@insn("csrrwi", "csr zimm 101 rd 1110011")
def csrrwi(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    _access(h, rd, csr, lambda old: zimm)


@insn("csrrsi", "csr zimm 110 rd 1110011")
def csrrsi(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    if zimm == 0:
        _access(h, rd, csr, None)
    else:
        _access(h, rd, csr, lambda old: old | zimm)


@insn("csrrci", "csr zimm 111 rd 1110011")
def csrrci(h: Hart, rd: Reg, zimm: Value, csr: Value) -> None:
    if zimm == 0:
        _access(h, rd, csr, None)
    else:
        _access(h, rd, csr, lambda old: old & ~zimm)
