"""Virtio 1.2, sections 2.7 and 5.2: a disk whose requests overlap. They may be answered in any order; a reset ends them all."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_user.backends.block.logged import LoggedDisk
from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.block.throttle import Throttled
from qemu_user.backends.io_threads import IoThreads
from qemu_user.backends.workers import MOST
from qemu_user.devices.virtio import blk, mmio
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.flight import Flight
from tests.framework.devices import Bench
from tests.framework.virtio_driver import Driver

SECONDS = 20.0


def fail(error: BaseException) -> None:
    raise error


class SlowImage(RawImage):
    """Nothing is in the page cache; what waits for the disk goes on when it is let."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.begun: list[tuple[str, int]] = []
        self.let: set[int] = set()
        self.changed = threading.Condition()

    @property
    def waits(self) -> bool:
        return True

    def _wait(self, what: str, offset: int) -> None:
        with self.changed:
            self.begun.append((what, offset))
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: offset in self.let, SECONDS)

    def release(self, *offsets: int) -> None:
        with self.changed:
            self.let.update(offsets)
            self.changed.notify_all()

    def await_begun(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, SECONDS), self.begun

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        return False

    def read(self, offset: int, views: list[memoryview]) -> None:
        self._wait("read", offset)
        super().read(offset, views)

    def write(self, offset: int, views: list[memoryview]) -> None:
        self._wait("write", offset)
        super().write(offset, views)

    def flush(self) -> None:
        self._wait("flush", -1)


class Disk:
    """A slow disk of 1 MiB whose sector n is full of n, and its driver."""

    def __init__(self, bench: Bench, folder: Path, queues: int = 2) -> None:
        path = folder / "slow.raw"
        path.write_bytes(b"".join(bytes([number & 0xFF]) * 512 for number in range(2048)))
        self.image = SlowImage(str(path))
        self.threads = IoThreads(fail)
        self.device = VirtioBlk("disk", LoggedDisk(self.image), queues=queues)
        self.device.workers = self.threads.workers("disk")
        self.driver: Driver = bench.driver(bench.virtio(self.device)).start()
        self.returned: list[list[int]] = [[] for _ in range(queues)]

    def ask(self, kind: int, sector: int, data: bytes = b"", room: int = 0, queue: int = 0) -> tuple[int, list[int]]:
        ring = self.driver.queues[queue]
        header = struct.pack("<IIQ", kind, 0, sector)
        head, where = ring.add([header, *([data] if data else [])], [*([room] if room else []), 1])
        ring.kick()
        return head, where

    def answers(self, count: int, queue: int = 0) -> list[int]:
        """The heads that have come back, in their order, when there are so many."""
        end = time.monotonic() + SECONDS
        found = self.returned[queue]
        while len(found) < count:
            found += [head for head, _ in self.driver.queues[queue].returned()]
            assert time.monotonic() < end, f"{len(found)} of {count} answers"
            time.sleep(0.001)
        return found


@pytest.fixture
def disk(bench: Bench, tmp_path: Path) -> Iterator[Disk]:
    made = Disk(bench, tmp_path)
    yield made
    made.image.release(-1, *range(0, 1 << 20, 512))
    made.threads.join(SECONDS)
    made.threads.close()
    made.image.close()


def test_5_2_6_requests_of_one_queue_overlap_and_end_in_any_order(disk: Disk) -> None:
    asked = [disk.ask(blk.IN, sector, room=512) for sector in range(8)]
    disk.image.await_begun(8)
    heads = []
    for sector in (5, 0, 7, 2, 1, 6, 3, 4):
        disk.image.release(512 * sector)
        heads.append(asked[sector][0])
        assert disk.answers(len(heads)) == heads
    for sector, (_, where) in enumerate(asked):
        assert disk.driver.get(where[-1], 1) == b"\0"
        assert disk.driver.get(where[0], 512) == bytes([sector]) * 512


def test_5_2_6_a_flush_holds_up_neither_reads_nor_the_other_queue(disk: Disk) -> None:
    disk.ask(blk.FLUSH, 0)
    disk.image.await_begun(1)
    read, _ = disk.ask(blk.IN, 3, room=512)
    other, _ = disk.ask(blk.IN, 4, room=512, queue=1)
    disk.image.release(512 * 3, 512 * 4)
    assert disk.answers(1) == [read]
    assert disk.answers(1, queue=1) == [other]


