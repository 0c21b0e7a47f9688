"""Zicbom: cache-block management (Unprivileged ISA, chapter 19).

There are no caches that a guest could see stale: what is left of these instructions is their checks.
"""

from __future__ import annotations

from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import illegal_instruction

#: Bytes of a cache block.
BLOCK = 64
_CBIE, _CBCFE = 3 << 4, 1 << 6


def require_envcfg(h: Hart, extension: str, bits: int) -> None:
    """19.4: the extension is on, and for U-mode one of these bits of senvcfg is set."""
    if ~h.enabled(extension):
        raise illegal_instruction()
    if h.get("mode") == 0 and (h.get("senvcfg") & bits) == 0:
        raise illegal_instruction()


@insn("cbo.inval", "000000000000 rs1 010 00000 0001111")
def cbo_inval(h: Hart, rs1: Reg) -> None:
    """Whether CBIE asks for an invalidate or a flush makes no difference."""
    require_envcfg(h, "zicbom", _CBIE)
    h.check_block(h.x[rs1])


@insn("cbo.clean", "000000000001 rs1 010 00000 0001111")
def cbo_clean(h: Hart, rs1: Reg) -> None:
    require_envcfg(h, "zicbom", _CBCFE)
    h.check_block(h.x[rs1])


@insn("cbo.flush", "000000000010 rs1 010 00000 0001111")
def cbo_flush(h: Hart, rs1: Reg) -> None:
    require_envcfg(h, "zicbom", _CBCFE)
    h.check_block(h.x[rs1])
