"""RAM in the host's large pages where a guest is about to fill it: one fault for 2 MiB instead of one for 4 KiB.

Linux fills three parts of its memory in the first tenth of a second: where it was loaded, its table of pages, and the pages
that it hands out first, from the top down. A memfd has large pages only when they are asked for by MADV_COLLAPSE (Linux 6.1),
whatever the host's settings are. Called by machine.py before the guest runs; what the host cannot do is left as it is.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from time import thread_time

LARGE = 2 << 20
_LEAST = 256 << 20
"""Of RAM: a smaller guest keeps what it does not use."""
_FIRST = 32 << 20
"""What the smallest Linux has handed out when its first process runs."""
_TABLE = 64
"""Its table of pages is this part of the memory: 64 bytes for 4096."""
_MOST = 128 << 20
"""So much at once, and some 15 ms; where there is more memory Linux takes a while itself."""
_PATIENCE = 0.003
"""CPU seconds for one large page. A host that has to move others first takes longer: then small ones are faster."""
_COLLAPSE = 25  # MADV_COLLAPSE
_PROT_NONE, _READ_WRITE = 0, 3
_SHARED_FIXED, _RESERVE = 0x11, 0x4022  # MAP_SHARED | MAP_FIXED; MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE

_libc = ctypes.CDLL(None, use_errno=True)
_word, _size = ctypes.c_void_p, ctypes.c_size_t
_mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
_mmap.restype = _word
_mmap.argtypes = (_word, _size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap.argtypes = (_word, _size)
_madvise.argtypes = (_word, _size, ctypes.c_int)


def filled_first(size: int) -> range:
    """Of `size` bytes of RAM, what Linux fills from the top down as it starts."""
    return range(size - min(size // _TABLE + _FIRST, _MOST) if size >= _LEAST else size, size)


def gather(fd: int, parts: Iterable[range]) -> int:
    """Let the blocks of LARGE bytes that lie wholly in `parts` of the memfd be large pages of zeros, where nothing is yet: of a
    part the first _MOST bytes. How many are. A part may go on behind the end of the file.
    """
    made, size = 0, os.fstat(fd).st_size
    for part in parts:
        first = -(-part.start // LARGE) * LARGE
        end = min(part.stop, size, first + _MOST) // LARGE * LARGE
        if first < end:
            made += _gather(fd, first, end - first)
    return made


def _gather(fd: int, offset: int, size: int) -> int:
    room = _mmap(None, size + LARGE, _PROT_NONE, _RESERVE, -1, 0)
    if room is None or room == _word(-1).value:
        return 0
    made = 0
    try:
        start = -(-room // LARGE) * LARGE
        if _mmap(start, size, _READ_WRITE, _SHARED_FIXED, fd, offset) != start:
            return 0
        for at in range(0, size, LARGE):
            if _anything(fd, offset + at):
                continue
            begun = thread_time()
            ctypes.memset(start + at, 0, 1)  # what is quite empty is not collapsed
            if _madvise(start + at, LARGE, _COLLAPSE) or thread_time() - begun > _PATIENCE:
                break
            made += 1
    finally:
        _munmap(room, size + LARGE)
    return made


def _anything(fd: int, offset: int) -> bool:
    with suppress(OSError):  # ENXIO: no data up to the end
        return os.lseek(fd, offset, os.SEEK_DATA) < offset + LARGE
    return False
