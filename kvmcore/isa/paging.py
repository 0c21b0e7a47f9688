"""Address translation: the Sv39, Sv48 and Sv57 walk (Privileged ISA, 12.3 to 12.5), written once.

Called by the engines for each access kind when their caches do not know a translation. Accessed and dirty
bits are updated by hardware (Svadu), by compare-and-swap. Never caches anything itself.
"""

from __future__ import annotations

from kvmcore.ir.value import Value, u64
from kvmcore.isa import traps
from kvmcore.isa.hart import Hart
from kvmcore.isa.traps import Trap

V, R, W, X, U, G, A, D = (1 << bit for bit in range(8))
#: Bits 63..54 are reserved without Svnapot and Svpbmt.
RESERVED = 0x3FF << 54
BARE, SV39, SV48, SV57 = 0, 8, 9, 10
#: satp.MODE -> number of levels.
LEVELS = {SV39: 3, SV48: 4, SV57: 5}
#: What stands for the leaf entry when there is no translation: everything is allowed.
BARE_PTE = V | R | W | X | A | D

PAGE_FAULTS = {
    "fetch": traps.INSTRUCTION_PAGE_FAULT,
    "load": traps.LOAD_PAGE_FAULT,
    "store": traps.STORE_PAGE_FAULT,
}


def pte_writable(pte: Value) -> Value:
    """1-bit Value: a store through this leaf entry needs no walk of its own."""
    return (pte & (W | D)) == (W | D)


def translate(h: Hart, va: Value, access: str) -> tuple[Value, Value, Value]:
    """Guest-physical address of `va` for "fetch", "load" or "store", the leaf entry and its level.

    Raises Trap: a page fault of the access, or its access fault where a page table is in no memory.
    """
    satp = h.get("satp")
    mode = satp >> 60
    if mode == BARE:
        return va, u64(BARE_PTE), u64(0)
    for number, levels in LEVELS.items():
        if mode == number:
            return _walk(h, va, access, satp, levels)
    return va, u64(BARE_PTE), u64(0)  # cannot be: writes of other modes to satp are ignored


def _walk(h: Hart, va: Value, access: str, satp: Value, levels: int) -> tuple[Value, Value, Value]:
    fault = Trap(PAGE_FAULTS[access], va)
    bits = 12 + 9 * levels
    if (va << (64 - bits)).sar(64 - bits) != va:
        raise fault
    table = (satp & ((1 << 44) - 1)) << 12
    for level in reversed(range(levels)):
        shift = 12 + 9 * level
        at = table + (((va >> shift) & 511) << 3)
        pte = h.load_physical(at)
        if ((pte & V) == 0) | ((pte & (R | W)) == W) | ((pte & RESERVED) != 0):
            raise fault
        if (pte & (R | X)) != 0:
            return _leaf(h, va, access, at, pte, level)
        if (pte & (U | A | D)) != 0:  # reserved in pointers to the next level
            raise fault
        table = (pte >> 10) << 12
    raise fault


def _leaf(h: Hart, va: Value, access: str, at: Value, pte: Value, level: int) -> tuple[Value, Value, Value]:
    """12.3.2 steps 5 to 9."""
    fault = Trap(PAGE_FAULTS[access], va)
    offset_mask = (1 << (12 + 9 * level)) - 1
    ppn = (pte >> 10) << 12
    if level and (ppn & (offset_mask & ~4095)) != 0:
        raise fault
    user = h.get("mode") == 0
    owned = (pte & U) != 0
    if access == "fetch":
        allowed = ((pte & X) != 0) & (user == owned)
    else:
        right = (pte & W) != 0
        if access == "load":
            right = ((pte & R) != 0) | ((h.get("mxr") != 0) & ((pte & X) != 0))
        allowed = right & ((user == owned) | (~user & (h.get("sum") != 0)))
    if ~allowed:
        raise fault
    wanted = A | D if access == "store" else A
    if (pte & wanted) != wanted:
        if ~h.enabled("svadu"):
            raise fault
        if ~h.cas_physical(at, pte, pte | wanted):
            raise Retry
        pte = pte | wanted
    return ppn | (va & offset_mask), pte, u64(level)


class Retry(Exception):
    """Another hart changed the entry meanwhile: the walk begins again."""
