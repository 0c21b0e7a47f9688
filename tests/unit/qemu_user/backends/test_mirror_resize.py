"""Mirrors that get another size: all members that are there follow, who was away follows later, and nothing old shows up."""

from __future__ import annotations

import errno
import random
from contextlib import suppress
from pathlib import Path

import pytest

from qemu_user.backends.block.mirror import GOOD
from qemu_user.backends.errors import BackendError
from tests.unit.qemu_user.backends.test_mirror import MIB, SIZE, Pair, get, put, roles

LARGE = 3 * SIZE + 512


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_it_grows_while_members_are_copied(pair: Pair) -> None:
    first = random.Random(1).randbytes(SIZE)
    pair.paths[0].write_bytes(first)
    disk = pair.open()  # the second one is being filled
    disk.resize(LARGE)
    assert get(disk, 0, LARGE) == first + bytes(LARGE - SIZE)
    put(disk, LARGE - 700, b"end" * 200)
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    disk.close()
    assert pair.same()
    disk = pair.open()
    assert (disk.size, roles(disk), pair.news) == (LARGE, [GOOD, GOOD], ["BLOCK_MIRROR_SYNCED"])
    assert get(disk, LARGE - 700, 600) == b"end" * 200
    disk.close()


def test_it_shrinks_and_grows_again(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 0, b"x" * SIZE)
    disk.resize(MIB + 512)
    with suppress(OSError):
        disk.flush()
    disk.resize(SIZE)
    assert get(disk, 0, SIZE) == b"x" * (MIB + 512) + bytes(SIZE - MIB - 512)
    put(disk, SIZE - 512, b"y" * 512)
    disk.close()
    assert pair.same()
    disk = pair.open()
    assert (disk.size, roles(disk)) == (SIZE, [GOOD, GOOD])
    disk.close()


def test_what_a_larger_member_has_behind_the_end_stays_unseen(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    disk.close()
    with pair.paths[1].open("ab") as file:
        file.write(b"\xee" * 4 * MIB)
    disk = pair.open()
    assert disk.size == SIZE
    disk.resize(2 * SIZE)
    for _ in range(2):  # members take turns
        assert get(disk, SIZE, SIZE) == bytes(SIZE)
    disk.close()
    assert pair.same()


def test_one_that_cannot_grow_leaves_all_as_it_was(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = pair.open()
    pair.wait()

    def refuse(size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pair.failing(1), "resize", refuse)
    with pytest.raises(OSError, match="No space left"):
        disk.resize(LARGE)
    assert (disk.size, roles(disk)) == (SIZE, [GOOD, GOOD])
    assert [path.stat().st_size for path in pair.paths] == [SIZE, SIZE]
    put(disk, SIZE - 512, b"z" * 512)

    disk.resize(MIB)  # shrinking is no matter of room: who cannot stays larger
    assert disk.size == MIB
    assert [path.stat().st_size for path in pair.paths] == [MIB, SIZE]
    disk.close()
    disk = pair.open()
    assert disk.size == MIB
    disk.close()


@pytest.mark.parametrize("back", ["resync", "restart"])
def test_who_was_out_gets_the_size_when_it_is_back(pair: Pair, back: str) -> None:
    disk = pair.open()
    pair.wait()
    pair.failing(0).broken = True
    put(disk, 0, b"a" * 512)
    disk.resize(LARGE)
    put(disk, LARGE - 512, b"b" * 512)
    assert [path.stat().st_size for path in pair.paths] == [SIZE, LARGE]
    if back == "resync":
        disk.resync()
    else:
        disk.close()
        disk = pair.open()
    assert disk.size == LARGE
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    disk.close()
    assert pair.same()


def test_who_cannot_get_the_size_is_named(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = pair.open()
    pair.wait()
    pair.failing(0).broken = True
    put(disk, 0, b"a" * 512)
    disk.resize(LARGE)
    disk.close()

    def refuse(self: object, size: int) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(type(pair.failing(0)), "resize", refuse)
    with pytest.raises(BackendError, match=f"{pair.paths[0]} has {SIZE} bytes, {LARGE} are needed: File too large"):
        pair.open()


def test_a_kill_between_two_members(pair: Pair) -> None:
    """One has grown, the other one has not, and nobody was told: the mirror is as large as it was."""
    disk = pair.open()
    pair.wait()
    put(disk, SIZE - 512, b"c" * 512)
    disk.close()
    with pair.paths[0].open("ab") as file:
        file.truncate(LARGE)
    disk = pair.open()
    assert (disk.size, roles(disk)) == (SIZE, [GOOD, GOOD])
    disk.close()


def test_a_member_without_a_record_does_not_decide(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    disk.resize(LARGE)
    disk.close()
    pair.paths[1].write_bytes(bytes(MIB))  # a new, smaller one in its place
    Path(f"{pair.paths[1]}.mirror").unlink()
    disk = pair.open()
    assert disk.size == LARGE
    pair.wait()
    disk.close()
    assert pair.same()
