"""Virtio 1.2, chapter 2: status, features, split virtqueues; and what the device does when a driver breaks the rules.

Test names begin with the section of the requirement.
"""

from __future__ import annotations

import random
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

from qemu_user.backends.net.backend import NetBackend
from qemu_user.devices.virtio import mmio
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_RESET
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.transport import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET
from tests.framework.devices import Bench, MemoryChardev
from tests.framework.virtio_driver import INDIRECT, NEXT, RAM_BASE, RAM_SIZE, WRITE, Driver, DriverQueue


def _rng(bench: Bench, features: int | None = None, size: int = 8) -> tuple[Driver, DriverQueue]:
    driver = bench.driver(bench.virtio(VirtioRng("rng"))).start(features, size)
    return driver, driver.queues[0]


def _used_flags(driver: Driver, queue: DriverQueue) -> int:
    return int.from_bytes(driver.get(queue.used, 2), "little")


def _available_event(driver: Driver, queue: DriverQueue) -> int:
    return int.from_bytes(driver.get(queue.used + 4 + 8 * queue.size, 2), "little")


# -- 2.1 device status -----------------------------------------------------------------------------


def test_2_1_1_status_bits_are_not_cleared_but_by_reset(bench: Bench) -> None:
    driver, _ = _rng(bench)
    everything = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    driver.write(mmio.STATUS, ACKNOWLEDGE)
    assert driver.read(mmio.STATUS) == everything
    driver.write(mmio.STATUS, 0)
    assert driver.read(mmio.STATUS) == 0


def test_2_1_2_nothing_is_consumed_before_driver_ok(bench: Bench) -> None:
    driver, queue = _rng(bench)
    driver.write(mmio.STATUS, 0)
    queue.add([], [16])
    queue.kick()
    assert queue.returned() == []


def test_2_1_2_needs_reset_is_told_by_a_configuration_interrupt(bench: Bench) -> None:
    driver, queue = _rng(bench)
    queue.offer(200)
    before = bench.interrupts
    queue.kick()
    assert driver.needs_reset
    assert bench.interrupts == before + 1
    assert driver.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE


def test_2_1_2_a_driver_cannot_set_needs_reset(bench: Bench) -> None:
    driver, queue = _rng(bench)
    driver.write(mmio.STATUS, driver.read(mmio.STATUS) | NEEDS_RESET)
    assert not driver.needs_reset
    queue.add([], [16])
    queue.kick()
    assert queue.returned() == [(0, 16)]


# -- 2.2 features ----------------------------------------------------------------------------------


def test_2_2_2_features_that_are_not_offered_are_refused(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioRng("rng")))
    driver.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
    for select, value in ((0, 1), (1, 1)):
        driver.write(mmio.DRIVER_FEATURES_SEL, select)
        driver.write(mmio.DRIVER_FEATURES, value)
    driver.write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert not driver.read(mmio.STATUS) & FEATURES_OK


def test_2_2_1_features_do_not_change_after_features_ok(bench: Bench) -> None:
    driver, queue = _rng(bench, features=0)
    driver.write(mmio.DRIVER_FEATURES_SEL, 0)
    driver.write(mmio.DRIVER_FEATURES, F_INDIRECT_DESC)
    queue.add([], [16], indirect=True)
    queue.kick()
    assert driver.needs_reset, "indirect descriptors were not negotiated"


# -- 2.4, 2.6.1 reset ------------------------------------------------------------------------------


def test_2_4_1_reset_makes_everything_as_new(bench: Bench) -> None:
    driver, queue = _rng(bench)
    queue.add([], [16])
    queue.kick()
    driver.write(mmio.STATUS, 0)
    for index in range(4):
        driver.write(mmio.QUEUE_SEL, index)
        assert driver.read(mmio.QUEUE_READY) == 0
    driver.start(size=8)
    driver.queues[0].add([], [16])
    driver.queues[0].kick()
    assert driver.queues[0].returned() == [(0, 16)]


def test_2_6_1_1_a_queue_is_reset_and_used_again(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioBlk("disk", bench.image(), queues=2))).start(size=8)
    first, second = driver.queues
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_RESET, 1)
    assert driver.read(mmio.QUEUE_READY) == 0
    header = struct.pack("<IIQ", 0, 0, 0)
    for queue in (first, second):
        queue.add([header], [512, 1])
        queue.kick()
    assert first.returned() == []
    assert second.returned() == [(0, 513)], "the other queue goes on"
    assert not driver.needs_reset


def test_2_6_1_without_ring_reset_the_register_does_nothing(bench: Bench) -> None:
    driver, queue = _rng(bench, features=0)
    assert driver.features() & F_RING_RESET
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_RESET, 1)
    queue.add([], [16])
    queue.kick()
    assert queue.returned() == [(0, 16)]


# -- 2.7 split virtqueues --------------------------------------------------------------------------


