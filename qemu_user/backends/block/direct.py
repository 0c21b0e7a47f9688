"""cache=none: files past the host's page cache (O_DIRECT). What does not lie as the device wants it goes through a buffer."""

from __future__ import annotations

import errno
import mmap
import os
import threading

from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.block.views import Cutter, fill_zero

_ALIGNMENT = 4096
_ROOM = 1 << 20


class DirectImage(RawImage):
    """A BlockBackend."""

    open_flags = os.O_DIRECT

    def __init__(self, path: str, readonly: bool = False, discard: bool = True, locked: bool = True) -> None:
        super().__init__(path, readonly, discard, locked)
        self._buffer = mmap.mmap(-1, _ROOM)
        self._buffering = threading.Lock()

    def read(self, offset: int, views: list[memoryview]) -> None:
        try:
            super().read(offset, views)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._read_around(offset, views)

    @property
    def waits(self) -> bool:
        return True

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        return False

    def write(self, offset: int, views: list[memoryview]) -> None:
        try:
            super().write(offset, views)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._write_around(offset, views)

    def _span(self, offset: int, left: int) -> tuple[int, int, int]:
        """(offset, length, bytes before what is wanted) of the aligned stretch for the first piece."""
        start = offset & -_ALIGNMENT
        length = min(_ROOM, -(-(offset + left - start) // _ALIGNMENT) * _ALIGNMENT)
        return start, length, offset - start

    def _load(self, start: int, length: int) -> memoryview:
        view = memoryview(self._buffer)[:length]
        done = os.preadv(self._fd, [view], start)
        fill_zero([view[done:]])
        return view

    def _read_around(self, offset: int, views: list[memoryview]) -> None:
        cutter, left = Cutter(views), sum(map(len, views))
        while left:
            start, length, before = self._span(offset, left)
            part = min(left, length - before)
            with self._buffering, self._load(start, length) as content:
                _scatter(content[before : before + part], cutter.next(part))
            offset, left = offset + part, left - part

    def _write_around(self, offset: int, views: list[memoryview]) -> None:
        """Whole aligned stretches: what lies around in them is read before, and nobody else does so meanwhile."""
        cutter, left = Cutter(views), sum(map(len, views))
        while left:
            start, length, before = self._span(offset, left)
            part = min(left, length - before)
            with self._buffering, self._load(start, length) as content:
                at = before
                for view in cutter.next(part):
                    content[at : at + len(view)] = view
                    at += len(view)
                # sectors, not the whole stretch: those beside may be on their way from other threads
                first, last = before & -512, -(-(before + part) // 512) * 512
                self._put(start + first, content[first:last], start, content)
            offset, left = offset + part, left - part

    def _put(self, offset: int, sectors: memoryview, start: int, whole: memoryview) -> None:
        try:
            super().write(offset, [sectors])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            super().write(start, [whole])  # a device of 4096-byte sectors


def _scatter(content: memoryview, views: list[memoryview]) -> None:
    at = 0
    for view in views:
        view[:] = content[at : at + len(view)]
        at += len(view)
