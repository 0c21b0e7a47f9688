"""Shorter machine code for templates: what LLVM takes longer encodings for, because an operand is a symbol to it.

It puts a symbol's number into a register with ten bytes where seven do, or where the instruction that wants it has room for it.
Only for code without jumps over places inside; register numbers and encodings as in Intel's manual, volume 2. Called by
templates.py when the image is built.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmcore.engine.link import R_8, R_32, R_32S, R_64, Relocation

_WIDE, _ROOM = 0x48, bytes(4)
_FROM_MEMORY = {0x03: 0, 0x0B: 1, 0x23: 4, 0x33: 6}
_FROM_REGISTER = {0x01: 0, 0x09: 1, 0x21: 4, 0x31: 6}
"""Opcodes of add, or, and, xor -> their number behind 0x81."""
_SHIFTS = {1: 4, 2: 7, 3: 5}
"""The prefix of shlx, sarx, shrx -> their number behind 0xC1."""
_LOAD, _STORE, _STORE_NUMBER, _ARITHMETIC, _SHIFT, _VEX, _SHIFTX = 0x8B, 0x89, 0xC7, 0x81, 0xC1, 0xC4, 0xF7


class _Edit(NamedTuple):
    """What stands from `start` to `end`, relocations included, is replaced; `relocations` are relative to `start`."""

    start: int
    end: int
    code: bytes
    relocations: list[Relocation]


def shorter(code: bytes, relocations: list[Relocation]) -> tuple[bytes, list[Relocation]]:
    """The same in fewer bytes. Symbols, but those whose names begin with "l", are numbers that fit 32 bits with their sign."""
    at = {relocation.offset: relocation for relocation in relocations}
    edits = []
    for relocation in relocations:
        if relocation.type == R_64 and not relocation.symbol.startswith("l"):
            edits.append(_number(code, relocation, at))
    if relocations and relocations[0].type == R_32 and relocations[0].offset == 1:
        edits += _shift(code, relocations[0], at)
    for edit in reversed(edits):
        inside = range(edit.start, edit.end)
        grown = len(edit.code) - len(inside)
        moved = [
            relocation if relocation.offset < edit.start else relocation._replace(offset=relocation.offset + grown)
            for relocation in relocations
            if relocation.offset not in inside
        ]
        new = [relocation._replace(offset=relocation.offset + edit.start) for relocation in edit.relocations]
        relocations = sorted(moved + new, key=lambda relocation: relocation.offset)
        code = code[: edit.start] + edit.code + code[edit.end :]
    return code, relocations


def _number(code: bytes, relocation: Relocation, at: dict[int, Relocation]) -> _Edit:
    """A number of 64 bits is put into a register, and perhaps used at once."""
    place = relocation.offset
    start, after = place - 2, place + 8
    assert code[start] & 0xFE == _WIDE, "no move"
    assert code[place - 1] & 0xF8 == 0xB8, "no move"
    register = (code[start] & 1) << 3 | code[place - 1] & 7
    immediate = relocation._replace(type=R_32S)
    move = bytes((_WIDE | register >> 3, _STORE_NUMBER, 0xC0 | register & 7)) + _ROOM
    rex, opcode, modrm, *_ = code[after : after + 3] + bytes(3)
    wide, fixed = rex & 0xF8 == _WIDE, at.get(after + 3)
    in_memory = wide and modrm & 0xC0 == 0x80 and modrm & 7 != 4 and fixed is not None
    if in_memory and opcode in _FROM_MEMORY and (rex & 4) << 1 | modrm >> 3 & 7 == register:
        assert fixed is not None
        load = bytes((rex, _LOAD, modrm)) + _ROOM
        found = [fixed._replace(offset=3), immediate._replace(offset=len(load) + 3)]
        return _Edit(start, after + 7, load + _with_number(_FROM_MEMORY[opcode], register), found)
    again = at.get(after + 7)
    if in_memory and opcode == _STORE_NUMBER and again is not None and again[2:] == relocation[2:]:
        assert fixed is not None
        save = bytes((rex | register >> 3 << 2, _STORE, modrm | (register & 7) << 3)) + _ROOM
        found = [immediate._replace(offset=3), fixed._replace(offset=len(move) + 3)]
        return _Edit(start, after + 11, move + save, found)
    other = (rex & 1) << 3 | modrm & 7
    if (
        wide and opcode in _FROM_REGISTER and modrm & 0xC0 == 0xC0 and (rex & 4) << 1 | modrm >> 3 & 7 == register
        and _only_stores(code[after + 3 :], other)
    ):  # fmt: skip
        return _Edit(start, after + 3, _with_number(_FROM_REGISTER[opcode], other), [immediate._replace(offset=3)])
    return _Edit(start, after, move, [immediate._replace(offset=3)])


def _with_number(operation: int, register: int) -> bytes:
    return bytes((_WIDE | register >> 3, _ARITHMETIC, 0xC0 | operation << 3 | register & 7)) + _ROOM


def _only_stores(rest: bytes, register: int) -> bool:
    """Whether the code ends with a store of this register, so that nobody asks for other registers or for flags."""
    if len(rest) != 7 or rest[0] & 0xF8 != _WIDE or rest[1] != _STORE:
        return False
    return rest[2] & 0xC0 == 0x80 and rest[2] & 7 != 4 and (rest[0] & 4) << 1 | rest[2] >> 3 & 7 == register


def _shift(code: bytes, relocation: Relocation, at: dict[int, Relocation]) -> list[_Edit]:
    """Code begins with a move of a shift's amount into a register: a shift by a number needs none. It changes flags."""
    if code[0] & 0xF8 != 0xB8 or code[5:6] != bytes((_VEX,)) or code[8] != _SHIFTX:
        return []
    high, low, modrm = code[6], code[7], code[9]
    wide, by = low & 0x84 == 0x80 and high & 0x1F == 2, ~low >> 3 & 15
    register, base = (~high >> 7 & 1) << 3 | modrm >> 3 & 7, ~high >> 5 & 1
    if not wide or by != code[0] & 7 or low & 3 not in _SHIFTS:
        return []
    shift = bytes((_WIDE | register >> 3, _SHIFT, 0xC0 | _SHIFTS[low & 3] << 3 | register & 7, 0))
    amount = relocation._replace(type=R_8)
    if modrm & 0xC0 == 0xC0 and base << 3 | modrm & 7 == register and _only_stores(code[10:], register):
        return [_Edit(0, 10, shift, [amount._replace(offset=3)])]
    fixed = at.get(10)
    if modrm & 0xC0 == 0x80 and modrm & 7 != 4 and fixed is not None and _only_stores(code[14:], register):
        load = bytes((_WIDE | register >> 3 << 2 | base, _LOAD, modrm)) + _ROOM
        return [_Edit(0, 14, load + shift, [fixed._replace(offset=3), amount._replace(offset=len(load) + 3)])]
    return []