def test_2_7_indices_wrap(bench: Bench) -> None:
    driver, queue = _rng(bench, size=4)
    for _ in range(0x1_0000 // 4 + 2):
        for _ in range(4):
            queue.add([], [1])
        queue.kick()
        assert len(queue.returned()) == 4
    assert not driver.needs_reset


def test_2_7_4_2_messages_may_be_cut_anywhere(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioBlk("disk", bench.image()))).start()
    header, choice = struct.pack("<IIQ", 0, 0, 3), random.Random(1)
    for _ in range(50):
        cuts = sorted(choice.sample(range(1, 16), 3))
        pieces = [header[a:b] for a, b in zip([0, *cuts], [*cuts, 16], strict=True)]
        middle = choice.randrange(1, 512)
        _, where = driver.queues[0].add(pieces, [middle, 512 - middle, 1])
        driver.queues[0].kick()
        assert driver.queues[0].returned()[0][1] == 513
        assert driver.get(where[0], middle) + driver.get(where[1], 512 - middle) == bytes(range(256)) * 2
    assert not driver.needs_reset


def test_2_7_5_3_1_indirect_tables(bench: Bench) -> None:
    driver, queue = _rng(bench, size=2)
    for _ in range(10):
        queue.add([], [8, 8, 8], indirect=True)  # longer than the ring would allow
        queue.kick()
        assert queue.returned()[0][1] == 24
    assert driver.needs_reset is False


def test_2_7_7_2_no_interrupt_is_a_hint_that_is_heeded(bench: Bench) -> None:
    driver, queue = _rng(bench, features=0)
    driver.put(queue.available, struct.pack("<H", 1))
    before = bench.interrupts
    queue.add([], [16])
    queue.kick()
    assert queue.returned()
    assert bench.interrupts == before
    driver.put(queue.available, struct.pack("<H", 0))
    queue.add([], [16])
    queue.kick()
    assert bench.interrupts == before + 1


def test_2_7_7_2_used_event_decides_with_event_idx(bench: Bench) -> None:
    driver, queue = _rng(bench, features=F_EVENT_IDX)
    interrupts = []
    for number in range(6):
        driver.put(queue.available + 4 + 2 * queue.size, struct.pack("<H", 3))
        before = bench.interrupts
        queue.add([], [16])
        queue.kick()
        interrupts.append(bench.interrupts - before)
        assert len(queue.returned()) == 1, number
    # The first is always told (nothing is known of before), then only the one that reaches used_event.
    assert interrupts == [1, 0, 0, 1, 0, 0]


def test_2_7_10_1_used_flags_without_event_idx(bench: Bench) -> None:
    driver, queue = _rng(bench, features=0)
    queue.add([], [16])
    queue.kick()
    assert _used_flags(driver, queue) == 0, "notifications are wanted while the device waits"


def test_2_7_10_1_avail_event_follows_the_device(bench: Bench) -> None:
    driver, queue = _rng(bench, features=F_EVENT_IDX)
    for number in range(1, 20):
        queue.add([], [16])
        queue.kick()
        assert _available_event(driver, queue) == number
    assert _used_flags(driver, queue) == 0


# -- drivers that break the rules ------------------------------------------------------------------


def _two(queue: DriverQueue, second: int, flags: int = 0) -> None:
    queue.descriptor(0, RAM_BASE, 16, NEXT | WRITE, 1)
    queue.descriptor(1, RAM_BASE, 16, flags | WRITE, second)
    queue.offer(0)


def _indirect(queue: DriverQueue, *entries: tuple[int, int, int, int]) -> None:
    table, length = queue.allocate(b"".join(struct.pack("<QIHH", *entry) for entry in entries))
    queue.descriptor(0, table, length, INDIRECT)
    queue.offer(0)


