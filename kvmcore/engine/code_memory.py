"""Memory for finished code: a sealed memfd that one process writes and many map to execute, in large pages of the host.

Big programs have tens of megabytes of code of which no part is hot; in pages of 4 KiB the host would walk its page tables for
every few instructions. Shared memory gets large pages when it is asked for by MADV_COLLAPSE (Linux 6.1), whatever the host's
settings are; who maps it at an address that is a multiple of LARGE has them as well. Used by the translator.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

LARGE = 2 << 20
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE
_FIXED = 0x10  # MAP_FIXED
_COLLAPSE = 25  # MADV_COLLAPSE


class CodeMemory:
    """`size` bytes that nobody can write but by write(). `fd`: its memfd. OSError."""

    def __init__(self, name: str, size: int, large: bool = True) -> None:
        """`large`: in large pages. Who has been in one has all of it."""
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._room = mmap.mmap(-1, size + LARGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what is mapped in it goes with it
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self._address = -(-start // LARGE) * LARGE
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED
        at, length = ctypes.c_void_p(self._address), ctypes.c_size_t(size)
        if self._libc.mmap(at, length, protection, flags, self.fd, ctypes.c_long(0)) != self._address:
            raise OSError(ctypes.get_errno(), f"cannot map {size} bytes for code")
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _FUTURE_WRITE)
        self._size, self._large, self._gathered = size, large, 0

    def write(self, at: int, code: bytes) -> None:
        """Put code at an offset; what is written first lies in front of what is written later."""
        assert 0 <= at <= at + len(code) <= self._size
        ctypes.memmove(self._address + at, code, len(code))
        while self._large and self._gathered < at + len(code):  # the host does that only with what is not empty
            where = ctypes.c_void_p(self._address + self._gathered)
            self._libc.madvise(where, ctypes.c_size_t(LARGE), _COLLAPSE)  # a host that cannot: slower
            self._gathered += LARGE

    def close(self) -> None:
        """Others keep what they have mapped."""
        os.close(self.fd)
