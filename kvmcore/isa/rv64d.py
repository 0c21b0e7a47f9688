"""D: double-precision loads, stores and moves (Unprivileged ISA, chapter 21)."""

from __future__ import annotations

from kvmcore.ir.value import Value
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import illegal_instruction


def require_fp(h: Hart) -> None:
    """20.2: sstatus.FS is not Off."""
    if h.get("fs") == 0:
        raise illegal_instruction()


@insn("fld", "imm[11:0] rs1 011 rd 0000111")
def fld(h: Hart, frd: Reg, rs1: Reg, imm: Value) -> None:
    require_fp(h)
    h.f[frd] = h.load(h.x[rs1] + imm, 8)
    h.set("fs", 3)


@insn("fsd", "imm[11:5] rs2 rs1 011 imm[4:0] 0100111")
def fsd(h: Hart, rs1: Reg, frs2: Reg, imm: Value) -> None:
    require_fp(h)
    h.store(h.x[rs1] + imm, h.f[frs2])
