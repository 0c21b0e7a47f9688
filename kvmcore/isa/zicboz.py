"""Zicboz: zero a cache block (Unprivileged ISA, chapter 19)."""

from __future__ import annotations

from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.zicbom import BLOCK, require_envcfg

_CBZE = 1 << 7


@insn("cbo.zero", "000000000100 rs1 010 00000 0001111")
def cbo_zero(h: Hart, rs1: Reg) -> None:
    """A store to the whole block that the address lies in; a fault names the address itself (19.3)."""
    require_envcfg(h, "zicboz", _CBZE)
    h.zero_block(h.x[rs1], BLOCK)
