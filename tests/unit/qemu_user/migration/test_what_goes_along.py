"""What a post-copy takes along, and in which order the rest comes."""

from __future__ import annotations

import struct
import threading

from qemu_user.devices.absent import AbsentPages
from qemu_user.devices.virtio.queue import Queue
from qemu_user.migration import pages, source
from tests.framework.virtio_driver import RAM_BASE, make_memory

PIECE = 32 << 10


def test_divided_piece_by_piece() -> None:
    units = bytearray(b"\1\1\0\0" b"\0\1\1\1" b"\1\1\1\1" b"\0\0\0\1")
    others, first = pages.divided(units, [6, 0, 7, 12], 4, 5)
    assert first == bytearray(b"\1\1\0\0" b"\0\1\1\1" b"\0\0\0\0" b"\0\0\0\0")
    assert pages.union(others, first) == units
    assert pages.count(others) + pages.count(first) == pages.count(units)
    assert list(pages.indices(first)) == [0, 1, 5, 6, 7]
    assert pages.divided(units, [], 4, 5) == (units, bytearray(16))
    many = iter(range(1 << 30))  # it is not gone through to its end
    assert pages.divided(bytearray(b"\1" * 16), many, 4, 5)[1] == bytearray(b"\1" * 4 + bytes(12))
    assert next(many) == 5


def test_pieces_with_a_page_that_is_left() -> None:
    left = bytearray(64)
    for page in (0, 7, 8, 30, 31, 32, 63):
        left[page] = 1
    assert source._pieces(left, 64 * 4096) == bytes((1, 1, 0, 1, 1, 0, 0, 1))
    assert source._pieces(bytearray(), 64 * 4096) == bytes(8)


def test_a_page_that_is_touched_comes_before_the_next_of_the_others() -> None:
    """Also when what comes by itself never rests."""

    class Source:
        cluster = PIECE

        def __init__(self) -> None:
            self.order: list[int] = []
            self.asked = threading.Event()
            self.answer = threading.Semaphore(0)

        def read(self, offset: int, into: memoryview) -> None:
            self.order.append(offset // PIECE)
            self.asked.set()
            assert self.answer.acquire(timeout=60)
            into[:] = bytes([offset // PIECE + 1]) * len(into)

        def close(self) -> None:
            pass

    giver, view = Source(), memoryview(bytearray(16 * PIECE))
    absent = AbsentPages(view, giver, [PIECE * number for number in range(16)])
    fill = threading.Thread(target=absent.fill, daemon=True)
    fill.start()
    assert giver.asked.wait(60)
    touch = threading.Thread(target=absent.ensure, args=(9 * PIECE + 5, 1), daemon=True)
    touch.start()
    while not absent._turn.locked():
        assert touch.is_alive()
    giver.answer.release(16)
    touch.join(60)
    fill.join(60)
    assert giver.order[:2] == [0, 9]
    assert sorted(giver.order) == list(range(16))
    assert view[9 * PIECE] == 10


def test_a_queue_rests_when_its_driver_calls() -> None:
    memory, _ = make_memory()
    for event_index in (False, True):
        queue = Queue(0, 8)
        assert queue.rests
        assert queue.rings() == []
        queue.event_index = event_index
        queue.descriptors, queue.available, queue.used = RAM_BASE, RAM_BASE + 0x1000, RAM_BASE + 0x2000
        memory.write(RAM_BASE, struct.pack("<QI", RAM_BASE + 0x4000, 16).ljust(0x3000, b"\0"))
        queue.enable(memory)
        assert queue.rings() == [(RAM_BASE, 128), (RAM_BASE + 0x1000, 22), (RAM_BASE + 0x2000, 70)]
        assert queue.rests
        memory.write(RAM_BASE + 0x1002, b"\1\0")  # a request
        assert not queue.rests
        assert queue.pop() is not None
        if event_index:
            assert not queue.rests  # the driver has been told to call for the first request
        queue.suppress_kicks()
        assert not queue.rests
        queue.allow_kicks()
        assert queue.rests
