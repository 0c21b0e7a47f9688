"""A linker for one object file: sections with code and constants become one position-independent blob.

Called by build.py on what LLVM has emitted for x86-64 ELF. Only relocations relative to pc are accepted:
anything else would tie the image to an address.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_SHT_PROGBITS, _SHT_SYMTAB, _SHT_RELA, _SHT_NOBITS = 1, 2, 4, 8
_SHF_ALLOC = 2
_R_PC32, _R_PLT32 = 2, 4
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


def link(obj: bytes) -> tuple[bytes, dict[str, int]]:
    """The blob and the offsets of its functions. LinkError for undefined symbols or absolute relocations."""
    if obj[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", obj, 18)[0] != 62:
        raise LinkError("not an x86-64 object file")
    (table,) = struct.unpack_from("<Q", obj, 40)
    count, names_index = struct.unpack_from("<HH", obj, 60)
    raw = [struct.unpack_from("<IIQQQQIIQQ", obj, table + 64 * i) for i in range(count)]
    names_at = raw[names_index][4]
    sections = [_Section(_string(obj, names_at + r[0]), r[1], r[2], r[4], r[5], r[6], r[7], r[8]) for r in raw]
    blob, placed = bytearray(), {}
    loaded = [
        (index, section)
        for index, section in enumerate(sections)
        if section.flags & _SHF_ALLOC and not section.name.startswith(_DROPPED) and section.size
    ]
    loaded.sort(key=lambda item: not item[1].name.startswith(".text"))
    for index, section in loaded:
        if section.type != _SHT_PROGBITS:
            raise LinkError(f"section {section.name} is not code or constants")
        blob += bytes(-len(blob) % max(section.align, 1))
        placed[index] = len(blob)
        blob += obj[section.offset : section.offset + section.size]
    symtab = next(s for s in sections if s.type == _SHT_SYMTAB)
    strings = sections[symtab.link].offset
    symbols: list[tuple[str, int | None]] = []
    functions = {}
    for at in range(symtab.offset, symtab.offset + symtab.size, 24):
        name_at, info, _, index, value, _ = struct.unpack_from("<IBBHQQ", obj, at)
        name = _string(obj, strings + name_at)
        place = placed[index] + value if index in placed else None
        symbols.append((name, place))
        if info & 15 == 2 and place is not None:
            functions[name] = place
    for section in sections:
        if section.type != _SHT_RELA or section.info not in placed:
            continue
        for at in range(section.offset, section.offset + section.size, 24):
            offset, info, addend = struct.unpack_from("<QQq", obj, at)
            name, place = symbols[info >> 32]
            if place is None:
                raise LinkError(f"undefined: {name}")
            if info & 0xFFFFFFFF not in (_R_PC32, _R_PLT32):
                raise LinkError(f"relocation of type {info & 0xFFFFFFFF} to {name or section.name}")
            where = placed[section.info] + offset
            struct.pack_into("<i", blob, where, place + addend - where)
    return bytes(blob), functions


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
