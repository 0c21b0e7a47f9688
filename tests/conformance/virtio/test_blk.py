"""Virtio 1.2, section 5.2: the block device. Test names begin with the section of the requirement."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from qemu_user.backends.block.logged import LoggedDisk
from qemu_user.backends.block.raw import RawImage
from qemu_user.devices.virtio import blk, mmio
from qemu_user.devices.virtio.blk import VirtioBlk
from tests.framework.devices import Bench
from tests.framework.virtio_driver import Driver

SECTORS = (1 << 20) // 512


class CountedImage(RawImage):
    """Counts flushes."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def _start(bench: Bench, features: int | None = None, **options: Any) -> tuple[Driver, VirtioBlk]:
    device = VirtioBlk("disk", bench.image(), **options)
    return bench.driver(bench.virtio(device)).start(features), device


def _request(driver: Driver, kind: int, sector: int, data: bytes = b"", room: int = 0, queue: int = 0) -> tuple[int, bytes]:
    """(status, data) of one request."""
    ring = driver.queues[queue]
    _, where = ring.add([struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])], [*([room] if room else []), 1])
    ring.kick()
    ((_, written),) = ring.returned()
    assert written <= room + 1
    return driver.get(where[-1], 1)[0], driver.get(where[0], room) if room else b""


def _config(driver: Driver, offset: int, size: int) -> int:
    return driver.read(mmio.CONFIG + offset, size)


def test_5_2_4_configuration(bench: Bench) -> None:
    driver, _ = _start(bench, queues=3, queue_size=128, block=1024, physical_block=8192)
    assert _config(driver, 0, 4) | _config(driver, 4, 4) << 32 == SECTORS
    assert _config(driver, 12, 4) == 126, "seg_max leaves room for header and status"
    assert _config(driver, 20, 4) == 1024
    assert _config(driver, 24, 1) == 3, "2^3 logical blocks are a physical one"
    assert _config(driver, 32, 1) == 1
    assert _config(driver, 34, 2) == 3
    assert len(driver.queues) == 3


def test_5_2_3_mq_is_offered_with_several_queues_only(bench: Bench) -> None:
    assert not bench.driver(bench.virtio(VirtioBlk("disk", bench.image()))).features() & blk.F_MQ
    assert bench.driver(bench.virtio(VirtioBlk("disk", bench.image(), queues=2))).features() & blk.F_MQ


def test_5_2_6_requests_of_every_queue_reach_the_disk(bench: Bench) -> None:
    driver, _ = _start(bench, queues=4)
    for number in range(4):
        assert _request(driver, blk.OUT, number, bytes([number]) * 512, queue=number) == (0, b"")
    for number in range(4):
        assert _request(driver, blk.IN, number, room=512, queue=3 - number) == (0, bytes([number]) * 512)


def test_5_2_5_2_writeback_follows_the_driver(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(8192))
    image = CountedImage(str(tmp_path / "d"))
    driver = bench.driver(bench.virtio(VirtioBlk("disk", image))).start()
    assert _request(driver, blk.OUT, 0, bytes(512))[0] == 0
    assert image.flushes == 0
    driver.write(mmio.CONFIG + blk.WRITEBACK_OFFSET, 0, 1)
    assert _config(driver, 32, 1) == 0
    assert _request(driver, blk.OUT, 0, bytes(512))[0] == 0
    assert image.flushes == 1, "a write is stable before it is completed"
    driver.write(mmio.CONFIG, 7, 1)
    assert _config(driver, 0, 4) == 16, "everything else is read-only"


def test_5_2_6_2_without_flush_every_write_is_stable(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(8192))
    image = CountedImage(str(tmp_path / "d"))
    driver = bench.driver(bench.virtio(VirtioBlk("disk", image))).start(0)
    assert _request(driver, blk.OUT, 0, bytes(512))[0] == 0
    assert image.flushes == 1


def test_5_2_6_2_flush(bench: Bench) -> None:
    driver, device = _start(bench)
    assert _request(driver, blk.FLUSH, 0) == (0, b"")
    assert device.counters["flushes"] == 1


def test_5_2_6_2_unknown_types_are_unsupported(bench: Bench) -> None:
    driver, _ = _start(bench)
    for kind in (2, 9, 10, 12, 14, 16, 0xFFFF_FFFF):
        assert _request(driver, kind, 0)[0] == blk.UNSUPP
    assert not driver.needs_reset


