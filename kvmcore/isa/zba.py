"""Zba: address generation (Unprivileged ISA, 30.1): shifted adds, and adds of zero-extended words."""

from __future__ import annotations

from kvmcore.ir.value import Value
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg


def _word(h: Hart, number: Reg) -> Value:
    return h.x[number] & 0xFFFFFFFF


@insn("add.uw", "0000100 rs2 rs1 000 rd 0111011")
def add_uw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = _word(h, rs1) + h.x[rs2]


@insn("sh1add", "0010000 rs2 rs1 010 rd 0110011")
def sh1add(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1] << 1) + h.x[rs2]


@insn("sh2add", "0010000 rs2 rs1 100 rd 0110011")
def sh2add(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1] << 2) + h.x[rs2]


@insn("sh3add", "0010000 rs2 rs1 110 rd 0110011")
def sh3add(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1] << 3) + h.x[rs2]


@insn("sh1add.uw", "0010000 rs2 rs1 010 rd 0111011")
def sh1add_uw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (_word(h, rs1) << 1) + h.x[rs2]


@insn("sh2add.uw", "0010000 rs2 rs1 100 rd 0111011")
def sh2add_uw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (_word(h, rs1) << 2) + h.x[rs2]


@insn("sh3add.uw", "0010000 rs2 rs1 110 rd 0111011")
def sh3add_uw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (_word(h, rs1) << 3) + h.x[rs2]


@insn("slli.uw", "000010 shamt[5:0] rs1 001 rd 0011011")
def slli_uw(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = _word(h, rs1) << shamt
