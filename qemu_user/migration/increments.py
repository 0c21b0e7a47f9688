"""Incremental snapshots: a file keeps only the pages that differ from the snapshot made before it, its parent.

What is the parent's is found by comparing, after the guest has gone on, so that it costs the guest nothing while it runs and
holds wherever the VM came from meanwhile. The pages that are equal are holes in the file, and bits in Contents.inherited.
A snapshot that is deleted hands down to its children what is its own (hand_down).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_user.backends.block.raw import fallocate_punch

if TYPE_CHECKING:
    from qemu_user.migration.snapshot import Clusters

PAGE = 4096
MAX_DEPTH = 16
"""Snapshots over each other; the next one is whole."""


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Nobody else makes a snapshot in `root` a parent, or deletes one, meanwhile."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def bitmap_size(size: int) -> int:
    """Bytes of the bitmap of a file."""
    return -(-size // (8 * PAGE))


def inherit(ours: Clusters, parent: Clusters) -> bytes:
    """Compare a file that has just been written with its parent's of the same size: the bitmap of the pages that are the
    parent's, which are not in our file any more."""
    bits = bytearray(bitmap_size(ours.size))
    mine, theirs = memoryview(bytearray(ours.cluster)), memoryview(bytearray(ours.cluster))
    writable = os.open(ours.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        there = set(parent.offsets())
        for offset in ours.offsets():
            if offset not in there:
                continue
            length = min(ours.cluster, ours.size - offset)
            ours.read(offset, mine[:length])
            parent.read(offset, theirs[:length])
            if mine[:length] == theirs[:length]:
                equal = [True] * -(-length // PAGE)
            else:
                equal = [mine[at : at + PAGE] == theirs[at : at + PAGE] for at in range(0, length, PAGE)]
            first = offset // PAGE
            for index, same in enumerate(equal):
                if same:
                    bits[first + index >> 3] |= 1 << (first + index & 7)
            _punch(writable, offset, equal)
    finally:
        os.close(writable)
    return bytes(bits)


def _punch(fd: int, offset: int, equal: list[bool]) -> None:
    at = 0
    while at < len(equal):
        end = at
        while end < len(equal) and equal[end] == equal[at]:
            end += 1
        if equal[at]:
            fallocate_punch(fd, offset + at * PAGE, (end - at) * PAGE)
        at = end


def inherited_pages(bits: bytes, first: int, count: int) -> list[int]:
    """Which of the pages [first, first + count) are the parent's."""
    if not any(bits[first >> 3 : (first + count + 7) >> 3]):
        return []
    return [page for page in range(first, first + count) if bits[page >> 3] >> (page & 7) & 1]


def hand_down(child: Path, bits: bytes, gone: Path, gone_bits: bytes) -> bytes:
    """A parent's file is about to go: put what is its own and its child's into the child's. The bitmap of what is the
    grandparent's from then on."""
    left = bytearray(a & b for a, b in zip(bits, gone_bits or bytes(len(bits)), strict=True))
    source, target = os.open(gone, os.O_RDONLY | os.O_CLOEXEC), os.open(child, os.O_RDWR | os.O_CLOEXEC)
    buffer = ctypes.create_string_buffer(PAGE)
    view = memoryview(buffer).cast("B")
    try:
        for index, (was, stays) in enumerate(zip(bits, left, strict=True)):
            moved = was & ~stays
            for bit in range(8) if moved else ():
                if moved >> bit & 1:
                    offset = (8 * index + bit) * PAGE
                    length = os.preadv(source, [view], offset)
                    os.pwrite(target, view[:length], offset)
        os.fdatasync(target)
    finally:
        os.close(source)
        os.close(target)
    return bytes(left)
