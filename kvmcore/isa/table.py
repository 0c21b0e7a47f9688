"""The table of all instructions: the explicit list of extensions, checked for overlap when imported.

Read by the decoder generator, the interpreter generator, the reference and the contract tests.
Adding an extension: write its file, add its module to EXTENSIONS.
"""

from __future__ import annotations

from kvmcore.isa import (
    privileged,
    rv64a,
    rv64c,
    rv64d,
    rv64f,
    rv64i,
    rv64m,
    zba,
    zbb,
    zbs,
    zicbom,
    zicboz,
    zicsr,
    zifencei,
)
from kvmcore.isa.describe import DescriptionError, Insn, rows_of

EXTENSIONS = (
    *(rv64i, rv64m, rv64a, rv64f, rv64d, rv64c),
    *(zicsr, zifencei, privileged, zba, zbb, zbs, zicbom, zicboz),
)


def _overlap(a: Insn, b: Insn) -> bool:
    """Whether a word exists that is both (exact for exclusions that the intersection fixes entirely)."""
    if a.length != b.length or (a.match ^ b.match) & a.mask & b.mask:
        return False
    mask, match = a.mask | b.mask, a.match | b.match
    return not any(m & ~mask == 0 and match & m == v for m, v in a.excluded + b.excluded)


def _check(rows: list[Insn]) -> None:
    names = [row.name for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise DescriptionError(f"{name} is described twice")
    for index, row in enumerate(rows):
        for other in rows[:index]:
            if _overlap(row, other):
                raise DescriptionError(f"the encodings of {row.name} and {other.name} overlap")


#: Every instruction, in the order of the extensions' files.
INSTRUCTIONS: list[Insn] = [row for module in EXTENSIONS for row in rows_of(vars(module))]
_check(INSTRUCTIONS)

BY_NAME: dict[str, Insn] = {row.name: row for row in INSTRUCTIONS}

_buckets: dict[int, list[Insn]] = {}
for _row in INSTRUCTIONS:
    # 32-bit: bits 6..0; 16-bit: bits 15..13 and 1..0. All rows fix those, fields never reach into them.
    _key = _row.match & 0x7F if _row.length == 4 else 0x100 | (_row.match & 0xE003)
    _buckets.setdefault(_key, []).append(_row)


def find(raw: int) -> Insn | None:
    """The instruction that a fetched word (32 bits; the upper 16 are ignored for a short one) is, if any."""
    if raw & 3 == 3:
        candidates = _buckets.get(raw & 0x7F, [])
    else:
        raw &= 0xFFFF
        candidates = _buckets.get(0x100 | (raw & 0xE003), [])
    for row in candidates:
        if row.matches(raw):
            return row
    return None
