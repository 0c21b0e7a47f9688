"""A linker for one object file: sections with code and constants become one position-independent blob.

Called by build.py on what LLVM has emitted for x86-64 ELF. In a blob only relocations relative to pc are accepted:
anything else would tie the image to an address. Templates (templates.py) are taken out one by one, with their relocations.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

_SHT_PROGBITS, _SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 1, 2, 4, 8
_SHF_ALLOC = 2
R_64, R_PC32, R_PLT32, R_32, R_32S, R_8 = 1, 2, 4, 10, 11, 14
_STT_FUNC = 2
#: Sections that are of no use to code that never unwinds.
_DROPPED = (".eh_frame", ".note", ".comment")


class LinkError(Exception):
    """The object file is not what this linker is for."""


class _Section(NamedTuple):
    name: str
    type: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class _Symbol(NamedTuple):
    name: str
    type: int
    section: int
    value: int
    size: int


class Relocation(NamedTuple):
    """A place of a section (or function) that depends on where `symbol` is; type: R_*."""

    offset: int
    type: int
    symbol: str
    addend: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A function's code and what has to be put into it."""

    code: bytes
    relocations: list[Relocation]


class _Object:
    """What is in an object file."""

    def __init__(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != 62:
            raise LinkError("not an x86-64 object file")
        self.data = data
        (table,) = struct.unpack_from("<Q", data, 40)
        count, names_index = struct.unpack_from("<HH", data, 60)
        raw = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
        names_at = raw[names_index][4]
        self.sections = [_Section(_string(data, names_at + r[0]), r[1], r[2], r[4], r[5], r[6], r[7], r[8]) for r in raw]
        symtab = next(s for s in self.sections if s.type == _SHT_SYMTAB)
        strings = self.sections[symtab.link].offset
        self.symbols = []
        for at in range(symtab.offset, symtab.offset + symtab.size, 24):
            name_at, info, _, index, value, size = struct.unpack_from("<IBBHQQ", data, at)
            self.symbols.append(_Symbol(_string(data, strings + name_at), info & 15, index, value, size))

    def relocations(self, section: int) -> list[tuple[int, int, _Symbol, int]]:
        """(offset, type, symbol, addend) in a section."""
        found = []
        for table in self.sections:
            if table.type == _SHT_RELA and table.info == section:
                for at in range(table.offset, table.offset + table.size, 24):
                    offset, info, addend = struct.unpack_from("<QQq", self.data, at)
                    found.append((offset, info & 0xFFFFFFFF, self.symbols[info >> 32], addend))
        return found


def link(*objects: bytes) -> tuple[bytes, dict[str, int]]:
    """The blob and the offsets of its functions, which may need one another. LinkError for undefined symbols or absolute
    relocations."""
    read = [_Object(obj) for obj in objects]
    blob, placed = bytearray(), {}
    loaded = [
        (number, index, section)
        for number, obj in enumerate(read)
        for index, section in enumerate(obj.sections)
        if section.flags & _SHF_ALLOC and not section.name.startswith(_DROPPED) and section.size
    ]
    loaded.sort(key=lambda item: not item[2].name.startswith(".text"))
    for number, index, section in loaded:
        if section.type != _SHT_PROGBITS:
            raise LinkError(f"section {section.name} is not code or constants")
        blob += bytes(-len(blob) % max(section.align, 1))
        placed[number, index] = len(blob)
        blob += objects[number][section.offset : section.offset + section.size]
    functions = {
        symbol.name: placed[number, symbol.section] + symbol.value
        for number, obj in enumerate(read)
        for symbol in obj.symbols
        if symbol.type == _STT_FUNC and (number, symbol.section) in placed
    }
    for number, index, section in loaded:
        for offset, kind, symbol, addend in read[number].relocations(index):
            if (number, symbol.section) in placed:
                target = placed[number, symbol.section] + symbol.value
            elif symbol.section == 0 and symbol.name in functions:  # another object has it
                target = functions[symbol.name]
            else:
                raise LinkError(f"undefined: {symbol.name}")
            if kind not in (R_PC32, R_PLT32):
                raise LinkError(f"relocation of type {kind} to {symbol.name or section.name}")
            where = placed[number, index] + offset
            struct.pack_into("<i", blob, where, target + addend - where)
    return bytes(blob), functions


def pieces(obj: bytes) -> dict[str, Piece]:
    """The functions of an object that is not linked as a whole, by name. LinkError: one needs a nameless part of it."""
    read = _Object(obj)
    found = {}
    for index, section in enumerate(read.sections):
        inside = sorted(read.relocations(index), key=lambda relocation: relocation[0])
        for symbol in read.symbols:
            if symbol.type != _STT_FUNC or symbol.section != index:
                continue
            start, end = symbol.value, symbol.value + symbol.size
            relocations = []
            for offset, kind, target, addend in inside:
                if start <= offset < end:
                    if not target.name:
                        raise LinkError(f"{symbol.name} needs {read.sections[target.section].name}")
                    relocations.append(Relocation(offset - start, kind, target.name, addend))
            found[symbol.name] = Piece(obj[section.offset + start : section.offset + end], relocations)
    return found


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
