"""From one disk into another: conversion, committing an overlay into its base, moving an overlay to another base.

Used by the `image` verb on images that no VM has open. Calls progress(what, so far, in all) now and then.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing

from qemu_user.backends.block.opening import backing_path, open_disk, opened_alone
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.qcow2.image import Qcow2Image
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.block.views import is_zero
from qemu_user.backends.errors import BackendError

Progress = Callable[[str, int, int], None]
UNIT = 64 << 10
_AT_ONCE = 16
"""Units of one read."""


def _runs(marks: bytearray, size: int) -> Iterator[tuple[int, int]]:
    """(offset, length) of marked units, in pieces."""
    at = marks.find(1)
    while at >= 0:
        end = at + 1
        while end < len(marks) and end - at < _AT_ONCE and marks[end]:
            end += 1
        yield at * UNIT, min(end * UNIT, size) - at * UNIT
        at = marks.find(1, end)


def copy(source: BlockBackend, target: BlockBackend, marks: bytearray, progress: Progress, what: str) -> None:
    """The marked units of `source` into `target`, zeroes as zeroes. OSError."""
    buffer = memoryview(bytearray(UNIT * _AT_ONCE))
    for offset, length in _runs(marks, source.size):
        view = buffer[:length]
        source.read(offset, [view])
        if is_zero([view]):
            target.zero(offset, length, unmap=True)
        else:
            target.write(offset, [view])
        progress(what, offset + length, source.size)
    target.flush()


def make(path: str, size: int, format: str, cluster_bits: int = 16) -> None:
    """A new, empty image. BackendError."""
    if format == "qcow2":
        create_qcow2(path, size, cluster_bits=cluster_bits)
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise BackendError(f"disk image {path}: cannot be made: {error.strerror}") from error


def convert(source: str, source_format: str, target: str, target_format: str, progress: Progress) -> None:
    """A new image with the content of another. BackendError, OSError; nothing is left of it then."""
    with closing(open_disk(source, source_format, readonly=True)) as old:
        make(target, old.size, target_format)
        try:
            with closing(open_disk(target, target_format)) as new:
                copy(old, new, old.with_data(UNIT), progress, f"copying {os.path.basename(source)}")
        except BaseException:
            os.unlink(target)
            raise


def commit(path: str, progress: Progress) -> str:
    """Write what an overlay has into the image beneath it, and return that one's path. The overlay stays as it is, and shows
    the same. BackendError, OSError; the base is then changed in part, and another commit completes it.
    """
    with closing(opened_alone(path)) as top:
        header = top.header
        if not header.backing_file:
            raise BackendError(f"disk image {path}: has no backing file")
        base_path = backing_path(path, header.backing_file)
        with closing(open_disk(base_path, header.backing_format)) as base:
            if base.size < top.size:
                base.resize(top.size)
            copy(top, base, top.with_data(UNIT, chain=False), progress, f"committing to {os.path.basename(base_path)}")
        return base_path


def rebase(path: str, backing: str, backing_format: str, progress: Progress, unsafe: bool = False) -> None:
    """Put an overlay over another image ("": none), showing what it showed before; `unsafe`: only change the name. `backing`
    is stored as it is. BackendError, OSError; the overlay then still has its old base.
    """
    if unsafe:
        with closing(opened_alone(path, readonly=False)) as top:
            top.set_backing(backing, backing_format)
        return
    disk = open_disk(path, "qcow2")
    with closing(disk):
        assert isinstance(disk, Qcow2Image)
        if disk.header.version < 3 and not backing:
            raise BackendError(f"disk image {path}: is of version 2, which cannot stand alone this way; convert it")
        new = open_disk(backing_path(path, backing), backing_format, readonly=True) if backing else None
        try:
            _keep_differences(disk, new, progress)
        finally:
            if new is not None:
                new.close()
        disk.flush()
        disk.set_backing(backing, backing_format)


def _keep_differences(disk: Qcow2Image, new: BlockBackend | None, progress: Progress) -> None:
    """Write into the overlay what it would not show over its new base."""
    own = disk.with_data(UNIT, chain=False)
    before, after = memoryview(bytearray(UNIT)), memoryview(bytearray(UNIT))
    for index in range(len(own)):
        offset = index * UNIT
        length = min(UNIT, disk.size - offset)
        there = max(0, min(length, new.size - offset)) if new is not None else 0
        disk.read(offset, [before[:length]])
        after[:] = bytes(UNIT)
        if new is not None and there:
            new.read(offset, [after[:there]])
        if before[:length] != after[:length]:
            disk.write(offset, [before[:length]])
        progress("comparing", offset + length, disk.size)
