"""Attaching to a VM's console: the frames that a terminal sends over console.sock, and the client's side.

To the terminal go plain bytes, scrollback first; the end of the stream means that the VM is gone. From it
come frames: kind (1 byte: 0 keys, 1 window size), length (2 bytes, little-endian), payload; a size is rows
and columns, 2 bytes each. Used by hub.py and by `softkvm console` and `run`.
"""

from __future__ import annotations

import socket
import struct

KEYS, SIZE = 0, 1
_HEADER = struct.Struct("<BH")
_SIZE = struct.Struct("<HH")
_MAX_KEYS = 0xFFFF


class FrameError(ValueError):
    """The peer does not speak this."""


def keys_frames(data: bytes) -> bytes:
    """Keys as frames."""
    parts = (data[i : i + _MAX_KEYS] for i in range(0, len(data), _MAX_KEYS))
    return b"".join(_HEADER.pack(KEYS, len(part)) + part for part in parts)


def size_frame(rows: int, columns: int) -> bytes:
    """A window size as a frame."""
    return _HEADER.pack(SIZE, _SIZE.size) + _SIZE.pack(rows & 0xFFFF, columns & 0xFFFF)


class FrameReader:
    """The VM's side: bytes in, keys and sizes out."""

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, data: bytes) -> tuple[bytes, tuple[int, int] | None]:
        """(keys, last window size or None) of what is complete now. FrameError."""
        self._buffer += data
        keys, size, at = [], None, 0
        while len(self._buffer) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._buffer, at)
            if kind not in (KEYS, SIZE) or (kind == SIZE and length != _SIZE.size):
                raise FrameError(f"frame of kind {kind}, {length} bytes")
            end = at + _HEADER.size + length
            if len(self._buffer) < end:
                break
            payload = self._buffer[at + _HEADER.size : end]
            if kind == KEYS:
                keys.append(payload)
            else:
                rows, columns = _SIZE.unpack(payload)
                size = (rows, columns)
            at = end
        self._buffer = self._buffer[at:]
        return b"".join(keys), size


class Attachment:
    """A terminal's connection to console.sock. Blocking; fileno() for select."""

    def __init__(self, path: str) -> None:
        """OSError if no VM is there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> bytes:
        """Output of the guest; b"": the VM is gone, or has dropped us."""
        try:
            return self._socket.recv(65536)
        except ConnectionError:
            return b""

    def send(self, keys: bytes) -> None:
        """Type. OSError if the VM is gone."""
        self._socket.sendall(keys_frames(keys))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the guest our window's size. OSError if the VM is gone."""
        self._socket.sendall(size_frame(rows, columns))

    def close(self) -> None:
        self._socket.close()
