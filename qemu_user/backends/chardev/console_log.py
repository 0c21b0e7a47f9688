"""What a console has shown, in a file: kept after the VM's end, bounded. Also `logfile=` of -chardev, which is not.

A VM's log is <runtime>/logs/NAME.console with the older half in NAME.console.old. At most KEPT logs are kept, none longer than
KEPT_SECONDS. Written by hub.py and chardev.py, read by `softkvm console --log`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from qemu_user.backends.io_loop import IoLoop

LIMIT = 512 * 1024
"""Bytes of a file; a VM has two."""
KEPT = 32
KEPT_SECONDS = 7 * 24 * 3600.0
_GATHER_SECONDS = 0.05
_PENDING = 256 * 1024


class ConsoleLog:
    """Made when the first byte comes. `limit` 0: no bound. A disk that is full loses the log, not the console."""

    def __init__(self, path: str, limit: int = LIMIT, append: bool = True) -> None:
        self.path, self._limit = path, limit
        self._flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if append else os.O_TRUNC)
        self._fd = -1
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._scheduled = self._broken = False
        self._loop: IoLoop | None = None

    def start(self, loop: IoLoop) -> None:
        self._loop = loop

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Any thread."""
        with self._lock:
            self._pending += data
            full = len(self._pending) > _PENDING
            schedule = not self._scheduled and not full and self._loop is not None
            self._scheduled |= schedule
        if full:
            self.flush()
        elif schedule and self._loop is not None:
            self._loop.call_later(_GATHER_SECONDS, self.flush)

    def flush(self) -> None:
        """What waits goes to the file. Any thread."""
        with self._lock:
            self._scheduled = False
            data, self._pending = self._pending, bytearray()
            if data and not self._broken:
                try:
                    self._put(data)
                except OSError:
                    self._broken = True

    def _put(self, data: bytearray) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, self._flags, 0o600)
            self._flags &= ~os.O_TRUNC
        if self._limit and os.fstat(self._fd).st_size + len(data) > self._limit:
            os.close(self._fd)
            self._fd = -1
            os.replace(self.path, f"{self.path}.old")
            self._fd = os.open(self.path, self._flags, 0o600)
        view = memoryview(data)[-self._limit :] if self._limit else memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        """Idempotent."""
        self.flush()
        with self._lock:
            fd, self._fd = self._fd, -1
            self._broken = True
        if fd >= 0:
            os.close(fd)


def path_of(folder: Path, name: str) -> Path:
    """The log of the VM `name`, whether there is one or not."""
    return folder / f"{name}.console"


def begin(folder: Path, name: str, running: frozenset[str]) -> Path:
    """Where a VM that starts now writes: what an earlier one of its name has left is removed, and what is too old or too
    many, but for the VMs in `running`.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    mine = path_of(folder, name)
    ages = {}
    for path in folder.glob("*.console"):
        with contextlib.suppress(FileNotFoundError):
            ages[path] = path.stat().st_mtime
    others = sorted((path for path in ages if path.stem not in running and path != mine), key=ages.__getitem__, reverse=True)
    old = time.time() - KEPT_SECONDS
    for path in [mine, *others[KEPT - 1 :], *(path for path in others if ages[path] < old)]:
        for file in (path, Path(f"{path}.old")):
            file.unlink(missing_ok=True)
    return mine


class Follower:
    """Reads a log, as far as it is and as it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._open()

    def _open(self) -> None:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self._file = None

    def past(self) -> bytes | None:
        """What is there already; None when there is no log."""
        if self._file is None:
            return None
        try:
            older = Path(f"{self._path}.old").read_bytes()
        except FileNotFoundError:
            older = b""
        return older + os.read(self._file, 2 * LIMIT)

    def more(self) -> bytes:
        """What has come since the last time; b"" for nothing."""
        if self._file is None:
            self._open()
        if self._file is None:
            return b""
        data = os.read(self._file, LIMIT)
        if not data and self._replaced():
            data = os.read(self._file, LIMIT)  # written between our read and the rename
            if not data:
                self.close()
                self._open()
                return self.more() if self._file is not None else b""
        return data

    def _replaced(self) -> bool:
        assert self._file is not None
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._file)
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
