"""Ethernet frames on a byte stream: a 4-byte big-endian length, then the frame.

What passt and QEMU's `-netdev stream` and `socket` speak. Pure: bytes in, frames out. Called by
qemu_user/backends/net/stream.py. A length that no frame can have raises, for there is no way back into step.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

MAX_FRAME = 65536 + 64
_LENGTH = struct.Struct(">I")


class StreamError(ValueError):
    """The peer is not speaking this framing."""


def header(length: int) -> bytes:
    """What goes before a frame of `length` bytes."""
    return _LENGTH.pack(length)


class FrameReader:
    """Cuts a stream into frames. room() says where to receive into, frames() gives what is complete."""

    def __init__(self, capacity: int = 4 * MAX_FRAME) -> None:
        self._buffer = bytearray(capacity)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def room(self) -> memoryview:
        """Free space to receive bytes into; tell received() how many came. Empty while frames() has not
        been used.
        """
        if self._start == self._end:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < MAX_FRAME and self._start:
            kept = bytes(self._view[self._start : self._end])
            self._view[: len(kept)] = kept
            self._start, self._end = 0, len(kept)
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """`count` bytes were put into room()."""
        self._end += count

    def feed(self, data: bytes) -> None:
        """Put `data` in by hand; it must fit room()."""
        self.room()[: len(data)] = data
        self.received(len(data))

    def frames(self) -> Iterator[memoryview]:
        """The complete frames, each consumed when the next one is asked for (stop early to keep the
        current one).
        """
        while self._end - self._start >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer, self._start)
            if not 0 < length <= MAX_FRAME:
                raise StreamError(f"a frame of {length} bytes")
            if self._end - self._start < 4 + length:
                return
            begin = self._start + 4
            yield self._view[begin : begin + length]
            self._start = begin + length
