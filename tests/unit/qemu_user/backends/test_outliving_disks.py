"""Disks of a VM that outlives its device process: a request that was answered is in the image, though nobody has flushed or
closed it; and the lock is held by who has the descriptor."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from qemu_user.backends.block.logged import LoggedDisk
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.errors import BackendError

SIZE = 8 << 20


def made(path: Path) -> str:
    if path.suffix == ".qcow2":
        create_qcow2(path, SIZE)
    else:
        path.write_bytes(bytes(SIZE))
    return str(path)


@pytest.mark.parametrize("name", ["d.raw", "d.qcow2"])
def test_what_was_answered_is_there_after_a_kill(name: str, tmp_path: Path) -> None:
    path = made(tmp_path / name)
    disk = LoggedDisk(open_disk(path))
    disk.outlives = True
    dice = random.Random(5)
    written = {}
    for _ in range(20):
        offset, data = dice.randrange(SIZE // 4096 - 16) * 4096, dice.randbytes(4096 * dice.randrange(1, 16))
        disk.write(offset, [memoryview(bytearray(data))])
        written[offset] = data
        copy = tmp_path / f"now-{name}"  # what a process that comes after a kill -9 finds
        shutil.copyfile(path, copy)
        other = open_disk(str(copy))
        view = memoryview(bytearray(len(data)))
        other.read(offset, [view])
        assert view == data
        other.close()
    disk.zero(0, 4096, unmap=True)
    disk.close()


@pytest.mark.parametrize("name", ["d.raw", "d.qcow2"])
def test_the_lock_goes_on_with_its_descriptor(name: str, tmp_path: Path) -> None:
    path = made(tmp_path / name)
    disk = LoggedDisk(open_disk(path))
    (kept,) = [os.dup(fd) for fd in disk.locks()]  # as kvmcore's session holds it
    disk.close()  # as kill -9 does
    with pytest.raises(BackendError, match="in use by"):
        open_disk(path)
    successor = LoggedDisk(open_disk(path, locked=False))
    successor.adopt_locks(lambda: os.dup(kept))
    successor.lock()
    successor.write(0, [memoryview(bytearray(b"x" * 4096))])
    with pytest.raises(BackendError, match="in use by"):
        open_disk(path)
    successor.unlock()  # to a migration's destination
    open_disk(path).close()
    successor.close()
    os.close(kept)
