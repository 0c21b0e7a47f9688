"""Zbs: single bits (Unprivileged ISA, 30.4): clear, extract, invert, set bit rs2 modulo 64, or bit shamt."""

from __future__ import annotations

from kvmcore.ir.value import Value, u64
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg


def _bit(number: Value) -> Value:
    return u64(1) << (number & 63)


@insn("bclr", "0100100 rs2 rs1 001 rd 0110011")
def bclr(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] & ~_bit(h.x[rs2])


@insn("bclri", "010010 shamt[5:0] rs1 001 rd 0010011")
def bclri(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1] & ~_bit(shamt)


@insn("bext", "0100100 rs2 rs1 101 rd 0110011")
def bext(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1] >> (h.x[rs2] & 63)) & 1


@insn("bexti", "010010 shamt[5:0] rs1 101 rd 0010011")
def bexti(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = (h.x[rs1] >> shamt) & 1


@insn("binv", "0110100 rs2 rs1 001 rd 0110011")
def binv(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] ^ _bit(h.x[rs2])


@insn("binvi", "011010 shamt[5:0] rs1 001 rd 0010011")
def binvi(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1] ^ _bit(shamt)


@insn("bset", "0010100 rs2 rs1 001 rd 0110011")
def bset(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] | _bit(h.x[rs2])


@insn("bseti", "001010 shamt[5:0] rs1 001 rd 0010011")
def bseti(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1] | _bit(shamt)
