"""9P2000.L messages: a reader of fields, the encoders, the numbers (Plan 9 manual, section 5; diod's protocol.md).

All integers are little-endian; a string is a 16-bit length and UTF-8 bytes (any bytes, as Linux has them).
"""

from __future__ import annotations

import os
import stat
import struct
from typing import NamedTuple

RLERROR = 7
TSTATFS, TLOPEN, TLCREATE, TSYMLINK, TMKNOD, TRENAME, TREADLINK, TGETATTR, TSETATTR = 8, 12, 14, 16, 18, 20, 22, 24, 26
TXATTRWALK, TXATTRCREATE, TREADDIR, TFSYNC, TLOCK, TGETLOCK, TLINK, TMKDIR = 30, 32, 40, 50, 52, 54, 70, 72
TRENAMEAT, TUNLINKAT, TVERSION, TAUTH, TATTACH, TFLUSH, TWALK = 74, 76, 100, 102, 104, 108, 110
TREAD, TWRITE, TCLUNK, TREMOVE = 116, 118, 120, 122
"""Requests; the reply's number is one more."""
VERSION = "9P2000.L"
NO_TAG, NO_FID = 0xFFFF, 0xFFFFFFFF
HEADER = struct.Struct("<IBH")
"""size, type, tag."""
READ_HEADER = HEADER.size + 4
_QID = struct.Struct("<BIQ")
_QID_DIR, _QID_SYMLINK, _QID_FILE = 0x80, 0x02, 0x00
GETATTR_BASIC = 0x7FF
NAME_AT_REMOVEDIR = 0x200


class BadMessage(Exception):
    """A message that ends within a field, or whose size is a lie."""


class Fields:
    """Takes fields off the front of a message's body. BadMessage when it ends."""

    def __init__(self, body: bytes) -> None:
        self._body, self._at = body, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self.data(size), "little")

    def numbers(self, *sizes: int) -> tuple[int, ...]:
        return tuple(self.number(size) for size in sizes)

    def text(self) -> str:
        return os.fsdecode(self.data(self.number(2)))

    def data(self, size: int) -> bytes:
        part = self._body[self._at : self._at + size]
        if len(part) < size:
            raise BadMessage("a message that ends within a field")
        self._at += size
        return part


class Lock(NamedTuple):
    """Tlock and Tgetlock's description of a range."""

    kind: int
    start: int
    length: int
    process: int
    client: str


def number(value: int, size: int) -> bytes:
    """An unsigned field, cut to its size."""
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def text(value: str) -> bytes:
    raw = os.fsencode(value)
    return number(len(raw), 2) + raw


def qid(status: os.stat_result) -> bytes:
    """13 bytes that name a file: its kind, a version, its inode (with the device mixed in: mounts below the root)."""
    if stat.S_ISDIR(status.st_mode):
        kind = _QID_DIR
    else:
        kind = _QID_SYMLINK if stat.S_ISLNK(status.st_mode) else _QID_FILE
    path = status.st_ino ^ (status.st_dev & 0xFFFF) << 48
    return _QID.pack(kind, status.st_mtime_ns & 0xFFFFFFFF, path & (1 << 64) - 1)


def attributes(status: os.stat_result) -> bytes:
    """Rgetattr's body; times are seconds and nanoseconds, birth time, generation and data version are unknown."""
    times: list[int] = []
    for nanoseconds in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns, 0):
        times += divmod(max(nanoseconds, 0), 1_000_000_000)
    return (
        number(GETATTR_BASIC, 8)
        + qid(status)
        + struct.pack("<III", status.st_mode, status.st_uid, status.st_gid)
        + struct.pack("<QQQQQ", status.st_nlink, status.st_rdev, status.st_size, status.st_blksize, status.st_blocks)
        + struct.pack("<8Q", *times)
        + bytes(16)
    )


def reply(kind: int, tag: int, body: bytes) -> bytes:
    """A whole message."""
    return HEADER.pack(HEADER.size + len(body), kind, tag) + body


def error(number_: int, tag: int) -> bytes:
    return reply(RLERROR, tag, number(number_, 4))
