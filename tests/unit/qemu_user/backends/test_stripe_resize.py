"""Stripes that grow: what was there stays, what is new reads as zeroes, and a member that cannot leaves all as it was."""

from __future__ import annotations

import errno
import random
from contextlib import closing
from pathlib import Path

import pytest

from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.block.stripe import StripeDisk

CHUNK = 4096
ROW = 3 * CHUNK


def make(folder: Path, rows: int) -> StripeDisk:
    members: list[BlockBackend] = []
    for name in ("a.raw", "b.qcow2", "c.raw"):
        path = folder / name
        if not path.exists():
            if name.endswith("qcow2"):
                create_qcow2(path, rows * CHUNK)
            else:
                path.write_bytes(bytes(rows * CHUNK))
        members.append(open_disk(str(path)))
    return StripeDisk(members, CHUNK)


def content(disk: BlockBackend) -> bytes:
    data = bytearray(disk.size)
    disk.read(0, [memoryview(data)])
    return bytes(data)


def test_it_grows(tmp_path: Path) -> None:
    first = random.Random(1).randbytes(4 * ROW)
    with closing(make(tmp_path, 4)) as disk:
        disk.write(0, [memoryview(first)])
        disk.resize(10 * ROW)
        assert content(disk) == first + bytes(6 * ROW)
        more = random.Random(2).randbytes(ROW + 512)
        disk.write(8 * ROW, [memoryview(more)])
        disk.flush()
    with closing(make(tmp_path, 4)) as disk:
        assert disk.size == 10 * ROW
        assert content(disk)[8 * ROW :][: len(more)] == more


@pytest.mark.parametrize(("size", "says"), [(5 * ROW + 512, f"rows of {ROW} bytes"), (3 * ROW, "does not shrink")])
def test_what_is_refused(tmp_path: Path, size: int, says: str) -> None:
    with closing(make(tmp_path, 4)) as disk, pytest.raises(OSError, match=says):
        disk.resize(size)


def test_a_member_that_cannot_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(make(tmp_path, 4)) as disk:

        def refuse(size: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(disk.members[2], "resize", refuse)
        with pytest.raises(OSError, match="full"):
            disk.resize(9 * ROW)
        assert disk.size == 4 * ROW
        assert [member.size for member in disk.members] == [4 * CHUNK] * 3


def test_members_with_room_to_spare_keep_it(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(7 * CHUNK))
    with closing(make(tmp_path, 4)) as disk:
        assert disk.size == 4 * ROW
        disk.resize(6 * ROW)
        assert [member.size // CHUNK for member in disk.members] == [7, 6, 6]
