"""What a mirror keeps beside each of its members, in `<member>.mirror`: who has everything, and which regions may differ.

Two records in turn, each with a checksum, so that a write that was cut off leaves the one before; then a byte per region, not
zero where members may differ. A member without this file, or with another mirror's, is copied as a whole.
"""

from __future__ import annotations

import os
import struct
import zlib

import msgspec

from qemu_user.backends.errors import BackendError

_MAGIC = b"SKM1"
_HEAD = struct.Struct(">4sII")
_SLOT = 4096
_MARKS_AT = 2 * _SLOT


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """`members`: name -> whether it has everything."""

    mirror: str
    generation: int
    region: int
    members: dict[str, bool]


def latest(*records: Record | None) -> Record | None:
    """The one that counts."""
    return max((record for record in records if record is not None), key=lambda record: record.generation, default=None)


class StateFile:
    """The file of one member, open for as long as the mirror is."""

    def __init__(self, path: str, regions: int, readonly: bool = False) -> None:
        """BackendError if it cannot be opened."""
        self.path, self._regions = path, regions
        try:
            flags = os.O_RDONLY if readonly else os.O_RDWR | os.O_CREAT
            self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BackendError(f"mirror: its state {path}: {error.strerror}") from error
        self.record = latest(self._read(0), self._read(1))
        self.marks = bytearray(os.pread(self._fd, regions, _MARKS_AT).ljust(regions, b"\0"))

    def _read(self, slot: int) -> Record | None:
        data = os.pread(self._fd, _SLOT, slot * _SLOT)
        if len(data) < _HEAD.size:
            return None
        magic, length, checksum = _HEAD.unpack_from(data)
        content = data[_HEAD.size : _HEAD.size + length]
        if magic != _MAGIC or len(content) != length or zlib.crc32(content) != checksum:
            return None
        try:
            return msgspec.json.decode(content, type=Record)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def write(self, record: Record) -> None:
        """The record is on the disk when this returns. OSError."""
        content = msgspec.json.encode(record)
        data = _HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content
        if len(data) > _SLOT:
            raise OSError("names of members are too long")
        os.pwrite(self._fd, data, record.generation % 2 * _SLOT)
        os.fdatasync(self._fd)
        self.record = record

    def write_marks(self, regions: list[int], value: int) -> None:
        """These regions may differ (1), or not (0): on the disk when this returns. OSError."""
        for region in regions:
            self.marks[region] = value
            os.pwrite(self._fd, bytes([value]), _MARKS_AT + region)
        os.fdatasync(self._fd)

    def resize(self, regions: int) -> None:
        """The mirror has so many regions from now on; members are alike in new ones. OSError."""
        if regions > self._regions:
            os.pwrite(self._fd, bytes(regions - self._regions), _MARKS_AT + self._regions)
        self.marks = self.marks[:regions].ljust(regions, b"\0")
        self._regions = regions

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
