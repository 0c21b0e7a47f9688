"""A device process that dies at any store of its work on a queue: the next one answers every request, and each once."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.flight import Flight
from qemu_user.devices.virtio.queue import Chain, Queue

BASE, SIZE, REQUESTS = 0x8000_0000, 8, 6
AVAILABLE, USED = 0x400, 0x800


class Died(Exception):
    """kill -9."""


class Stores:
    """A view whose stores are counted together with others'; the one that is one too many does not happen."""

    def __init__(self, view: Any, left: list[int]) -> None:
        self._view, self._left = view, left

    def __getitem__(self, index: Any) -> Any:
        return self._view[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if not self._left[0]:
            raise Died
        self._left[0] -= 1
        self._view[index] = value

    def __len__(self) -> int:
        return len(self._view)


def machine() -> tuple[bytearray, GuestMemory, Queue]:
    """A queue with six requests, two descriptors each but for the last one."""
    ram = bytearray(0x1000)
    for index in range(SIZE):
        struct.pack_into("<QIHH", ram, 16 * index, BASE + 0xC00 + 16 * index, 16, 0, 0)
    heads = [3, 0, 7, 5, 1, 4]
    struct.pack_into(f"<HH{REQUESTS}H", ram, AVAILABLE, 0, REQUESTS, *heads)
    memory = GuestMemory([(BASE, memoryview(ram))])
    queue = Queue(0, SIZE)
    queue.descriptors, queue.available, queue.used = BASE, BASE + AVAILABLE, BASE + USED
    queue.enable(memory)
    return ram, memory, queue


def answered(ram: bytearray) -> list[int]:
    count = struct.unpack_from("<H", ram, USED + 2)[0]
    return [struct.unpack_from("<I", ram, USED + 4 + 8 * (index % SIZE))[0] for index in range(count)]


def work(queue: Queue) -> None:
    """Serve all, three at a time, out of order; one is taken and given back unseen."""
    while True:
        chains: list[Chain] = []
        while len(chains) < 3 and (chain := queue.pop()) is not None:
            chains.append(chain)
        if not chains:
            return
        if len(chains) == 3:
            queue.unpop(chains.pop())
        for chain in reversed(chains):
            queue.push(chain, 0)


@pytest.mark.parametrize("stores", range(60))
@pytest.mark.parametrize("again", [0, 1, 4], ids=["first", "second", "third"])
def test_every_request_is_answered_once(stores: int, again: int) -> None:
    ram, memory, queue = machine()
    saved = queue.save()
    shared = memoryview(bytearray(Flight.size(SIZE)))
    queue.note_in(Flight(shared))
    for left in ([stores], [again]):
        flight = queue.flight
        assert flight is not None
        flight.heads = Stores(flight.heads, left)  # type: ignore[assignment]
        flight._words = Stores(flight._words, left)  # type: ignore[assignment]
        queue._used_ring = Stores(queue._used_ring, left)  # type: ignore[assignment]
        queue._used_head = Stores(queue._used_head, left)  # type: ignore[assignment]
        try:
            work(queue)
        except Died:
            pass
        queue = Queue(0, SIZE)
        queue.restore(saved, memory)
        queue.recover(Flight(shared))
    work(queue)
    assert sorted(answered(ram)) == [0, 1, 3, 4, 5, 7]


def test_what_is_in_flight_moves_with_the_state() -> None:
    ram, memory, queue = machine()
    saved = queue.save()
    shared = memoryview(bytearray(Flight.size(SIZE)))
    queue.note_in(Flight(shared))
    assert queue.pop() is not None
    queue = Queue(0, SIZE)
    queue.restore(saved, memory)
    queue.recover(Flight(shared))
    moved = queue.save()
    assert moved.again == [3]
    other = Queue(0, SIZE)
    other.check(moved, memory)
    other.restore(moved, memory)
    work(other)
    assert sorted(answered(ram)) == [0, 1, 3, 4, 5, 7]


@pytest.mark.parametrize("head", [3, 0])
def test_an_answer_that_was_due_is_published_once(head: int) -> None:
    ram, memory, queue = machine()
    saved = queue.save()
    shared = memoryview(bytearray(Flight.size(SIZE)))
    queue.note_in(Flight(shared))
    first = queue.pop()
    assert first is not None
    if head == 0:  # published already, and another one was taken
        queue.push(first, 9)
    queue = Queue(0, SIZE)
    queue.restore(saved, memory)
    queue.recover(Flight(shared), (3, 9, 0))
    work(queue)
    assert sorted(answered(ram)) == [0, 1, 3, 4, 5, 7]
    assert struct.unpack_from("<II", ram, USED + 4) == (3, 9)
