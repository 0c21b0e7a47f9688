"""What a guest has flushed is there after kill -9 and after a power failure, wherever they strike; images stay whole."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_user.backends.block.mirror import GOOD, MirrorDisk
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend, RawImage
from qemu_user.config.machine_config import Drive
from qemu_user.machine.drives import open_drive
from tests.framework.disk_crash import SECTORS, content, steps, verify
from tests.framework.disk_tools import check, needs_qemu_img

SIZE = 512 * SECTORS
ROOT = Path(__file__).parents[4]


def _raw(folder: Path) -> tuple[str, dict[str, Any], bytes]:
    (folder / "d.raw").write_bytes(bytes(SIZE))
    return str(folder / "d.raw"), {}, bytes(SIZE)


def _qcow2(folder: Path) -> tuple[str, dict[str, Any], bytes]:
    create_qcow2(folder / "d.qcow2", SIZE, cluster_bits=10)
    return str(folder / "d.qcow2"), {}, bytes(SIZE)


def _overlay(folder: Path) -> tuple[str, dict[str, Any], bytes]:
    before = random.Random(1).randbytes(SIZE)
    (folder / "base.raw").write_bytes(before)
    create_qcow2(folder / "d.qcow2", SIZE, "base.raw", "raw", cluster_bits=12)
    return str(folder / "d.qcow2"), {}, before


def _mirror(folder: Path) -> tuple[str, dict[str, Any], bytes]:
    (folder / "a.raw").write_bytes(bytes(SIZE))
    create_qcow2(folder / "b.qcow2", SIZE, cluster_bits=12)
    return str(folder / "a.raw"), {"layout": "mirror", "members": (str(folder / "a.raw"), str(folder / "b.qcow2"))}, bytes(SIZE)


def _opened(file: str, options: dict[str, Any]) -> BlockBackend:
    return open_drive(Drive(file=file, discard=True, **options))


Maker = Callable[[Path], tuple[str, dict[str, Any], bytes]]
DISKS: dict[str, Maker] = {"raw": _raw, "qcow2": _qcow2, "overlay": _overlay, "mirror": _mirror}


def whole(disk: BlockBackend) -> bytes:
    buffer = bytearray(disk.size)
    disk.read(0, [memoryview(buffer)])
    return bytes(buffer)


def _kill_once(file: str, options: dict[str, Any], seed: int, dice: random.Random) -> tuple[int, int]:
    """Run the guest and kill it; (operations flushed, operations that it may have begun)."""
    command = [sys.executable, "-m", "tests.framework.disk_crash", str(seed), file, json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as guest:
        assert guest.stdout is not None
        first = guest.stdout.readline()
        assert first == b"ready\n", "the guest did not start"
        told = [guest.stdout.readline().rstrip() for _ in range(dice.randrange(80))]
        time.sleep(dice.uniform(0, 0.004))
        guest.kill()
        told += guest.stdout.read().split(b"\n")[:-1]
        assert guest.wait() == -9
    flushed = int(told[-1]) if told else 0
    # It can have begun what comes up to the next flush, and that one may be done without having been told.
    begun, more = flushed, 0
    for number, step in enumerate(steps(seed)):
        if number > flushed and step.kind == "flush":
            more += 1
        begun = number
        if more == 2:
            break
    return flushed, begun


def _kills(folder: Path, kind: str, times: int) -> None:
    dice = random.Random(kind)
    file, options, before = DISKS[kind](folder)
    for seed in range(times):
        flushed, begun = _kill_once(file, options, seed, dice)
        if file.endswith(".qcow2"):
            check(Path(file), leaks=True)
        disk = _opened(file, options)
        found = whole(disk)
        if isinstance(disk, MirrorDisk):
            end = time.monotonic() + 60
            while any(role != GOOD for _, role in disk.status()):
                assert time.monotonic() < end, "members are not brought up to date"
                time.sleep(0.01)
            for member in disk.members:
                assert member.disk is not None
                assert whole(member.disk) == found, f"{member.name} differs from the mirror"
        disk.close()
        verify(found, seed, flushed, begun, before)
        before = found


@needs_qemu_img
@pytest.mark.parametrize("kind", DISKS)
def test_kill_9_loses_nothing_that_was_flushed(tmp_path: Path, kind: str) -> None:
    _kills(tmp_path, kind, 6)


@pytest.mark.slow
@needs_qemu_img
@pytest.mark.parametrize("kind", DISKS)
def test_two_hundred_kills(tmp_path: Path, kind: str) -> None:
    _kills(tmp_path, kind, 200)


class Platter:
    """A file whose writes reach the disk when they are flushed, or any time before, in any order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.stable = bytearray(path.read_bytes())
        self.waiting: list[tuple[int, bytes]] = []
        self.failing: Callable[[], None] = lambda: None
        """Called before waiting writes are made to reach the disk."""
        write, flush = RawImage.write, RawImage.flush

        def logged_write(image: RawImage, offset: int, views: list[memoryview]) -> None:
            if os.path.samefile(image.path, path):
                self.waiting.append((offset, b"".join(views)))
            write(image, offset, views)

        def logged_flush(image: RawImage) -> None:
            flush(image)
            if os.path.samefile(image.path, path):
                self.failing()
                for offset, data in self.waiting:
                    self._put(self.stable, offset, data)
                self.waiting = []

        def no_punch(image: RawImage, offset: int, length: int) -> None:
            pass  # whether holes reach the disk makes no difference to what is read

        monkeypatch.setattr(RawImage, "write", logged_write)
        monkeypatch.setattr(RawImage, "flush", logged_flush)
        monkeypatch.setattr(RawImage, "punch", no_punch)

    @staticmethod
    def _put(where: bytearray, offset: int, data: bytes) -> None:
        if len(where) < offset:
            where.extend(bytes(offset - len(where)))
        where[offset : offset + len(data)] = data

    def after_power_failure(self, dice: random.Random) -> bytes:
        """What the disk may hold: some of the waiting writes, sector by sector, in any order."""
        result = bytearray(self.stable)
        chance = dice.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        sectors = [
            (offset + at, data[at : at + 512]) for offset, data in self.waiting for at in range(0, len(data), 512)
        ]
        # sectors of one place keep their order; which of them arrive is chance
        for offset, data in sectors:
            if dice.random() < chance:
                self._put(result, offset, data)
        end = max([len(self.stable), *(offset + len(data) for offset, data in self.waiting)])
        result.extend(bytes(end - len(result)))
        return bytes(result)


