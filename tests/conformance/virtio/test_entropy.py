"""Virtio 1.2, section 5.4: the entropy device. Test names begin with the section of the requirement."""

from __future__ import annotations

from qemu_user.devices.virtio.rng import MAX_REQUEST, VirtioRng
from tests.framework.devices import Bench


def test_5_4_6_buffers_are_filled(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioRng("rng"))).start()
    _, where = driver.queues[0].add([], [64])
    driver.queues[0].kick()
    assert driver.queues[0].returned() == [(0, 64)]
    assert driver.get(where[0], 64) != bytes(64)


def test_5_4_6_2_buffers_are_filled_with_something_else_each_time(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioRng("rng"))).start()
    places = [driver.queues[0].add([], [32])[1][0] for _ in range(8)]
    driver.queues[0].kick()
    assert len(driver.queues[0].returned()) == 8
    assert len({driver.get(place, 32) for place in places}) == 8


def test_5_4_6_2_a_large_request_is_answered_with_less(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioRng("rng"))).start(size=4)
    queue = driver.queues[0]
    queue.descriptor(0, queue.buffers, MAX_REQUEST + 4096, 2)
    queue.offer(0)
    queue.kick()
    assert queue.returned() == [(0, MAX_REQUEST)]
