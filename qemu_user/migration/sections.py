"""The container of saved state: named, versioned, checksummed sections. Bytes in, sections out; no I/O.

What a snapshot's `state` file and a migration's STATE message hold. Layout, all little endian:

    header    "SKVMSTAT", u16 format, u16 0, u32 number of sections, u32 CRC-32 of these 16 bytes
    section   u16 length of name, u16 version, u8 flags (1: zstd), u8[3] 0, u32 stored bytes, u32 plain bytes,
              name, payload, u32 CRC-32 of all of the section before it

Every byte is hostile: lengths are checked before anything is allocated, and whatever does not fit is a SectionError.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

try:
    import zstandard
except ImportError:  # sections are then stored plain, and compressed ones refused by name
    zstandard = None  # type: ignore[assignment]

MAGIC = b"SKVMSTAT"
FORMAT = 1
MAX_SECTIONS = 4096
MAX_SECTION = 64 << 20
"""Bytes of one section, stored or plain."""
_HEADER = struct.Struct("<8sHHI")
_SECTION = struct.Struct("<HHB3xII")
_CRC = struct.Struct("<I")
_ZSTD = 1
_WORTH_COMPRESSING = 512


class SectionError(ValueError):
    """Bytes that are no sections of ours, or not intact; the text says what is wrong where."""


class Section(NamedTuple):
    """One part of a machine's state."""

    name: str
    """Unique in its container: "config", "vcpu/0", "device/uart"."""
    version: int
    payload: bytes


def encode(sections: Iterable[Section], pack: bool = True) -> bytes:
    """A container. Names must be unique; payloads above MAX_SECTION are the caller's fault (SectionError). Not `pack`: it
    goes no farther than this machine, and is read at once."""
    parts = list(sections)
    if len({part.name for part in parts}) != len(parts) or len(parts) > MAX_SECTIONS:
        raise SectionError("two sections of one name, or too many")
    head = _HEADER.pack(MAGIC, FORMAT, 0, len(parts))
    return b"".join([head, _CRC.pack(zlib.crc32(head)), *(piece for part in parts for piece in _encode(part, pack))])


def _encode(section: Section, pack: bool) -> list[bytes]:
    """Its pieces: a payload, which may be large, is copied once only."""
    if len(section.payload) > MAX_SECTION:
        raise SectionError(f"section {section.name}: {len(section.payload)} bytes are too many")
    name, payload, flags = section.name.encode(), section.payload, 0
    if pack and zstandard is not None and len(payload) >= _WORTH_COMPRESSING:
        packed = zstandard.ZstdCompressor(level=1).compress(payload)
        if len(packed) < len(payload):
            payload, flags = packed, _ZSTD
    head = _SECTION.pack(len(name), section.version, flags, len(payload), len(section.payload))
    return [head, name, payload, _CRC.pack(zlib.crc32(payload, zlib.crc32(head + name)))]


def decode(data: bytes) -> dict[str, Section]:
    """The sections by name. SectionError."""
    view = memoryview(data)
    if len(view) < _HEADER.size + _CRC.size:
        raise SectionError("too short for a header")
    magic, version, reserved, count = _HEADER.unpack_from(view)
    if magic != MAGIC:
        raise SectionError("this is no saved state of ours (wrong magic)")
    _check(view, 0, _HEADER.size, "header")
    if version != FORMAT or reserved:
        raise SectionError(f"format {version}: this version of softkvm reads format {FORMAT}")
    if count > MAX_SECTIONS:
        raise SectionError(f"{count} sections are too many")
    found: dict[str, Section] = {}
    at = _HEADER.size + _CRC.size
    for index in range(count):
        section, at = _decode(view, at, f"section {index}")
        if section.name in found:
            raise SectionError(f"section {section.name} comes twice")
        found[section.name] = section
    if at != len(view):
        raise SectionError(f"{len(view) - at} bytes behind the last section")
    return found


def _decode(view: memoryview, at: int, what: str) -> tuple[Section, int]:
    if len(view) - at < _SECTION.size:
        raise SectionError(f"{what}: cut off")
    name_size, version, flags, stored, plain = _SECTION.unpack_from(view, at)
    if stored > MAX_SECTION or plain > MAX_SECTION:
        raise SectionError(f"{what}: too long")
    body = at + _SECTION.size + name_size
    end = body + stored
    if end + _CRC.size > len(view):
        raise SectionError(f"{what}: cut off")
    _check(view, at, end, what)
    try:
        name = str(view[at + _SECTION.size : body], "utf-8")
    except UnicodeDecodeError as error:
        raise SectionError(f"{what}: its name is no text") from error
    payload = bytes(view[body:end])
    if flags == _ZSTD:
        payload = _decompress(payload, plain, name)
    elif flags:
        raise SectionError(f"section {name}: unknown flags {flags:#x}")
    if len(payload) != plain:
        raise SectionError(f"section {name}: {len(payload)} bytes, {plain} announced")
    return Section(name, version, payload), end + _CRC.size


def _decompress(payload: bytes, plain: int, name: str) -> bytes:
    if zstandard is None:
        raise SectionError(f"section {name} is compressed; install zstandard to read it")
    try:
        # Read as far as was announced and a byte more: a small payload must not unpack into gigabytes.
        with zstandard.ZstdDecompressor().stream_reader(payload) as reader:
            return reader.read(plain + 1)
    except zstandard.ZstdError as error:
        raise SectionError(f"section {name}: {error}") from error


def _check(view: memoryview, start: int, end: int, what: str) -> None:
    if zlib.crc32(view[start:end]) != _CRC.unpack_from(view, end)[0]:
        raise SectionError(f"{what}: checksum does not match, the data is damaged")