@needs_qemu_img
@pytest.mark.parametrize("kind", ["qcow2", "overlay"])
@pytest.mark.parametrize("seed", range(3))
def test_power_failures_lose_nothing_that_was_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, seed: int
) -> None:
    file, options, before = DISKS[kind](tmp_path)
    platter = Platter(monkeypatch, Path(file))
    dice = random.Random(seed)
    disk = _opened(file, options)
    flushed = 0
    crashes: list[tuple[bytes, int, int]] = []
    stages: list[bytes] = []

    def failing() -> None:
        if dice.random() < 0.3:
            stages.append(platter.after_power_failure(dice))

    platter.failing = failing
    for number, step in zip(range(300), steps(seed), strict=False):
        offset, length = 512 * step.sector, 512 * step.count
        if step.kind == "write":
            disk.write(offset, [memoryview(content(number, step))])
        elif step.kind == "zero":
            disk.zero(offset, length, unmap=False)
        elif step.kind == "discard":
            disk.punch(offset, length)
        else:
            disk.flush()
        crashes += [(image, flushed, number + 1) for image in stages]
        stages.clear()
        if step.kind == "flush":
            flushed = number
        elif dice.random() < 0.05:
            crashes.append((platter.after_power_failure(dice), flushed, number + 1))
    disk.close()
    monkeypatch.undo()
    assert len(crashes) > 30
    for image, sure, begun in crashes:
        Path(file).write_bytes(image)
        check(Path(file), leaks=True)
        disk = open_disk(file, readonly=True)
        verify(whole(disk), seed, sure, begun, before)
        disk.close()
