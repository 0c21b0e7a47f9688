"""What lies between a device and its images: cache modes, zero detection, limits, stripes; and how options name them."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest

from qemu_user.backends.block.direct import DirectImage
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend, RawImage
from qemu_user.backends.block.throttle import Throttled
from qemu_user.backends.errors import BackendError
from qemu_user.config.errors import ConfigError
from qemu_user.config.machine_config import Drive
from qemu_user.config.qemu_options import Builder
from qemu_user.machine.drives import open_drive
from tests.framework.disk_tools import check, compare, needs_qemu_img

MIB = 1 << 20


def put(disk: BlockBackend, offset: int, data: bytes) -> None:
    disk.write(offset, [memoryview(data)])


def get(disk: BlockBackend, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read(offset, [memoryview(buffer)])
    return bytes(buffer)


def drive(text: str) -> Drive:
    builder = Builder()
    builder.drive(text)
    (made,) = builder.drives.values()
    builder.boot["kernel"] = "/dev/null"
    return made


# -- options ---------------------------------------------------------------------------------------


def test_options_by_qemus_names() -> None:
    made = drive(
        "file=a.img,format=raw,cache=none,discard=unmap,detect-zeroes=unmap,throttling.iops-total=100,"
        "throttling.iops-total-max=500,throttling.iops-total-max-length=10,bps_wr=1M,bps_rd=2M,iops_size=4096"
    )
    assert (made.cache, made.detect_zeroes, made.discard) == ("none", "unmap", True)
    assert made.limits == {
        "iops-total": 100, "iops-total-max": 500, "iops-total-max-length": 10, "bps-read": 2 * MIB, "bps-write": MIB,
        "iops-size": 4096,
    }  # fmt: skip
    made = drive("driver=mirror,file=a,file=b,degraded=on")
    assert (made.file, made.layout, made.members, made.degraded) == ("a", "mirror", ("a", "b"), True)
    made = drive("driver=stripe,file=a,file=b,file=c,chunk=128K")
    assert (made.layout, made.members, made.chunk) == ("stripe", ("a", "b", "c"), 128 << 10)
    assert drive("file=nbd://h/x,reconnect-delay=60").reconnect == 60


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file=a,cache=fast", "cache=fast: one of writeback"),
        ("file=a,detect-zeroes=maybe", "detect-zeroes=maybe"),
        ("file=a,detect-zeroes=unmap", "needs discard=unmap"),
        ("file=a,file=b", "driver=mirror or driver=stripe"),
        ("driver=mirror,file=a", "twice or more"),
        ("driver=mirror,file=a,file=a", "the same"),
        ("driver=stripe,file=a,file=b,chunk=5000", "power of two"),
        ("driver=raid5,file=a,file=b", "one of"),
        ("file=a,throttling.iops-total-max=5", "needs throttling.iops-total"),
        ("file=a,throttling.bps-read=5,throttling.bps-read-max=4", "less than"),
        ("file=a,throttling.bps-read=5,throttling.bps-read-max-length=4", "needs throttling.bps-read-max"),
        ("file=a,throttling.iops-total=5,throttling.iops-read=5", "one or the other"),
        ("file=a,throttling.iops-total=many", "expected a size"),
        ("file=a,reconnect-delay=99999", "reconnect-delay"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str, tmp_path: Path) -> None:
    kernel = tmp_path / "Image"
    kernel.write_bytes(b"x" * 100)

    def parse() -> None:
        builder = Builder()
        builder.drive(text)
        builder.boot["kernel"] = str(kernel)
        builder.finish()

    with pytest.raises(ConfigError, match=says):
        parse()


# -- cache modes -----------------------------------------------------------------------------------


class Syncs:
    """Counts what is asked of the host's disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = os.fdatasync

        def counted(fd: int) -> None:
            self.count += 1
            real(fd)

        monkeypatch.setattr(os, "fdatasync", counted)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("cache", "of_write", "of_flush"),
    [("writeback", 0, 1), ("none", 0, 1), ("writethrough", 1, 1), ("directsync", 1, 1), ("unsafe", 0, 0)],
)
def test_cache_modes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cache: str, of_write: int, of_flush: int
) -> None:
    path = tmp_path / f"d.{kind}"
    if kind == "raw":
        path.write_bytes(bytes(MIB))
    else:
        create_qcow2(path, MIB)
    syncs = Syncs(monkeypatch)
    dice = random.Random(1)
    content = bytearray(MIB)
    with closing(open_drive(Drive(file=str(path), cache=cache, discard=True))) as disk:
        put(disk, 0, b"f" * 512)
        content[:512] = b"f" * 512
        assert (syncs.count > 0) == bool(of_write)
        before = syncs.count
        disk.flush()
        assert (syncs.count > before) == bool(of_flush)
        for _ in range(60):
            length = 512 * dice.choice([1, 7, 8, 100])
            offset = 512 * dice.randrange((MIB - length) // 512)
            if dice.random() < 0.5:
                data = dice.randbytes(length)
                disk.write(offset, [memoryview(data)[:77], memoryview(data)[77:]])
                content[offset : offset + length] = data
            elif dice.random() < 0.2:
                disk.zero(offset, length, unmap=True)
                content[offset : offset + length] = bytes(length)
            else:
                assert get(disk, offset, length) == content[offset : offset + length]
    if kind == "raw":
        assert path.read_bytes() == content


@needs_qemu_img
def test_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 4 * MIB, cluster_bits=9)
    with closing(open_drive(Drive(file=str(path), cache="none"))) as disk:
        assert isinstance(disk.file, DirectImage)  # type: ignore[attr-defined]
        put(disk, 512 * 33, b"x" * 512 * 300)
    check(path)
    compare(path, bytes(512 * 33) + b"x" * 512 * 300 + bytes(4 * MIB - 512 * 333), tmp_path)


