"""D: double-precision floating point (Unprivileged ISA, chapter 21): loads, stores, conversions.

What both formats have comes from rv64f.arithmetic.
"""

from __future__ import annotations

from kvmcore.ir.value import Value
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.rv64f import DOUBLE, SINGLE, arithmetic, read, require_fp, require_rounding, write

ALIASES = arithmetic(DOUBLE, "rv64d")


@insn("fld", "imm[11:0] rs1 011 rd 0000111")
def fld(h: Hart, frd: Reg, rs1: Reg, imm: Value) -> None:
    require_fp(h)
    write(h, DOUBLE, frd, h.load(h.x[rs1] + imm, 8))


@insn("fsd", "imm[11:5] rs2 rs1 011 imm[4:0] 0100111")
def fsd(h: Hart, rs1: Reg, frs2: Reg, imm: Value) -> None:
    require_fp(h)
    h.store(h.x[rs1] + imm, h.f[frs2])


@insn("fcvt.s.d", "0100000 00001 rs1 rm rd 1010011")
def fcvt_s_d(h: Hart, frd: Reg, frs1: Reg, rm: Value) -> None:
    require_fp(h)
    require_rounding(h, rm)
    write(h, SINGLE, frd, h.fp("f64.to_f32", (read(h, DOUBLE, frs1),), rm))


@insn("fcvt.d.s", "0100001 00000 rs1 rm rd 1010011")
def fcvt_d_s(h: Hart, frd: Reg, frs1: Reg, rm: Value) -> None:
    """Exact, but rm is checked all the same."""
    require_fp(h)
    require_rounding(h, rm)
    write(h, DOUBLE, frd, h.fp("f32.to_f64", (read(h, SINGLE, frs1),)))
