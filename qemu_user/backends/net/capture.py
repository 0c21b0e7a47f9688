"""A file that frames are recorded in, for the switch's captures and for `-object filter-dump`.

Writing never blocks and never fails the network: on a full disk recording ends with a warning, and a pipe whose reader is slow
loses frames, which are counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from protocol.codec import pcap
from qemu_user.backends.errors import BackendError

_PENDING = 1 << 20
"""Bytes that wait for a slow reader of a pipe."""
DEFAULT_LONGEST = 65536


class CaptureFile:
    """`path` is made or emptied; a pipe needs its reader first. `header`: what the file begins with. BackendError."""

    def __init__(self, path: str, header: bytes, what: str) -> None:
        self.path, self._what = path, what
        self.frames = self.dropped = 0
        self.warn: Callable[[str], None] = lambda sentence: None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise BackendError(f"{what}: cannot write {path}: {error.strerror}") from error
        self._pending = bytearray(header)
        self.flush()

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def write(self, record: bytes) -> None:
        """A whole record; it is in the file after flush()."""
        if self._fd < 0:
            return
        if len(self._pending) > _PENDING:
            self.flush()
            if len(self._pending) > _PENDING:
                self.dropped += 1
                return
        self._pending += record
        self.frames += 1

    def flush(self) -> None:
        """Write out what the file takes now."""
        while self._pending and self._fd >= 0:
            try:
                done = os.write(self._fd, self._pending)
            except BlockingIOError:
                return
            except OSError as error:
                self.close()
                self.warn(f"{self._what}: recording to {self.path} has ended: {error.strerror}")
                return
            del self._pending[:done]

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            try:
                os.write(fd, self._pending)
            except OSError:
                pass
            os.close(fd)
        self._pending.clear()


def pcap_file(path: str, what: str, longest: int = DEFAULT_LONGEST) -> CaptureFile:
    """A pcap file with its header. BackendError."""
    return CaptureFile(path, pcap.pcap_header(longest), what)


def now_ns() -> int:
    """The time that records carry."""
    return time.time_ns()
