"""What a process keeps of the memory that it shares with others, and gives back of what it does not need. Host-specific
(CPython's allocator, glibc's): where there is another one, nothing happens.

A process that forks many others calls settle(): what a child allocates goes into the holes of the heap that it has inherited
first, each of them on a page that it gets a copy of for that. So the holes are filled before.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections import Counter
from typing import Any

_PR_SET_MEMORY_MERGE = 67
_libc = ctypes.CDLL(None)
_SMALL, _STEP, _POOL, _POOL_HEAD = 512, 16, 1 << 14, 48
"""pymalloc's (Objects/obmalloc.c): the largest block, from one size to the next, bytes of a pool and of its header."""
_OTHERS = 5
"""Blocks that others may have got meanwhile of a pool that is ours."""
_MOST = 1 << 8
"""Pools of a size, and blocks of malloc's, at most."""
_LARGEST, _SMALLEST = 1 << 16, 24
"""Of malloc's blocks."""
_fill: list[Any] = []


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip
    arena: int


def merge() -> None:
    """Where the host looks for equal pages (KSM, /sys/kernel/mm/ksm/run), those of this process and of its later children
    may be merged with others'. Linux 6.4 or newer; else nothing happens."""
    _libc.prctl(_PR_SET_MEMORY_MERGE, 1, 0, 0, 0)


def settle() -> None:
    """What there is stays, and is shared with all children. One thread."""
    gc.collect()  # which empties the lists of free objects as well
    for size in range(_STEP, _SMALL + 1, _STEP):
        _fill_pools(size)
    _fill_heap()
    gc.freeze()


def forget_lookups() -> None:
    """Empty CPython's cache of what was looked up in types. Its entries hold references to names: one that a child replaces is
    a write to two of them. Called before what children do is done for the last time, so that they find what they need."""
    clear = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache  # so called from Python 3.13 on
    clear()


def trim() -> None:
    """Pages of malloc's that nothing is on go back to the host. Any thread."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def _block(size: int) -> object:
    """An object of exactly so many bytes, no container."""
    if size == 16:
        return object()
    return float(size) if size == 32 else bytes(size - sys.getsizeof(b""))


def _fill_pools(size: int) -> None:
    """Until pymalloc has begun a pool for blocks of `size` bytes."""
    room = (_POOL - _POOL_HEAD) // size
    ours: Counter[int] = Counter()
    for _ in range(_MOST):
        blocks = [_block(size) for _ in range(room)]
        _fill.append(blocks)
        ours.update(id(block) // _POOL for block in blocks)
        if max(ours.values()) > room - _OTHERS:
            return


def _fill_heap() -> None:
    """Until malloc has had to ask the host for more memory, for blocks of each size."""
    if not hasattr(_libc, "mallinfo2"):
        return
    info, malloc, free = _libc.mallinfo2, _libc.malloc, _libc.free
    info.restype, malloc.restype = _Mallinfo2, ctypes.c_void_p
    malloc.argtypes, free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    size = _LARGEST
    while size >= _SMALLEST:
        trim()
        before = info().arena
        for _ in range(_MOST):
            block = malloc(size)
            if info().arena != before:
                free(block)
                break
        size -= 16 if size <= 128 else size // 8 // 16 * 16
    trim()