# -- zeroes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "on", "unmap"])
def test_detect_zeroes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "d.img"
    path.write_bytes(b"x" * MIB)
    os.sync()
    before = path.stat().st_blocks
    with closing(open_drive(Drive(file=str(path), discard=True, detect_zeroes=mode))) as disk:
        put(disk, 0, bytes(MIB // 2))
        put(disk, MIB // 2, bytes(65536) + b"y" * 512)
        disk.flush()
        assert get(disk, 0, MIB) == bytes(MIB // 2 + 65536) + b"y" * 512 + b"x" * (MIB // 2 - 65536 - 512)
    assert (path.stat().st_blocks < before) == (mode == "unmap")


# -- limits ----------------------------------------------------------------------------------------


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


def _limited(tmp_path: Path, **limits: int) -> tuple[Throttled, Clock]:
    path = tmp_path / "d"
    path.write_bytes(bytes(MIB))
    clock = Clock()
    named = {name.replace("_", "-"): value for name, value in limits.items()}
    return Throttled(RawImage(str(path)), named, clock.now, clock.sleep), clock


@pytest.mark.parametrize(
    ("limits", "requests", "length", "seconds"),
    [
        ({"iops_total": 100}, 200, 512, 2.0),
        ({"iops_read": 100}, 200, 512, 2.0),
        ({"iops_write": 100}, 200, 512, 0.0),
        ({"bps_total": 1 << 20}, 200, 65536, 12.5),
        ({"iops_total": 100, "iops_size": 4096}, 50, 16384, 2.0),
        ({"iops_total": 100, "bps_read": 65536}, 100, 4096, 6.25),
    ],
)
def test_limits_are_kept(tmp_path: Path, limits: dict[str, int], requests: int, length: int, seconds: float) -> None:
    disk, clock = _limited(tmp_path, **limits)
    for _ in range(requests):
        disk.read(0, [memoryview(bytearray(length))])
    taken = clock.time - 1000
    assert seconds - 0.15 <= taken <= seconds + 0.01
    disk.close()


def test_bursts(tmp_path: Path) -> None:
    disk, clock = _limited(tmp_path, iops_total=100, iops_total_max=1000, iops_total_max_length=3)
    for _ in range(2000):
        disk.write(0, [memoryview(bytes(512))])
    assert 1.8 <= clock.time - 1000 <= 2.01, "a burst goes at the higher rate"
    for _ in range(3000):
        disk.write(0, [memoryview(bytes(512))])
    assert clock.time - 1000 >= 15, "then the average rules"
    clock.time += 1000
    start = clock.time
    for _ in range(1000):
        disk.zero(0, 512, unmap=False)
    assert clock.time - start <= 1.01
    disk.close()


# -- stripes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3])
def test_stripe(tmp_path: Path, count: int) -> None:
    dice = random.Random(count)
    paths = [tmp_path / f"{number}.img" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(MIB + 4096 * number))
    config = Drive(file=str(paths[0]), layout="stripe", members=tuple(map(str, paths)), chunk=4096, discard=True)
    content = bytearray(MIB * count)
    with closing(open_drive(config)) as disk:
        assert disk.size == MIB * count
        for _ in range(200):
            length = 512 * dice.choice([1, 8, 9, 100, 400])
            offset = 512 * dice.randrange((disk.size - length) // 512)
            what = dice.choice(["write", "write", "zero", "read"])
            if what == "write":
                data = dice.randbytes(length)
                disk.write(offset, [memoryview(data)[:1000], memoryview(data)[1000:]])
                content[offset : offset + length] = data
            elif what == "zero":
                disk.zero(offset, length, unmap=True)
                content[offset : offset + length] = bytes(length)
            else:
                assert get(disk, offset, length) == content[offset : offset + length]
        disk.flush()
        with pytest.raises(BackendError, match="in use"):
            open_drive(config)
        for index, data in enumerate(disk.with_data(4096)):
            assert data or not any(content[4096 * index : 4096 * (index + 1)])
    chunks = [path.read_bytes() for path in paths]
    for index in range(len(content) // 4096):
        row = index // count * 4096
        assert chunks[index % count][row : row + 4096] == content[4096 * index : 4096 * (index + 1)]
    paths[1].unlink()
    with pytest.raises(BackendError, match="No such file"):
        open_drive(config)
    open_drive(Drive(file=str(paths[0]))).close()
