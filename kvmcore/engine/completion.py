"""What the instruction of an exit wants done with the answer: its destination, size and extension.

Called by Hart.complete_mmio and complete_csr. Derived from the instruction table, once for each instruction
word.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from kvmcore.isa.describe import X0_SINK, Insn
from kvmcore.isa.table import find

#: Loads and stores that devices may be accessed with: bytes, and whether the value is sign-extended.
_LOADS = {"lb": (1, True), "lh": (2, True), "lw": (4, True), "ld": (8, False),
          "lbu": (1, False), "lhu": (2, False), "lwu": (4, False)}  # fmt: skip
_STORES = frozenset({"sb", "sh", "sw", "sd"})
_U64 = (1 << 64) - 1


class Access(NamedTuple):
    """A plain load (rd, size, signed) or store (rd None) of `length` bytes of code."""

    rd: int | None
    size: int
    signed: bool
    length: int

    def extend(self, data: int) -> int:
        """What rd gets for these bytes."""
        data &= (1 << (8 * self.size)) - 1
        if self.signed and data >> (8 * self.size - 1):
            data -= 1 << (8 * self.size)
        return data & _U64


def packed(raw: int) -> int:
    """An access in one word for native code: instruction << 32, length << 16, store << 13, signed << 12, size << 8, rd."""
    access = plain_access(raw)
    store = access.rd is None
    low = access.length << 16 | store << 13 | access.signed << 12 | access.size << 8 | (access.rd or 0)
    return raw << 32 | low


@lru_cache(4096)
def _classify(raw: int) -> Access | None:
    row = find(raw)
    if row is None:
        return None
    name = row.function.__name__
    if name in _LOADS:
        size, signed = _LOADS[name]
        return Access(_operand(row, "rd", raw), size, signed, row.length)
    if name in _STORES:
        return Access(None, 0, False, row.length)
    return None


def _operand(row: Insn, name: str, raw: int) -> int:
    return next(operand for operand in row.operands if operand.name == name).decode(raw)


def is_plain(raw: int) -> bool:
    """Whether the instruction is an integer load or store."""
    return _classify(raw) is not None


def plain_access(raw: int) -> Access:
    """The access of an integer load or store. ValueError for anything else."""
    access = _classify(raw)
    if access is None:
        raise ValueError(f"{raw:#x} is no load or store")
    return access


@lru_cache(256)
def destination(raw: int) -> int:
    """Index in x[] that the instruction writes; the sink if it writes none."""
    row = find(raw)
    return _operand(row, "rd", raw) if row is not None else X0_SINK
