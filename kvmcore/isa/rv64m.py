"""M: multiplication and division (Unprivileged ISA, chapter 13)."""

from __future__ import annotations

from collections.abc import Callable

from kvmcore.ir.value import Value, const
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg


@insn("mul", "0000001 rs2 rs1 000 rd 0110011")
def mul(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] * h.x[rs2]


@insn("mulh", "0000001 rs2 rs1 001 rd 0110011")
def mulh(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = ((h.x[rs1].sext(128) * h.x[rs2].sext(128)) >> 64).trunc(64)


@insn("mulhsu", "0000001 rs2 rs1 010 rd 0110011")
def mulhsu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = ((h.x[rs1].sext(128) * h.x[rs2].zext(128)) >> 64).trunc(64)


@insn("mulhu", "0000001 rs2 rs1 011 rd 0110011")
def mulhu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = ((h.x[rs1].zext(128) * h.x[rs2].zext(128)) >> 64).trunc(64)


def _signed(
    a: Value, b: Value, operation: Callable[[Value, Value], Value], by_zero: Value, over: Value
) -> Value:
    """13.2, table 11: the results where the quotient does not exist."""
    if b == 0:
        return by_zero
    least = const(a.width, 1 << (a.width - 1))
    if (a == least) & (b == -1):
        return over
    return operation(a, b)


@insn("div", "0000001 rs2 rs1 100 rd 0110011")
def div(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a = h.x[rs1]
    h.x[rd] = _signed(a, h.x[rs2], Value.sdiv, const(64, -1), a)


@insn("divu", "0000001 rs2 rs1 101 rd 0110011")
def divu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = const(64, -1) if b == 0 else a.udiv(b)


@insn("rem", "0000001 rs2 rs1 110 rd 0110011")
def rem(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a = h.x[rs1]
    h.x[rd] = _signed(a, h.x[rs2], Value.srem, a, const(64, 0))


@insn("remu", "0000001 rs2 rs1 111 rd 0110011")
def remu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = a if b == 0 else a.urem(b)


@insn("mulw", "0000001 rs2 rs1 000 rd 0111011")
def mulw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) * h.x[rs2].trunc(32)).sext(64)


@insn("divw", "0000001 rs2 rs1 100 rd 0111011")
def divw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a = h.x[rs1].trunc(32)
    h.x[rd] = _signed(a, h.x[rs2].trunc(32), Value.sdiv, const(32, -1), a).sext(64)


@insn("divuw", "0000001 rs2 rs1 101 rd 0111011")
def divuw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1].trunc(32), h.x[rs2].trunc(32)
    h.x[rd] = const(64, -1) if b == 0 else a.udiv(b).sext(64)


@insn("remw", "0000001 rs2 rs1 110 rd 0111011")
def remw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a = h.x[rs1].trunc(32)
    h.x[rd] = _signed(a, h.x[rs2].trunc(32), Value.srem, a, const(32, 0)).sext(64)


@insn("remuw", "0000001 rs2 rs1 111 rd 0111011")
def remuw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1].trunc(32), h.x[rs2].trunc(32)
    h.x[rd] = a.sext(64) if b == 0 else a.urem(b).sext(64)
