"""Locks on image files that QEMU's tools respect and take themselves: one writer, or many readers.

QEMU's file driver locks single bytes of the file by open file description (fcntl(2), F_OFD_SETLK): byte 100 + i says
"I use permission i", byte 200 + i "nobody else may". All locks are shared ones, so that taking them cannot fail; whoever
took his looks then whether somebody's say that he may not.
"""

from __future__ import annotations

import errno
import fcntl
import struct

_OFD_GETLK, _OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hh4xqqi4x")
_USE, _DENY = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
"""Permissions of QEMU's block layer, by bit."""
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_byte(fd: int, kind: int, byte: int) -> None:
    """`kind`: fcntl.F_RDLCK and so on; for as long as the open file lives. OSError."""
    fcntl.fcntl(fd, _OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))


def others_have(fd: int, byte: int) -> bool:
    """Whether another open file has any lock on it."""
    found = fcntl.fcntl(fd, _OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)


def take(fd: int, write: bool) -> bool:
    """Lock an open file for writing or for reading; False if others use it in a way that excludes this. Idempotent. A file
    system without locks: True."""
    uses = (_READ, _WRITE, _RESIZE) if write else (_READ,)
    denies = (_WRITE, _RESIZE)
    try:
        for bit in uses:
            lock_byte(fd, fcntl.F_RDLCK, _USE + bit)
        for bit in denies:
            lock_byte(fd, fcntl.F_RDLCK, _DENY + bit)
        against = [_DENY + bit for bit in uses] + [_USE + bit for bit in denies]
        free = not any(others_have(fd, byte) for byte in against)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return True
    if not free:
        release(fd)
    return free


def release(fd: int) -> None:
    """Let go of everything. Idempotent."""
    try:
        fcntl.fcntl(fd, _OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, 0, _USE, 200, 0))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
