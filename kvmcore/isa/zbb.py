"""Zbb: basic bit manipulation (Unprivileged ISA, 30.2): logic with complement, counting, extrema, extension,
rotation, bytes."""

from __future__ import annotations

from kvmcore.ir.value import Value, select
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg

# -- logic with complement -------------------------------------------------------------------------


@insn("andn", "0100000 rs2 rs1 111 rd 0110011")
def andn(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] & ~h.x[rs2]


@insn("orn", "0100000 rs2 rs1 110 rd 0110011")
def orn(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] | ~h.x[rs2]


@insn("xnor", "0100000 rs2 rs1 100 rd 0110011")
def xnor(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = ~(h.x[rs1] ^ h.x[rs2])


# -- counting: of zero all bits are leading and trailing zeros -------------------------------------


@insn("clz", "0110000 00000 rs1 001 rd 0010011")
def clz(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].clz()


@insn("clzw", "0110000 00000 rs1 001 rd 0011011")
def clzw(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(32).clz().zext(64)


@insn("ctz", "0110000 00001 rs1 001 rd 0010011")
def ctz(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].ctz()


@insn("ctzw", "0110000 00001 rs1 001 rd 0011011")
def ctzw(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(32).ctz().zext(64)


@insn("cpop", "0110000 00010 rs1 001 rd 0010011")
def cpop(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].popcount()


@insn("cpopw", "0110000 00010 rs1 001 rd 0011011")
def cpopw(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(32).popcount().zext(64)


# -- extrema ---------------------------------------------------------------------------------------


@insn("max", "0000101 rs2 rs1 110 rd 0110011")
def max_(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = select(a.slt(b), b, a)


@insn("maxu", "0000101 rs2 rs1 111 rd 0110011")
def maxu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = select(a < b, b, a)


@insn("min", "0000101 rs2 rs1 100 rd 0110011")
def min_(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = select(a.slt(b), a, b)


@insn("minu", "0000101 rs2 rs1 101 rd 0110011")
def minu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    a, b = h.x[rs1], h.x[rs2]
    h.x[rd] = select(a < b, a, b)


# -- extension -------------------------------------------------------------------------------------


@insn("sext.b", "0110000 00100 rs1 001 rd 0010011")
def sext_b(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(8).sext(64)


@insn("sext.h", "0110000 00101 rs1 001 rd 0010011")
def sext_h(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(16).sext(64)


@insn("zext.h", "0000100 00000 rs1 100 rd 0111011")
def zext_h(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1] & 0xFFFF


# -- rotation --------------------------------------------------------------------------------------


def _left(a: Value, amount: Value) -> Value:
    """a rotated left by amount modulo its width."""
    mask = a.width - 1
    return (a << (amount & mask)) | (a >> (-amount & mask))


@insn("rol", "0110000 rs2 rs1 001 rd 0110011")
def rol(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = _left(h.x[rs1], h.x[rs2])


@insn("rolw", "0110000 rs2 rs1 001 rd 0111011")
def rolw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = _left(h.x[rs1].trunc(32), h.x[rs2].trunc(32)).sext(64)


@insn("ror", "0110000 rs2 rs1 101 rd 0110011")
def ror(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = _left(h.x[rs1], -h.x[rs2])


@insn("rori", "011000 shamt[5:0] rs1 101 rd 0010011")
def rori(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = _left(h.x[rs1], -shamt)


@insn("roriw", "0110000 shamt[4:0] rs1 101 rd 0011011")
def roriw(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = _left(h.x[rs1].trunc(32), -shamt.trunc(32)).sext(64)


@insn("rorw", "0110000 rs2 rs1 101 rd 0111011")
def rorw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = _left(h.x[rs1].trunc(32), -h.x[rs2].trunc(32)).sext(64)


# -- bytes -----------------------------------------------------------------------------------------

_LOW_BITS = 0x0101010101010101


@insn("orc.b", "001010000111 rs1 101 rd 0010011")
def orc_b(h: Hart, rd: Reg, rs1: Reg) -> None:
    """Each byte that is not 0 becomes 0xff. All bits of a byte are gathered in its lowest one."""
    a = h.x[rs1]
    a = a | ((a >> 4) & (0x0F * _LOW_BITS))
    a = a | ((a >> 2) & (0x3F * _LOW_BITS))
    a = (a | ((a >> 1) & (0x7F * _LOW_BITS))) & _LOW_BITS
    h.x[rd] = (a << 8) - a


@insn("rev8", "011010111000 rs1 101 rd 0010011")
def rev8(h: Hart, rd: Reg, rs1: Reg) -> None:
    h.x[rd] = h.x[rs1].bswap()
