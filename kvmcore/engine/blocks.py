"""Anonymous memory that machines and harts are made of, kept for the next ones of this process.

Fresh pages cost a fault each, some dozen for a VM with a vCPU; where one VM after the other lives in a process that is most
of what they cost. A block that comes back is zeros again where its next user needs it. Called by machine.py; any thread.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

_MAP_NORESERVE = 0x4000
_KEPT, _KEPT_LARGE, _LARGE = 8, 2, 1 << 20
"""Blocks of a size that are kept; of large ones, which may have huge pages, fewer."""


class Block:
    """`size` bytes of zeros at `address`. give_back() unmaps it or keeps it for take()."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, self.size, flags=flags)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))


_kept: dict[int, list[Block]] = {}
_lock = threading.Lock()


def take(size: int) -> Block:
    """A block of at least `size` bytes, page aligned: all zeros, but for what give_back() has left. OSError: no memory."""
    rounded = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    with _lock:
        kept = _kept.get(rounded)
        if kept:
            return kept.pop()
    return Block(rounded)


def give_back(block: Block, used: list[tuple[int, int]]) -> None:
    """Nobody uses it any more. `used`: the (offset, size) pieces that are not zero, and that the next user of a block of this
    size shall find zero.
    """
    with _lock:
        kept = _kept.setdefault(block.size, [])
        if len(kept) >= (_KEPT_LARGE if block.size >= _LARGE else _KEPT):
            return  # unmapped with the object
        for offset, size in used:
            ctypes.memset(block.address + offset, 0, size)
        kept.append(block)
