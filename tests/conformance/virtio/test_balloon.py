"""Virtio 1.2, section 5.5: the memory balloon. Test names begin with the section of the requirement."""

from __future__ import annotations

import os
import struct

import pytest

from qemu_user.devices.virtio import balloon, mmio
from qemu_user.devices.virtio.balloon import PAGE, VirtioBalloon
from tests.framework.devices import Bench
from tests.framework.virtio_driver import RAM_BASE, RAM_SIZE, WRITE, Driver

FIRST = (RAM_BASE + 0xC0000) // PAGE
"""Of pages that the rings do not use."""


def _start(bench: Bench, features: int | None = None) -> tuple[Driver, VirtioBalloon]:
    device = VirtioBalloon("balloon", bench.memory)
    return bench.driver(bench.virtio(device)).start(features, size=16), device


def _fill(driver: Driver, page: int, count: int = 1) -> None:
    driver.put(page * PAGE, os.urandom(PAGE * count))


def _is_zero(driver: Driver, page: int) -> bool:
    return driver.get(page * PAGE, PAGE) == bytes(PAGE)


def _inflate(driver: Driver, *pages: int) -> None:
    driver.queues[balloon.INFLATE].add([struct.pack(f"<{len(pages)}I", *pages)], [])
    driver.queues[balloon.INFLATE].kick()
    assert len(driver.queues[balloon.INFLATE].returned()) == 1


def test_5_5_6_inflated_pages_are_given_back(bench: Bench) -> None:
    driver, device = _start(bench)
    _fill(driver, FIRST, 8)
    _inflate(driver, FIRST + 3, FIRST + 2, FIRST + 5, FIRST + 3)
    assert [_is_zero(driver, FIRST + page) for page in range(8)] == [False, False, True, True, False, True, False, False]
    assert device.counters["discarded_bytes"] == 3 * PAGE


def test_5_5_6_deflated_pages_are_the_drivers_again(bench: Bench) -> None:
    driver, _ = _start(bench)
    _inflate(driver, FIRST)
    driver.queues[balloon.DEFLATE].add([struct.pack("<I", FIRST)], [])
    driver.queues[balloon.DEFLATE].kick()
    assert driver.queues[balloon.DEFLATE].returned() == [(0, 0)]
    _fill(driver, FIRST)
    assert not _is_zero(driver, FIRST)


def test_5_5_6_1_the_target_is_told_and_the_actual_size_kept(bench: Bench) -> None:
    driver, device = _start(bench)
    told: list[int] = []
    device.changed = told.append
    before = bench.interrupts
    device.set_target(64)
    assert bench.interrupts == before + 1
    assert driver.read(mmio.CONFIG, 4) == 64
    driver.write(mmio.CONFIG + balloon.ACTUAL_OFFSET, 60)
    assert told == [60]
    assert driver.read(mmio.CONFIG + 4, 4) == 60
    driver.write(mmio.CONFIG, 1)
    assert driver.read(mmio.CONFIG, 4) == 64, "the target is ours"


@pytest.mark.parametrize("queue", [2, 3, 4])
def test_5_5_6_7_reported_pages_are_given_back(bench: Bench, queue: int) -> None:
    driver, _ = _start(bench)
    _fill(driver, FIRST, 4)
    ring = driver.queues[queue]
    ring.descriptor(0, FIRST * PAGE, 2 * PAGE, WRITE)
    ring.offer(0)
    ring.kick()
    assert ring.returned() == [(0, 0)]
    assert [_is_zero(driver, FIRST + page) for page in range(4)] == [True, True, False, False]


def test_5_5_6_7_nothing_is_given_back_without_the_feature(bench: Bench) -> None:
    driver, _ = _start(bench, features=0)
    _fill(driver, FIRST)
    ring = driver.queues[2]
    ring.descriptor(0, FIRST * PAGE, PAGE, WRITE)
    ring.offer(0)
    ring.kick()
    assert not _is_zero(driver, FIRST)


def test_pages_that_are_not_there_cost_nothing(bench: Bench) -> None:
    driver, device = _start(bench)
    _fill(driver, FIRST)
    _inflate(driver, 0, 0xFFFF_FFFF, RAM_BASE // PAGE - 1, (RAM_BASE + RAM_SIZE) // PAGE, FIRST)
    assert device.counters["bad_pages"] > 0
    assert _is_zero(driver, FIRST)
    assert not driver.needs_reset


def test_only_whole_pages_are_given_back(bench: Bench) -> None:
    driver, _ = _start(bench)
    _fill(driver, FIRST, 3)
    ring = driver.queues[2]
    ring.descriptor(0, FIRST * PAGE + 100, 2 * PAGE, WRITE)
    ring.offer(0)
    ring.kick()
    assert [_is_zero(driver, FIRST + page) for page in range(3)] == [False, True, False]


def test_lists_that_cannot_be_break_the_device(bench: Bench) -> None:
    driver, _ = _start(bench)
    driver.queues[balloon.INFLATE].add([b"odd"], [])
    driver.queues[balloon.INFLATE].kick()
    assert driver.needs_reset


def test_the_log_of_writes_has_discarded_pages(bench: Bench) -> None:
    driver, _ = _start(bench)
    log = bench.memory.logs[0]
    log.start()
    _inflate(driver, FIRST + 1)
    marks = log.take()
    assert marks[FIRST + 1 - RAM_BASE // PAGE]
    assert not marks[FIRST + 2 - RAM_BASE // PAGE]
