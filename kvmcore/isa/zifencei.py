"""Zifencei: the instruction-fetch fence (Unprivileged ISA, chapter 5)."""

from __future__ import annotations

from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart


@insn("fence.i", "imm[11:0] rs1 001 rd 0001111")
def fence_i(h: Hart) -> None:
    """5.1: the other fields are reserved and ignored."""
    h.fence_i()