def test_5_2_6_2_device_id_is_twenty_bytes(bench: Bench) -> None:
    driver, _ = _start(bench, serial="a serial that is longer than twenty bytes")
    assert _request(driver, blk.GET_ID, 0, room=20) == (0, b"a serial that is lon")


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, 1 << 55, (1 << 64) - 1])
def test_5_2_6_2_what_lies_beyond_the_end_fails(bench: Bench, sector: int) -> None:
    driver, _ = _start(bench)
    assert _request(driver, blk.IN, sector, room=1024)[0] == blk.IOERR
    assert _request(driver, blk.OUT, sector, bytes(1024))[0] == blk.IOERR
    assert not driver.needs_reset


def test_5_2_6_1_segments_out_of_bounds_change_nothing(bench: Bench) -> None:
    driver, _ = _start(bench)
    before = _request(driver, blk.IN, 0, room=4096)[1]
    bad = struct.pack("<QIIQII", 0, 8, 0, SECTORS, 8, 0)
    assert _request(driver, blk.WRITE_ZEROES, 0, bad)[0] == blk.IOERR
    assert _request(driver, blk.IN, 0, room=4096)[1] == before, "the first segment was not done either"
    assert _request(driver, blk.WRITE_ZEROES, 0, struct.pack("<QII", 0, 8, 2))[0] == blk.UNSUPP
    assert _request(driver, blk.DISCARD, 0, struct.pack("<QII", 0, 8, 1))[0] == blk.UNSUPP


def test_5_2_6_2_discard_frees_and_zeroes_read_as_zero(bench: Bench) -> None:
    driver, _ = _start(bench)
    path = bench.tmp_path / "disk"
    assert _request(driver, blk.OUT, 0, b"x" * 65536)[0] == 0
    os.sync()
    before = path.stat().st_blocks
    assert _request(driver, blk.DISCARD, 0, struct.pack("<QII", 0, 128, 0))[0] == 0
    assert path.stat().st_blocks < before
    assert _request(driver, blk.WRITE_ZEROES, 0, struct.pack("<QIIQII", 256, 8, 0, 512, 8, 1))[0] == 0
    for sector in (256, 512):
        assert _request(driver, blk.IN, sector, room=4096) == (0, bytes(4096))


def test_5_2_4_resize_is_told(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(b"a" * 8192)
    device = VirtioBlk("disk", LoggedDisk(RawImage(str(tmp_path / "d"))))
    driver = bench.driver(bench.virtio(device)).start()
    generation, before = driver.read(mmio.CONFIG_GENERATION), bench.interrupts
    assert _request(driver, blk.IN, 16, room=512)[0] == blk.IOERR
    between = bench.interrupts
    device.resize(16384)
    assert bench.interrupts == between + 1 > before
    assert driver.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
    assert driver.read(mmio.CONFIG_GENERATION) != generation
    assert _config(driver, 0, 4) == 32
    assert _request(driver, blk.IN, 16, room=512) == (0, bytes(512))
    device.resize(4096)
    assert _request(driver, blk.IN, 8, room=512)[0] == blk.IOERR


def test_resize_of_what_cannot_be_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(bytes(8192))
    readonly = VirtioBlk("disk", LoggedDisk(RawImage(str(tmp_path / "d"), readonly=True)))
    bench.virtio(readonly)
    with pytest.raises(OSError, match="reading only"):
        readonly.resize(16384)
    disk = LoggedDisk(RawImage(str(tmp_path / "d2"), readonly=False)) if (tmp_path / "d2").write_bytes(bytes(512)) else None
    assert disk is not None
    disk.log.start()
    copied = VirtioBlk("disk", disk)
    bench.virtio(copied)
    with pytest.raises(OSError, match="being copied"):
        copied.resize(1024)


def test_5_2_6_1_requests_without_header_or_status_break_the_device(bench: Bench) -> None:
    for readable, writable in (([b"short"], [1]), ([bytes(16)], [])):
        driver, _ = _start(bench)
        driver.queues[0].add(readable, writable)
        driver.queues[0].kick()
        assert driver.needs_reset
