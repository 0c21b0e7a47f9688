"""Pairs of instructions that often follow one another: each gets a handler that does both with one jump.

Counted in a boot of Debian's kernel to a shell script (the most frequent hundred, 55 % of all steps), and a few
that compilers make everywhere. The first of a pair never branches, and neither looks at interrupts. Read by
interpreter.py, which makes the handlers, and by routines.py through @fuse, when an instruction is decoded. Adding
a pair: its line here; names are handlers' names (function and length), "rv64i." left out.
"""

from __future__ import annotations

#: First instruction -> the second ones.
_TABLE: dict[str, str] = {
    "sd.4": "sd.4 add.2 addi.2",
    "ld.2": "ld.2 add.2 addi.2 ld.4",
    "add.2": "add.2 sltu.4 bne.4 bgeu.4 slli.4 sd.4 addiw.2 lw.2 rv64m.mul.4 ld.2 addi.2 bltu.4 auipc.4",
    "sd.2": "sd.2 addi.2 sd.4",
    "srliw.4": "slliw.4 xor.4 addw.4 srliw.4",
    "addw.4": "srliw.4 addw.4 slliw.4 xor.4 or_.4 addw.2",
    "addi.2": "addi.2 sd.2 bne.4 jalr.2 bltu.4 add.2 sw.4 jal.2 beq.4",
    "ld.4": "ld.4 sub.4 add.2 ld.2 addi.2",
    "rv64m.mul.4": "add.2 rv64m.mul.4 slli.4",
    "slli.2": "add.2 add.4 srli.2",
    "or_.4": "addw.4 srliw.4 xor.4 or_.4",
    "slli.4": "srli.4 add.2 srli.2",
    "sltu.4": "add.2 srli.4",
    "addw.2": "srliw.4",
    "slliw.4": "or_.4 or_.2 xor.4 addw.4 ld.4 slliw.4",
    "addi.4": "addi.4 addi.2 add.2 beq.4",
    "xor.4": "addw.4 or_.4 xor.4 srliw.4 slliw.4",
    "auipc.4": "jalr.4 addi.4 ld.4",
    "add.4": "ld.2",
    "lw.4": "addw.2",
    "sub.4": "slli.2 sltu.4",
    "srli.2": "add.2 rv64m.mul.4 srli.2",
    "srli.4": "rv64m.mul.4 srli.2 add.2",
    "addiw.2": "slli.4 addi.2",
    "lw.2": "addi.2",
    "lbu.4": "addi.2 lbu.4",
    "sw.4": "addi.2",
    "xor.2": "addw.2",
    "or_.2": "lbu.4 lw.4",
    "andi.2": "bne.2",
    "lui.4": "addi.4 addiw.4",
    "lui.2": "addi.4 addiw.4 addi.2 addiw.2",
    "rv64d.fld.2": "rv64d.fld.2",
    "rv64d.fsd.2": "rv64d.fsd.2",
}


def _full(name: str) -> str:
    return name if name.count(".") > 1 else f"rv64i.{name}"


#: (first, second), as names of handlers.
PAIRS: tuple[tuple[str, str], ...] = tuple(
    (_full(first), _full(second)) for first, seconds in _TABLE.items() for second in seconds.split()
)
