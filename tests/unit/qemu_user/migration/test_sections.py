"""The container of saved state: round trips, and every damaged or hostile one refused with a SectionError."""

from __future__ import annotations

import random
import struct
import zlib

import pytest

from qemu_user.migration import sections
from qemu_user.migration.sections import Section, SectionError

SOME = [
    Section("config", 1, b"x" * 5000),
    Section("vcpu/0", 7, random.Random(1).randbytes(3000)),
    Section("empty", 2, b""),
]


def test_round_trip() -> None:
    found = sections.decode(sections.encode(SOME))
    assert list(found.values()) == SOME
    assert sections.decode(sections.encode([])) == {}


def test_every_cut_and_every_flipped_byte_is_noticed() -> None:
    data = sections.encode(SOME)
    for end in range(0, len(data), 13):
        with pytest.raises(SectionError):
            sections.decode(data[:end])
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        with pytest.raises(SectionError):
            sections.decode(bytes(damaged))
    with pytest.raises(SectionError, match="behind"):
        sections.decode(data + b"\0")


def test_names_are_unique_both_ways() -> None:
    with pytest.raises(SectionError):
        sections.encode([SOME[0], SOME[0]])
    one = sections.encode([SOME[0]])
    head = struct.pack("<8sHHI", sections.MAGIC, sections.FORMAT, 0, 2)
    body = one[len(head) + 4 :]
    with pytest.raises(SectionError, match="twice"):
        sections.decode(head + struct.pack("<I", zlib.crc32(head)) + body + body)


def test_sizes_are_believed_only_as_far_as_they_are_true() -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = zstandard.ZstdCompressor().compress(bytes(100 << 20))

    def forged(plain: int, flags: int = 1) -> bytes:
        head = struct.pack("<8sHHI", sections.MAGIC, sections.FORMAT, 0, 1)
        body = struct.pack("<HHB3xII", 1, 1, flags, len(bomb), plain) + b"n" + bomb
        return head + struct.pack("<I", zlib.crc32(head)) + body + struct.pack("<I", zlib.crc32(body))

    for data in (forged(1000), forged(sections.MAX_SECTION), forged(1 << 31), forged(1000, flags=9)):
        with pytest.raises(SectionError):
            sections.decode(data)


def test_newer_formats_are_named() -> None:
    head = struct.pack("<8sHHI", sections.MAGIC, 9, 0, 0)
    with pytest.raises(SectionError, match="format 9"):
        sections.decode(head + struct.pack("<I", zlib.crc32(head)))
