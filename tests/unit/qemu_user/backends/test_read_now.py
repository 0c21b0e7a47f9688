"""read_now(): what the page cache has is read at once, of what it has not nobody says that it was read."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_user.backends.block.opening import create_overlay, open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend, RawImage
from qemu_user.backends.block.stripe import StripeDisk
from qemu_user.backends.block.write_through import WriteThrough

SIZE = 4 << 20


def _raw(folder: Path) -> BlockBackend:
    path = folder / "d.raw"
    path.write_bytes(bytes(SIZE))
    return open_disk(str(path), "raw")


def _qcow2(folder: Path) -> BlockBackend:
    create_qcow2(folder / "d.qcow2", SIZE)
    return open_disk(str(folder / "d.qcow2"))


def _overlay(folder: Path) -> BlockBackend:
    base = folder / "base.raw"
    base.write_bytes(random.Random(1).randbytes(SIZE - 65536))
    create_overlay(base, folder / "o.qcow2", SIZE)
    return open_disk(str(folder / "o.qcow2"))


def _stripe(folder: Path) -> BlockBackend:
    members: list[BlockBackend] = []
    for name in ("a", "b"):
        (folder / name).write_bytes(bytes(SIZE // 2))
        members.append(RawImage(str(folder / name)))
    return StripeDisk(members, 4096)


@pytest.mark.parametrize("make", [_raw, _qcow2, _overlay, _stripe])
def test_it_reads_what_read_reads(tmp_path: Path, make: Callable[[Path], BlockBackend]) -> None:
    disk, dice = make(tmp_path), random.Random(5)
    done = 0
    for _ in range(300):
        offset, length = 512 * dice.randrange(SIZE // 512 - 300), 512 * dice.randrange(1, 300)
        if dice.random() < 0.4:
            disk.write(offset, [memoryview(dice.randbytes(length))])
        elif dice.random() < 0.1:
            disk.zero(offset, length, True)
        now, later = bytearray(length), bytearray(length)
        cut = dice.randrange(length)
        answer = disk.read_now(offset, [memoryview(now)[:cut], memoryview(now)[cut:]])
        disk.read(offset, [memoryview(later)])
        if answer:
            done += 1
            assert now == later
    assert done > 100 or not disk_tells(tmp_path)
    disk.close()


def disk_tells(folder: Path) -> bool:
    """Whether the file system of `folder` says what is in the page cache."""
    path = folder / "probe"
    path.write_bytes(b"x" * 4096)
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(16)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def test_what_is_not_in_the_page_cache_would_have_to_wait(tmp_path: Path) -> None:
    if not disk_tells(tmp_path):
        pytest.skip("the file system of the temporary folder does not say what is in the page cache")
    path = tmp_path / "cold.raw"
    path.write_bytes(b"y" * SIZE)
    disk = RawImage(str(path))
    disk.flush()
    assert disk.descriptor is not None
    os.posix_fadvise(disk.descriptor, 0, SIZE, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(4096)
    if disk.read_now(SIZE // 2, [memoryview(buffer)]):
        pytest.skip("this host does not drop what is in the page cache")
    disk.read(SIZE // 2, [memoryview(buffer)])
    assert disk.read_now(SIZE // 2, [memoryview(buffer)])
    assert buffer == b"y" * 4096
    assert not disk.waits
    assert WriteThrough(disk).waits
    disk.close()


def test_a_file_system_that_does_not_tell_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(SIZE))
    disk, asked = RawImage(str(path)), list[int]()

    def refuse(fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "preadv", refuse)
    assert disk.read_now(0, [memoryview(bytearray(512))]) is None
    assert disk.read_now(0, [memoryview(bytearray(512))]) is None
    assert asked == [os.RWF_NOWAIT]
    disk.close()


def test_past_the_page_cache_every_read_waits(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(SIZE))
    disk = open_disk(str(path), "raw", cache="none")
    assert disk.read_now(0, [memoryview(bytearray(512))]) is False
    assert disk.waits
    disk.close()
