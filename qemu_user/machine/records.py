"""Named records in shared memory, each replaced as a whole: what they say survives kill -9 of who writes them.

A sealed memfd: a directory, written once, then the records and plain areas that it names. A record has two buffers; the
one that its sequence number's lowest bit names counts, and the other one is filled before the number moves. One writer
per record at a time. Used by keeper.py.
"""

from __future__ import annotations

import msgspec

from protocol.channel.shared_memory import PAGE, Mapping, create_memfd

_DIRECTORY = 64 << 10
_LENGTH = 4


class RecordError(ValueError):
    """There is no room, no such record, or the memory is no set of records."""


class Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Offsets and sizes in bytes."""

    version: int = 1
    records: dict[str, tuple[int, int]]
    """(offset, capacity of a buffer)."""
    areas: dict[str, tuple[int, int]]
    """(offset, size)."""


class Records:
    """A set of records, mapped. `fd` is ours until close()."""

    def __init__(self, fd: int, size: int) -> None:
        """Of a memfd that has a directory. RecordError."""
        self.fd = fd
        self._mapping = Mapping([(fd, 0, size)])
        self._view = self._mapping.view
        length = int.from_bytes(self._view[:_LENGTH], "little")
        try:
            self._directory = msgspec.msgpack.decode(self._view[_LENGTH : _LENGTH + length], type=Directory)
        except msgspec.MsgspecError as error:
            raise RecordError(f"these are no records: {error}") from error
        if self._directory.version != 1:
            raise RecordError(f"records of version {self._directory.version}, this program knows 1")

    @classmethod
    def make(cls, records: dict[str, int], areas: dict[str, int]) -> Records:
        """New ones: name -> most bytes of a record, name -> bytes of an area. Memory is taken as it is used."""
        at = _DIRECTORY
        placed: dict[str, tuple[int, int]] = {}
        for name, capacity in records.items():
            capacity = -(-capacity // PAGE) * PAGE
            placed[name] = at, capacity
            at += PAGE + 2 * capacity
        plain: dict[str, tuple[int, int]] = {}
        for name, size in areas.items():
            plain[name] = at, size
            at += -(-size // 64) * 64
        directory = msgspec.msgpack.encode(Directory(records=placed, areas=plain))
        if len(directory) > _DIRECTORY - _LENGTH:
            raise RecordError("too many records")
        size = -(-at // PAGE) * PAGE
        fd = create_memfd("device-state", size)
        mapping = Mapping([(fd, 0, size)])
        mapping.view[: _LENGTH + len(directory)] = len(directory).to_bytes(_LENGTH, "little") + directory
        return cls(fd, size)

    def write(self, name: str, data: bytes) -> None:
        """Replace a record. RecordError when it is longer than its room: the old one stays."""
        at, capacity = self._directory.records[name]
        if len(data) + _LENGTH > capacity:
            raise RecordError(f"record {name}: {len(data)} bytes, there is room for {capacity - _LENGTH}")
        number = self._view[at : at + 8].cast("Q")
        following = number[0] + 1
        buffer = at + PAGE + (following & 1) * capacity
        self._view[buffer : buffer + _LENGTH + len(data)] = len(data).to_bytes(_LENGTH, "little") + data
        number[0] = following  # x86 keeps stores in order, and so does CPython

    def read(self, name: str) -> bytes:
        """What it says; b"" if nothing was ever written. RecordError: there is none of that name."""
        if name not in self._directory.records:
            raise RecordError(f"there is no record {name}")
        at, capacity = self._directory.records[name]
        number = int(self._view[at : at + 8].cast("Q")[0])
        if not number:
            return b""
        buffer = at + PAGE + (number & 1) * capacity
        length = min(int.from_bytes(self._view[buffer : buffer + _LENGTH], "little"), capacity - _LENGTH)
        return bytes(self._view[buffer + _LENGTH : buffer + _LENGTH + length])

    def area(self, name: str) -> memoryview:
        """Plain shared bytes. RecordError: there are none of that name."""
        if name not in self._directory.areas:
            raise RecordError(f"there is no area {name}")
        at, size = self._directory.areas[name]
        return self._view[at : at + size]