def test_more_requests_than_workers_all_come_to_an_end(disk: Disk) -> None:
    heads = [disk.ask(blk.OUT, sector, bytes([sector]) * 512, queue=sector & 1)[0] for sector in range(MOST + 4)]
    disk.image.await_begun(MOST)
    disk.image.release(*range(0, 1 << 20, 512))
    assert sorted(disk.answers((MOST + 4) // 2)) == sorted(heads[0::2])
    assert sorted(disk.answers((MOST + 4) // 2, queue=1)) == sorted(heads[1::2])
    assert disk.device.counters["writes"] == MOST + 4


def test_an_error_is_that_requests_own(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(offset: int, views: list[memoryview]) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(disk.image, "read", broken)
    _, where = disk.ask(blk.IN, 1, room=512)
    disk.answers(1)
    assert disk.driver.get(where[-1], 1) == bytes([blk.IOERR])
    assert disk.device.counters["errors"] == 1


def _later(call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_2_4_2_a_reset_waits_for_what_is_under_way_and_nothing_comes_after_it(disk: Disk) -> None:
    _, where = disk.ask(blk.IN, 9, room=512)
    disk.image.await_begun(1)
    ring = disk.driver.queues[0]
    done: list[bool] = []
    resetter = _later(lambda: (disk.driver.write(mmio.STATUS, 0), done.append(True))[0])
    time.sleep(0.05)
    assert not done, "the device still writes to the driver's memory"
    disk.image.release(512 * 9)
    resetter.join(SECONDS)
    assert done
    before = disk.driver.get(where[0], 512)
    disk.threads.join(SECONDS)
    assert disk.driver.get(where[0], 512) == before
    assert ring.returned() == []


def test_2_6_1_a_queues_reset_loses_nothing_of_the_others(disk: Disk) -> None:
    disk.ask(blk.IN, 1, room=512)
    other, _ = disk.ask(blk.IN, 2, room=512, queue=1)
    disk.image.await_begun(2)

    def reset() -> None:
        with disk.device.transport.lock:
            disk.device.queues[0].reset()
            disk.device.queue_reset(0)

    resetter = _later(reset)
    disk.image.release(512, 1024)
    resetter.join(SECONDS)
    assert disk.answers(1, queue=1) == [other]


def test_a_machine_that_stands_has_nothing_under_way(disk: Disk) -> None:
    disk.ask(blk.IN, 1, room=512)
    disk.image.await_begun(1)
    threading.Timer(0.05, lambda: disk.image.release(512)).start()
    with disk.threads.frozen():
        assert len(disk.driver.queues[0].returned()) == 1
        assert disk.device.queues[0].save().next_used == 1


def test_requests_under_way_are_noted_until_they_are_answered(disk: Disk) -> None:
    queue = disk.device.queues[0]
    queue.note_in(Flight(memoryview(bytearray(Flight.size(queue.size)))))
    assert queue.flight is not None
    heads = [disk.ask(blk.OUT, sector, b"x" * 512)[0] for sector in range(3)]
    disk.image.await_begun(3)
    assert [head for head in range(queue.size) if queue.flight.heads[head]] == sorted(heads)
    disk.image.release(512)
    disk.answers(1)
    assert [head for head in range(queue.size) if queue.flight.heads[head]] == sorted({heads[0], heads[2]})


def test_a_throttled_request_holds_up_no_flush(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "t.raw"
    path.write_bytes(bytes(1 << 20))
    go = threading.Event()
    image = Throttled(RawImage(str(path)), {"iops-total": 1}, sleep=lambda seconds: go.wait(SECONDS) and None)
    threads = IoThreads(fail)
    device = VirtioBlk("disk", image)
    device.workers = threads.workers("disk")
    driver = bench.driver(bench.virtio(device)).start()
    slow: Any = Disk.__new__(Disk)
    slow.driver, slow.returned = driver, [[]]
    reads = [slow.ask(blk.IN, 0, room=512)[0] for _ in range(3)]
    flush, _ = slow.ask(blk.FLUSH, 0)
    end = time.monotonic() + SECONDS
    while flush not in slow.returned[0]:
        slow.returned[0] += [head for head, _ in driver.queues[0].returned()]
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(slow.returned[0]) < 4, "the reads wait for their turn"
    go.set()
    assert sorted(slow.answers(4)) == sorted([*reads, flush])
    threads.join(SECONDS)
    threads.close()
    image.close()
