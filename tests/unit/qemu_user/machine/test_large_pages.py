"""RAM in large pages: only where nothing is, only whole ones, and nothing is lost where the host has none."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_user.machine import boot, large_pages
from qemu_user.machine.large_pages import LARGE, filled_first, gather

MIB = 1 << 20
SIZE = 8 * LARGE


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the host is: a page may take its time."""
    monkeypatch.setattr(large_pages, "_PATIENCE", 60.0)


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


def host_has_them() -> bool:
    fd = os.memfd_create("probe")
    os.ftruncate(fd, LARGE)
    made = gather(fd, [range(LARGE)])
    os.close(fd)
    return made == 1


needs_large_pages = pytest.mark.skipif(not host_has_them(), reason="needs a host with MADV_COLLAPSE (Linux 6.1)")


def there(fd: int) -> list[bool]:
    """Of each block, whether the whole of it is in memory."""
    found = []
    for at in range(0, SIZE, LARGE):
        try:
            found.append(os.lseek(fd, at, os.SEEK_DATA) == at and os.lseek(fd, at, os.SEEK_HOLE) >= at + LARGE)
        except OSError:
            found.append(False)
    return found


@needs_large_pages
def test_whole_blocks_are_made_and_read_as_zeros(fd: int) -> None:
    assert gather(fd, [range(LARGE - 1, 3 * LARGE + 1), range(6 * LARGE, SIZE), range(5 * LARGE, 5 * LARGE)]) == 4
    assert there(fd) == [False, True, True, False, False, False, True, True]
    assert os.fstat(fd).st_blocks * 512 == 4 * LARGE
    assert not any(os.pread(fd, SIZE, 0))
    with mmap.mmap(fd, SIZE) as ram:
        ram[2 * LARGE - 3 : 2 * LARGE + 3] = b"across"
        assert os.pread(fd, 6, 2 * LARGE - 3) == b"across"


@needs_large_pages
def test_what_holds_something_stays_as_it_is(fd: int) -> None:
    os.pwrite(fd, b"here", 2 * LARGE + 123 * 4096)
    assert gather(fd, [range(SIZE)]) == 7
    assert os.fstat(fd).st_blocks * 512 == 7 * LARGE + 4096
    assert os.pread(fd, 4, 2 * LARGE + 123 * 4096) == b"here"
    assert gather(fd, [range(SIZE)]) == 0, "nor is anything done twice"


@needs_large_pages
def test_a_part_is_what_some_file_says_it_is(fd: int) -> None:
    assert gather(fd, [range(1 << 64, 1 << 65), range(7 * LARGE, 1 << 64)]) == 1
    assert there(fd) == [False] * 7 + [True]
    os.ftruncate(fd, 128 * LARGE)
    assert gather(fd, [range(8 * LARGE, 1 << 64)]) == 64
    assert os.fstat(fd).st_blocks * 512 == 65 * LARGE


@needs_large_pages
def test_the_first_page_that_takes_long_is_the_last(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "_PATIENCE", -1.0)
    assert gather(fd, [range(SIZE)]) == 0
    assert there(fd) == [True] + [False] * 7


def test_a_host_without_them_has_small_ones(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for something that no host knows, it refuses: nothing but what was looked at is there."""
    monkeypatch.setattr(large_pages, "_COLLAPSE", 0x7FFF)
    assert gather(fd, [range(SIZE)]) == 0
    assert os.fstat(fd).st_blocks * 512 == 4096
    assert not any(os.pread(fd, SIZE, 0))
    with open("/dev/null", "r+b") as no_memory:
        assert gather(no_memory.fileno(), [range(LARGE)]) == 0


@pytest.mark.parametrize("size", [512 * MIB, 2048 * MIB, 65536 * MIB])
def test_linux_fills_its_table_of_pages_and_some_more(size: int) -> None:
    part = filled_first(size)
    assert part.stop == size
    assert min(size // 64, 100 * MIB) < len(part) <= min(size // 64 + 64 * MIB, 128 * MIB)


def test_a_small_guest_keeps_what_it_does_not_use() -> None:
    assert not filled_first(128 * MIB)


def test_only_an_image_of_linux_is_known_to_do_so(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    head = struct.pack("<IIQQQIIQ8s4sI", 0, 0, 2 * MIB, 5 * MIB, 0, 2, 0, 0, b"RISCV\0\0\0", b"RSC\5", 0)
    path.write_bytes(head + bytes(MIB))
    assert boot.linux_span(str(path)) == range(2 * MIB, 7 * MIB), "what it needs, not what the file has"
    path.write_bytes(head + bytes(6 * MIB))
    assert boot.linux_span(str(path)) == range(2 * MIB, 8 * MIB + 64)
    for other in (b"\x7fELF" + bytes(100), b"RISCV\0\0\0", bytes(64)):
        path.write_bytes(other)
        assert not boot.linux_span(str(path))
    assert not boot.linux_span(str(tmp_path / "missing"))
