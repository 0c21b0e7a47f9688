"""Which parts of a file hold data: for copies of memory (memfds), disks and snapshots."""

from __future__ import annotations

import errno
import os


def with_data(fd: int, size: int, unit: int) -> bytearray:
    """A byte per unit of a file of `size` bytes: 0 for holes, which read as zeroes and take no memory."""
    result = bytearray(-(-size // unit))
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a device or file system that cannot tell
                return bytearray(b"\1" * len(result))
            break  # nothing but holes from here on
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start >= size:
            break
        first, last = start // unit, (end - 1) // unit
        result[first : last + 1] = b"\1" * (last + 1 - first)
        at = end
    return result
