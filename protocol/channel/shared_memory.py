"""Sealed memfds and mappings of them.

Called by kvmcore (guest memory, run pages) and by protocol.client (its view of the same pages). Everything shared
is a memfd: nothing has a name in the file system, so nothing can be left behind. Must never map a descriptor
of a stranger without looking at its seals first: a truncated file is SIGBUS for all who map it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from errno import EINVAL

PAGE = 4096
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
#: A file with these can neither shrink nor grow, and the seals cannot be changed.
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def create_memfd(name: str, size: int, *, sealed: bool = True) -> int:
    """A new memfd of `size` zero bytes (close-on-exec), sealed against shrinking and growing. `name` is for /proc."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_sealed(fd: int) -> bool:
    """True if the size of this file can no longer change. False for files that know no seals."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SIZE_SEALS == SIZE_SEALS
    except OSError:
        return False


def _map(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
    result = _mmap(address, size, prot, flags, fd, offset)
    if result is None or result == _MAP_FAILED:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return int(result)


class Mapping:
    """Files mapped one behind the other into one stretch of this process: `address`, `size`, `view`.

    `view` is a memoryview of unsigned bytes, read-only if the mapping is. The memory goes back with close() (the
    caller promises that no view is used afterwards) or with the object.
    """

    def __init__(
        self, pieces: list[tuple[int, int, int]], prot: int = PROT_READ | PROT_WRITE, *, private: bool = False
    ) -> None:
        """`pieces`: (fd, file offset, bytes), each page aligned. The descriptors are not kept. `private`: writes
        stay here.
        """
        size = sum(length for _, _, length in pieces)
        if size <= 0 or any(offset % PAGE or length % PAGE for _, offset, length in pieces):
            raise OSError(EINVAL, "mappings are page aligned and not empty")
        self.size = size
        self.prot = prot
        self.address = _map(None, size, 0, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        self._open = True
        at = self.address
        try:
            for fd, offset, length in pieces:
                _map(at, length, prot, (MAP_PRIVATE if private else MAP_SHARED) | MAP_FIXED, fd, offset)
                at += length
        except OSError:
            self.close()
            raise
        array = (ctypes.c_ubyte * size).from_address(self.address)
        array.mapping = self  # type: ignore[attr-defined]  # a view keeps the memory it looks at
        view = memoryview(array).cast("B")
        self.view = view if prot & PROT_WRITE else view.toreadonly()

    def close(self) -> None:
        """Unmap. Idempotent."""
        if self._open:
            self._open = False
            _munmap(self.address, self.size)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()