BROKEN: dict[str, Callable[[Driver, DriverQueue], Any]] = {
    "2_7_5_1_loop": lambda d, q: _two(q, 0, NEXT),
    "2_7_5_1_loop_on_itself": lambda d, q: (q.descriptor(0, RAM_BASE, 16, NEXT | WRITE, 0), q.offer(0)),
    "2_7_5_next_out_of_range": lambda d, q: _two(q, 64, NEXT),
    "2_7_6_head_out_of_range": lambda d, q: q.offer(0xFFFF),
    "2_7_13_more_than_the_ring_holds": lambda d, q: d.put(q.available + 2, struct.pack("<H", 9)),
    "2_7_13_index_going_back": lambda d, q: d.put(q.available + 2, struct.pack("<H", 0xFFFF)),
    "2_7_5_address_below_ram": lambda d, q: (q.descriptor(0, RAM_BASE - 8, 16, WRITE), q.offer(0)),
    "2_7_5_address_across_the_end": lambda d, q: (q.descriptor(0, RAM_BASE + RAM_SIZE - 8, 16, WRITE), q.offer(0)),
    "2_7_5_address_wraps": lambda d, q: (q.descriptor(0, (1 << 64) - 8, 16, WRITE), q.offer(0)),
    "2_7_5_absurd_length": lambda d, q: (q.descriptor(0, RAM_BASE, 0xFFFF_FFFF, WRITE), q.offer(0)),
    "2_7_4_2_readable_after_writable": lambda d, q: (
        q.descriptor(0, RAM_BASE, 16, NEXT | WRITE, 1), q.descriptor(1, RAM_BASE, 16, 0), q.offer(0)
    ),
    "2_7_5_3_1_indirect_and_next": lambda d, q: (q.descriptor(0, RAM_BASE, 16, INDIRECT | NEXT, 1), q.offer(0)),
    "2_7_5_3_1_nested": lambda d, q: _indirect(q, (RAM_BASE, 16, INDIRECT, 0)),
    "2_7_5_3_1_odd_length": lambda d, q: (q.descriptor(0, RAM_BASE, 24, INDIRECT), q.offer(0)),
    "2_7_5_3_1_empty_table": lambda d, q: (q.descriptor(0, RAM_BASE, 0, INDIRECT), q.offer(0)),
    "2_7_5_3_1_table_outside": lambda d, q: (q.descriptor(0, 0, 16, INDIRECT), q.offer(0)),
    "2_7_5_3_1_loop_in_the_table": lambda d, q: _indirect(q, (RAM_BASE, 16, NEXT | WRITE, 0)),
    "2_7_5_3_1_next_outside_the_table": lambda d, q: _indirect(q, (RAM_BASE, 16, NEXT | WRITE, 1)),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_2_1_2_a_broken_rule_needs_a_reset_and_nothing_else(bench: Bench, how: str) -> None:
    driver, queue = _rng(bench)
    warnings: list[str] = []
    transport = driver.device.transport
    assert transport is not None
    transport.warn = warnings.append
    BROKEN[how](driver, queue)
    queue.kick()
    assert driver.needs_reset
    assert [sentence.startswith("device rng: the guest's driver broke a rule") for sentence in warnings] == [True]
    assert driver.device.counters["driver_errors"] == 1
    queue.kick()
    assert queue.returned() == []
    assert driver.device.counters["driver_errors"] == 1, "it rests until it is reset"
    driver.start()
    assert not driver.needs_reset
    driver.queues[0].add([], [16])
    driver.queues[0].kick()
    assert driver.queues[0].returned() == [(0, 16)]


def test_rings_that_change_while_they_are_read(bench: Bench) -> None:
    """A second vCPU rewrites descriptors and indices under the device's eyes: it may stop, it never raises."""
    device = VirtioBlk("disk", bench.image())
    driver = bench.driver(bench.virtio(device))
    stop = threading.Event()

    def spoil() -> None:
        choice = random.Random(5)
        while not stop.is_set():
            table = driver.queues[0].table if driver.queues else RAM_BASE
            driver.put(table + 16 * choice.randrange(8), choice.randbytes(16))
            driver.put(table + 16 * choice.randrange(8) + 12, struct.pack("<HH", choice.getrandbits(3), choice.randrange(9)))

    thread = threading.Thread(target=spoil, daemon=True)
    thread.start()
    broken = 0
    try:
        for _ in range(60):
            driver.start(size=8)
            queue = driver.queues[0]
            for _ in range(20):
                queue.add([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
                queue.kick()
                if driver.needs_reset:
                    broken += 1
                    break
    finally:
        stop.set()
        thread.join()
    driver.start()
    driver.queues[0].add([struct.pack("<IIQ", 0, 0, 0)], [512, 1])
    driver.queues[0].kick()
    assert driver.queues[0].returned() == [(0, 513)]


@pytest.mark.parametrize("which", [mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW])
@pytest.mark.parametrize("address", [0, 0xFFFFFFFF, RAM_BASE + 1, RAM_BASE + RAM_SIZE - 8])
def test_2_7_rings_in_bad_places(bench: Bench, which: int, address: int) -> None:
    driver, _ = _rng(bench)
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_READY, 0)
    driver.write(which, address)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.needs_reset
    assert driver.read(mmio.QUEUE_READY) == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_rings_never_raise(bench: Bench, seed: int) -> None:
    """Rings full of noise, on every device and queue."""
    choice = random.Random(seed)
    wire = NetBackend("wire")
    ports = [(0, "", MemoryChardev()), (1, "one", MemoryChardev())]
    devices = [
        VirtioBlk("disk", bench.image()),
        VirtioNet("net", wire, bytes(6)),
        VirtioRng("rng"),
        VirtioConsole("console", ports),
    ]
    for transport in [bench.virtio(device) for device in devices]:
        driver = bench.driver(transport)
        for _ in range(30):
            driver.start(None if choice.random() < 0.5 else 0, size=choice.choice((1, 4, 64)))
            for queue in driver.queues:
                for index in range(queue.size):
                    address = choice.choice((RAM_BASE + choice.randrange(RAM_SIZE), choice.getrandbits(64)))
                    length = choice.choice((0, 1, 12, 16, 512, 4096, choice.getrandbits(32)))
                    queue.descriptor(index, address, length, choice.getrandbits(3), choice.randrange(queue.size + 1))
                for _ in range(choice.randrange(queue.size + 1)):
                    queue.offer(choice.randrange(queue.size))
                queue.kick()
            wire.frontend.receive(memoryview(bytes(choice.randrange(14, 3000))))
            for _, _, chardev in ports:
                chardev.feed(b"keys")
