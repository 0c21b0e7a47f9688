"""Mirrors: a member that fails drops out, nothing is lost, what comes back is brought up to date, and not trusted before."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qemu_user.backends.block import mirror as mirrors
from qemu_user.backends.block.mirror import COPYING, GOOD, OUT, Member, MirrorDisk
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend, RawImage
from qemu_user.backends.errors import BackendError
from qemu_user.config.machine_config import Drive
from qemu_user.machine.drives import open_drive

MIB = 1 << 20
SIZE = 8 * MIB


class Failing(RawImage):
    """A file on a disk that can be made to fail."""

    broken = False

    def _look(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")

    def read(self, offset: int, views: list[memoryview]) -> None:
        self._look()
        super().read(offset, views)

    def write(self, offset: int, views: list[memoryview]) -> None:
        self._look()
        super().write(offset, views)

    def flush(self) -> None:
        self._look()
        super().flush()


class Pair:
    """Two raw files, and the mirror over them."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "a", folder / "b"]
        for path in self.paths:
            path.write_bytes(bytes(SIZE))
        self.news: list[str] = []
        self.disk: MirrorDisk | None = None

    def open(self, **options: Any) -> MirrorDisk:
        def opener(path: Path) -> Callable[[bool], BlockBackend]:
            return lambda locked: Failing(str(path), locked=locked)

        self.disk = MirrorDisk([Member(str(path), opener(path), True) for path in self.paths], **options)
        self.disk.report = lambda event, text: self.news.append(event)
        return self.disk

    def failing(self, index: int) -> Failing:
        assert self.disk is not None
        member = self.disk.members[index].disk
        assert isinstance(member, Failing)
        return member

    def wait(self) -> None:
        """Until nothing is being copied."""
        assert self.disk is not None
        end = time.monotonic() + 60
        while any(role == COPYING for _, role in self.disk.status()):
            assert time.monotonic() < end
            time.sleep(0.005)

    def same(self) -> bool:
        return self.paths[0].read_bytes() == self.paths[1].read_bytes()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def put(disk: BlockBackend, offset: int, data: bytes) -> None:
    disk.write(offset, [memoryview(data)[:100], memoryview(data)[100:]])


