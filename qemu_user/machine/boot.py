"""Putting a guest into memory: flat Image, ELF, U-Boot, initrd, device tree; where it starts.

Called by machine/machine.py at start and at every reset. Reads files straight into the mapped guest memory.
Entry is as Linux's KVM has it: a0 = hart id, a1 = device tree, satp = 0, S-mode. Whatever is wrong with a
file is a BootError that names it.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from qemu_user.config.machine_config import Boot
from qemu_user.devices.memory import GuestMemory, OutOfRange
from qemu_user.machine.virt import RAM_BASE, TREE_LIMIT

MIB = 1 << 20
RAW_OFFSET = 2 * MIB
"""A file without a header is put at RAM + 2 MiB, where U-Boot's qemu-riscv64_smode is linked."""
INITRD_DISTANCE = 512 * MIB
"""QEMU's: the initrd lies half the memory behind the kernel, at most this."""
PAGE = 4096

_IMAGE = struct.Struct("<IIQQQIIQ8s4s4x")  # Documentation/arch/riscv/boot-image-header.rst
_IMAGE_MAGICS = (b"RSC\5", b"RISCV\0\0\0")
_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_EM_RISCV, _PT_LOAD, _CLASS64, _LITTLE = 243, 1, 2, 1
_KNOWN = {
    b"\x1f\x8b": "gzip-compressed",
    b"\xfd7zXZ": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"BZh": "bzip2-compressed",
    b"!<arch>": "a .deb or .a archive",
}


class BootError(Exception):
    """The guest cannot be put into memory. The text is for the user."""


class Loaded(NamedTuple):
    """Where the kernel starts and where its memory (bss too) ends."""

    entry: int
    end: int


class Entry(NamedTuple):
    """What the boot hart is given."""

    pc: int
    tree: int


def load_kernel(path: str, memory: GuestMemory) -> Loaded:
    """Put an Image, ELF or raw binary in place. BootError."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            if head[:4] == b"\x7fELF":
                return _load_elf(path, file.fileno(), head, memory)
            return _load_flat(path, file.fileno(), head, memory)
    except OSError as error:
        raise BootError(f"kernel {path}: {error.strerror}") from error
    except OutOfRange as error:
        raise BootError(f"kernel {path}: does not fit the memory ({error}); give more with -m") from error


def linux_span(path: str) -> range:
    """What an Image of Linux takes of RAM, from its first byte; empty if the file is something else, or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return range(0)
    image = _image(head)
    if image is None:
        return range(0)
    return range(image.offset, image.offset + max(size, image.size))


class _Header(NamedTuple):
    """Of an Image. `offset` counts from a 2 MiB boundary, and RAM starts at one."""

    offset: int
    size: int
    big_endian: bool


def _image(head: bytes) -> _Header | None:
    if len(head) < 64:
        return None
    _, _, offset, size, flags, _, _, _, magic, magic2 = _IMAGE.unpack(head)
    if magic2 != _IMAGE_MAGICS[0] and magic != _IMAGE_MAGICS[1]:
        return None
    return _Header(offset, size, bool(flags & 1))


def _load_flat(path: str, fd: int, head: bytes, memory: GuestMemory) -> Loaded:
    size = os.fstat(fd).st_size
    offset, span = RAW_OFFSET, size
    image = _image(head)
    if image is not None:
        if image.big_endian:
            raise BootError(f"kernel {path}: is big-endian")
        offset, span = image.offset, max(size, image.size)
    for start, what in _KNOWN.items():
        if head.startswith(start):
            raise BootError(f"kernel {path}: is {what}; unpack it first")
    gpa = RAM_BASE + offset
    memory.view(gpa, span)
    _read_into(path, fd, 0, memory.view(gpa, size))
    return Loaded(gpa, gpa + span)


def _load_elf(path: str, fd: int, head: bytes, memory: GuestMemory) -> Loaded:
    if len(head) < 64:
        raise BootError(f"kernel {path}: is cut short")
    ident, _, machine, _, entry, table, _, _, _, entry_size, count, *_ = _ELF.unpack(head)
    if machine != _EM_RISCV or ident[4] != _CLASS64 or ident[5] != _LITTLE:
        raise BootError(f"kernel {path}: is not an ELF for 64-bit little-endian RISC-V")
    if entry_size != _SEGMENT.size:
        raise BootError(f"kernel {path}: bad ELF program headers")
    raw = os.pread(fd, count * entry_size, table)
    if len(raw) < count * entry_size:
        raise BootError(f"kernel {path}: is cut short")
    end, start = 0, entry
    for kind, _, offset, virtual, physical, in_file, in_memory, _ in _SEGMENT.iter_unpack(raw):
        if kind != _PT_LOAD or not in_memory:
            continue
        if in_file > in_memory:
            raise BootError(f"kernel {path}: bad ELF segment")
        view = memory.view(physical, in_memory)
        _read_into(path, fd, offset, view[:in_file])
        view[in_file:] = bytes(in_memory - in_file)
        if virtual <= entry < virtual + in_memory:
            start = physical + (entry - virtual)
        end = max(end, physical + in_memory)
    if not end:
        raise BootError(f"kernel {path}: has nothing to load")
    memory.view(start, 2)
    return Loaded(start, end)


def _read_into(path: str, fd: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            raise BootError(f"{path}: is cut short")
        offset += count
        view = view[count:]


def load_initrd(boot: Boot, memory: GuestMemory, kernel: Loaded, limit: int) -> tuple[int, int]:
    """Put the initrd and what is appended to it in place, between the kernel and `limit`.

    Returns (start, end), (0, 0) without one. BootError.
    """
    files = [boot.initrd, *boot.initrd_files] if boot.initrd else [*boot.initrd_files]
    if not files and not boot.initrd_extra:
        return 0, 0
    file = boot.initrd
    try:
        places, total = [], 0
        for file in files:
            places.append((file, total, size := os.stat(file).st_size))
            total += -(-size // 4) * 4  # archives of an initrd start at multiples of 4
        extra, total = total, total + len(boot.initrd_extra)
        wanted = kernel.entry + min(memory.size // 2, INITRD_DISTANCE)
        lowest, highest = _page_up(kernel.end), (limit - total) & -PAGE
        if highest < lowest:
            raise BootError(
                f"initrd {boot.initrd}: {total >> 10} KiB do not fit behind the kernel in the memory; "
                "give more with -m"
            )
        start = min(max(_page_up(wanted), lowest), highest)
        for file, at, size in places:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _read_into(file, fd, 0, memory.view(start + at, size))
            finally:
                os.close(fd)
            memory.write(start + at + size, bytes(-size % 4))
        memory.write(start + extra, boot.initrd_extra)
    except OSError as error:
        raise BootError(f"initrd {file}: {error.strerror}") from error
    return start, start + total


def tree_address(memory: GuestMemory, size: int) -> int:
    """Where a tree of `size` bytes goes: at the end of RAM below 3 GiB, on a 2 MiB boundary, as QEMU does."""
    return (min(RAM_BASE + memory.size, TREE_LIMIT) - size) & -(2 * MIB)


def _page_up(address: int) -> int:
    return -(-address // PAGE) * PAGE