def get(disk: BlockBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read(offset, [memoryview(buffer)])
    return bytes(buffer)


def roles(disk: MirrorDisk) -> list[str]:
    return [role for _, role in disk.status()]


def test_members_are_alike(pair: Pair) -> None:
    dice = random.Random(1)
    disk = pair.open()
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    content = bytearray(SIZE)
    for _ in range(200):
        length = 512 * dice.choice([1, 8, 100, 3000])
        offset = 512 * dice.randrange((SIZE - length) // 512)
        what = dice.choice(["write", "write", "zero", "punch", "read", "flush"])
        if what == "write":
            data = dice.randbytes(length)
            put(disk, offset, data)
            content[offset : offset + length] = data
        elif what in ("zero", "punch"):
            disk.zero(offset, length, unmap=True) if what == "zero" else disk.punch(offset, length)
            content[offset : offset + length] = bytes(length)
        elif what == "flush":
            disk.flush()
        else:
            assert get(disk, offset, length) == content[offset : offset + length]
    disk.close()
    assert pair.paths[0].read_bytes() == content
    assert pair.same()


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("how", ["write", "flush", "read"])
def test_a_member_that_fails_drops_out_and_comes_back(pair: Pair, index: int, how: str) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 0, b"before" * 1000)
    pair.failing(index).broken = True
    if how == "write":
        put(disk, 4 * MIB, b"during" * 1000)
    elif how == "flush":
        disk.flush()
    else:
        for region in range(3):
            expected = bytes(512) if region else (b"before" * 86)[:512]
            assert get(disk, region * MIB, 512) == expected
    assert roles(disk)[index] == OUT
    assert roles(disk)[1 - index] == GOOD
    assert pair.news[-1] == "BLOCK_MIRROR_DEGRADED"
    put(disk, 5 * MIB, b"after" * 1000)
    disk.flush()
    assert get(disk, 5 * MIB, 5000) == b"after" * 1000
    assert not pair.same()
    assert disk.resync() == [str(pair.paths[index])]
    put(disk, 6 * MIB, b"copying" * 1000)
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    assert pair.news[-1] == "BLOCK_MIRROR_SYNCED"
    disk.close()
    assert pair.same()


def test_a_stale_member_is_not_trusted_after_a_restart(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    pair.failing(0).broken = True
    put(disk, 0, b"new" * 1000)
    disk.close()
    assert pair.paths[0].read_bytes()[:3] == bytes(3)
    disk = pair.open()
    assert roles(disk)[1] == GOOD
    assert get(disk, 0, 3000) == b"new" * 1000
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    disk.close()
    assert pair.same()


def test_a_stale_member_alone_is_refused(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    pair.failing(0).broken = True
    put(disk, 0, b"new" * 1000)
    disk.close()
    disk = pair.open()
    pair.failing(0).broken = True  # fails again before it is up to date
    pair.wait()
    disk.close()
    kept = pair.paths[1].read_bytes()
    pair.paths[1].rename(pair.paths[1].with_suffix(".away"))
    with pytest.raises(BackendError, match="degraded=on"):
        pair.open()
    with pytest.raises(BackendError, match="No such file"):
        pair.open()
    pair.paths[1].with_suffix(".away").rename(pair.paths[1])
    disk = pair.open()
    pair.wait()
    disk.close()
    assert pair.same()
    assert pair.paths[0].read_bytes() == kept


def test_starting_without_a_member_makes_it_stale(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 0, b"one" * 1000)
    disk.close()
    away = pair.paths[1].with_suffix(".away")
    pair.paths[1].rename(away)
    disk = pair.open(degraded=True)
    assert pair.news[-1] == "BLOCK_MIRROR_DEGRADED"
    put(disk, 0, b"two" * 1000)
    disk.close()
    away.rename(pair.paths[1])
    disk = pair.open()
    assert roles(disk) == [GOOD, COPYING]
    pair.wait()
    disk.close()
    assert pair.same()
    assert pair.paths[1].read_bytes()[:3] == b"two"


def test_a_replaced_member_is_copied_and_one_with_content_is_left_alone(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 3 * MIB, b"x" * 100_000)
    disk.close()
    pair.paths[1].write_bytes(b"precious".ljust(SIZE, b"\0"))
    Path(f"{pair.paths[1]}.mirror").unlink()
    with pytest.raises(BackendError, match="content that would be overwritten"):
        pair.open()
    assert pair.paths[1].read_bytes().startswith(b"precious")
    pair.paths[1].write_bytes(bytes(SIZE))
    disk = pair.open()
    pair.wait()
    disk.close()
    assert pair.same()


def test_a_mirror_is_made_of_a_disk_and_a_blank_one_only(pair: Pair) -> None:
    pair.paths[0].write_bytes(random.Random(1).randbytes(SIZE))
    pair.paths[1].write_bytes(b"y".ljust(SIZE, b"\0"))
    with pytest.raises(BackendError, match="content that would be overwritten"):
        pair.open()
    pair.paths[1].write_bytes(bytes(SIZE))
    disk = pair.open()
    pair.wait()
    assert roles(disk) == [GOOD, GOOD]
    disk.close()
    assert pair.same()


def test_members_of_different_mirrors_are_refused(tmp_path: Path) -> None:
    pairs = []
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        pairs.append(Pair(tmp_path / name))
        pairs[-1].open()
        pairs[-1].wait()
        assert pairs[-1].disk is not None
        pairs[-1].disk.close()
    pairs[0].paths[1] = pairs[1].paths[1]
    with pytest.raises(BackendError, match="different mirrors"):
        pairs[0].open()


def test_when_all_fail_the_guest_gets_the_error(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    for index in (0, 1):
        pair.failing(index).broken = True
    for action in (lambda: put(disk, 0, b"x" * 512), lambda: get(disk, 0, 512), disk.flush):
        with pytest.raises(OSError, match="Input/output"):
            action()
    for index in (0, 1):
        pair.failing(index).broken = False
    put(disk, 0, b"y" * 512)
    assert get(disk, 0, 512) == b"y" * 512
    disk.close()
    assert pair.same()


def test_damaged_state_files(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 0, b"x" * 4096)
    disk.close()
    state = Path(f"{pair.paths[1]}.mirror")
    state.write_bytes(b"\xff" * 9000)
    with pytest.raises(BackendError, match="would be overwritten"):
        pair.open()
    newest = bytearray(Path(f"{pair.paths[0]}.mirror").read_bytes())
    newest[100] ^= 1  # one of two records: the other one says the same
    Path(f"{pair.paths[0]}.mirror").write_bytes(newest)
    pair.paths[1].write_bytes(bytes(SIZE))
    disk = pair.open()
    pair.wait()
    disk.close()
    assert pair.same()


def test_regions_are_unmarked_when_members_are_alike(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_SWEEP_SECONDS", 0.0)
    disk = pair.open()
    pair.wait()
    disk.flush()
    put(disk, 0, b"x" * 512)
    put(disk, 5 * MIB, b"x" * 512)
    state = Path(f"{pair.paths[0]}.mirror")
    assert state.read_bytes()[8192:].hex() == "0100000000010000"
    disk.flush()
    put(disk, 0, b"y" * 512)
    disk.flush()
    assert state.read_bytes()[8192:].hex() == "0100000000000000"
    disk.flush()
    assert state.read_bytes()[8192:].hex() == "00" * 8
    pair.failing(1).broken = True
    put(disk, 2 * MIB, b"z" * 512)
    for _ in range(3):
        disk.flush()
    assert state.read_bytes()[8192:].hex() == "0000010000000000"
    disk.close()
    assert state.read_bytes()[8192:].hex() == "0000010000000000"


def test_writes_while_a_member_is_copied(pair: Pair) -> None:
    pair.paths[0].write_bytes(random.Random(1).randbytes(SIZE))
    disk = pair.open()
    dice = random.Random(2)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(150):
                put(disk, 2 * MIB * number + 512 * dice.randrange(4000), bytes([number + 1]) * 4096)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pair.wait()
    assert not failures
    assert roles(disk) == [GOOD, GOOD]
    disk.close()
    assert pair.same()


def test_reading_only(pair: Pair) -> None:
    disk = pair.open()
    pair.wait()
    put(disk, 0, b"x" * 512)
    disk.close()
    before = [path.read_bytes() for path in sorted(pair.paths[0].parent.iterdir())]
    config = Drive(file=str(pair.paths[0]), layout="mirror", members=tuple(map(str, pair.paths)), readonly=True)
    with closing(open_drive(config)) as reader:
        assert get(reader, 0, 512) == b"x" * 512
        with pytest.raises(OSError, match="reading only"):
            put(reader, 0, b"y" * 512)
    assert [path.read_bytes() for path in sorted(pair.paths[0].parent.iterdir())] == before


def test_different_kinds_of_members(tmp_path: Path) -> None:
    raw, qcow2 = tmp_path / "a.img", tmp_path / "b.qcow2"
    raw.write_bytes(bytes(SIZE))
    create_qcow2(qcow2, SIZE)
    config = Drive(file=str(raw), layout="mirror", members=(str(raw), str(qcow2)), discard=True)
    with closing(open_drive(config)) as disk:
        put(disk, 12345 * 512, b"m" * 5120)
        for degraded in (False, True):
            with pytest.raises(BackendError, match="in use"):
                open_drive(msgspec.structs.replace(config, degraded=degraded))
    with closing(open_disk(str(qcow2))) as alone:
        assert get(alone, 12345 * 512, 5120) == b"m" * 5120


def test_handing_over(pair: Pair) -> None:
    source = pair.open()
    pair.wait()
    put(source, 0, b"s" * 4096)
    arriving = Pair.__new__(Pair)
    arriving.paths, arriving.news = pair.paths, []
    destination = arriving.open(locked=False)
    with pytest.raises(OSError, match="another process"):
        get(destination, 0, 512)
    source.unlock()
    destination.lock()
    assert get(destination, 0, 4096) == b"s" * 4096
    put(destination, 4096, b"d" * 512)
    destination.unlock()
    source.lock()
    assert get(source, 4096, 512) == b"d" * 512
    source.close()
    destination.close()
    assert pair.same()
