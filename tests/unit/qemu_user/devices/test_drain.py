"""Queues that native code serves (virtio 1.2, 2.7): bytes come in order, answers and interrupts are as Python's would be, and
what is not one plain buffer in RAM is left to Python.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
import threading
import time

import pytest

from kvmcore.vm.vdso import vdso_fd
from protocol.channel.vdso import CHANGED, CROWDED, GATHERED, IN_VAIN, WANTED, Vdso
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.drain import ROOM, Drain
from qemu_user.devices.virtio.queue import INDIRECT, NEXT, WRITE, Queue

BASE, RAM, SIZE = 0x8000_0000, 1 << 20, 8
TABLE, AVAILABLE, USED, DATA = BASE, BASE + 0x1000, BASE + 0x2000, BASE + 0x10000
NEVER_US = 1e12
"""However long we, or the process, have to wait for a core."""


class Ring:
    """A queue of 8 with event index, driven by hand; indices begin at `first`."""

    def __init__(self, first: int = 0) -> None:
        self.ram = memoryview(mmap.mmap(-1, RAM))
        self.memory = GuestMemory([(BASE, self.ram)])
        self.queue = Queue(0, SIZE)
        self.queue.descriptors, self.queue.available, self.queue.used = TABLE, AVAILABLE, USED
        self.queue.event_index = True
        self.queue.enable(self.memory)
        self.queue.moved(first, first, first)
        self.queue._event_valid = True
        self.index = self.seen = first
        self.put("H", AVAILABLE + 2, first)
        self.put("H", USED + 2, first)
        self.code = Vdso(vdso_fd())
        self.drain = Drain(self.queue, self.memory)
        self.bell = ctypes.c_uint16(0)

    def put(self, form: str, at: int, *values: int) -> None:
        """One store for each value: pack_into() clears its target first, which the device's side can see."""
        for value, size in zip(values, map(struct.calcsize, form), strict=True):
            self.ram[at - BASE : at - BASE + size] = value.to_bytes(size, "little")
            at += size

    def get(self, form: str, at: int) -> int:
        return int(struct.unpack_from("<" + form, self.ram, at - BASE)[0])

    def offer(self, data: bytes, flags: int = 0, address: int = -1, length: int = -1, head: int = -1) -> None:
        """Make a request available; what is not said is as a good driver has it."""
        slot = self.index % SIZE
        where = DATA + 0x1000 * slot
        self.ram[where - BASE : where - BASE + len(data)] = data
        self.put("QIHH", TABLE + 16 * slot, where if address < 0 else address, len(data) if length < 0 else length, flags, 0)
        self.put("H", AVAILABLE + 4 + 2 * slot, slot if head < 0 else head)
        self.index = self.index + 1 & 0xFFFF
        self.put("H", AVAILABLE + 2, self.index)

    def want_after(self, used: int) -> None:
        """used_event: an interrupt when the used index passes it."""
        self.put("H", AVAILABLE + 4 + 2 * SIZE, used & 0xFFFF)

    def run(self, idle_us: float = 200.0, settle_us: float = 1.0, longest_us: float = NEVER_US) -> tuple[int, bytes]:
        ticks = self.code.ticks_per_us
        pace = int(idle_us * ticks), int(NEVER_US * ticks), int(settle_us * ticks), int(longest_us * ticks)
        assert self.queue.drainable
        return self.drain.run(self.code, pace, ctypes.addressof(self.bell), self.bell.value, ROOM)


@pytest.mark.parametrize("first", [0, 65533])
def test_bytes_come_in_order_and_buffers_go_back(first: int) -> None:
    ring = Ring(first)
    ring.want_after(first - 1)
    pieces = [b"one ", b"", b"two ", b"x" * 1000, b"end"]
    for piece in pieces:
        ring.offer(piece)
    ring.want_after(first + len(pieces))
    assert ring.run() == (IN_VAIN, b"".join(pieces))
    assert ring.get("H", USED + 2) == (first + len(pieces)) & 0xFFFF
    for number in range(len(pieces)):
        at = USED + 4 + 8 * ((first + number) % SIZE)
        assert (ring.get("I", at), ring.get("I", at + 4)) == ((first + number) % SIZE, 0)
    assert ring.queue.indices() == ((first + len(pieces)) & 0xFFFF,) * 3
    assert ring.queue.pop() is None


def test_a_driver_that_writes_meanwhile() -> None:
    """As hvc does: a buffer, a wait for it, the next one."""
    ring = Ring(65000)
    dice = random.Random(3)
    sent = [dice.randbytes(dice.randrange(1, 17)) for _ in range(3000)]

    def drive() -> None:
        for piece in sent:
            ring.offer(piece)
            while ring.get("H", USED + 2) != ring.index:
                time.sleep(0)
            ring.want_after(ring.index)

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    came = b""
    while len(came) < sum(map(len, sent)):
        outcome, data = ring.run(idle_us=2000, longest_us=100)
        assert outcome in (IN_VAIN, GATHERED, WANTED), f"{outcome} at {ring.queue.indices()}, {ring.index} is available"
        came += data
        if outcome == WANTED:
            ring.queue.wants_interrupt()
    driver.join()
    assert came == b"".join(sent)


@pytest.mark.parametrize(
    "request_",
    [
        {"flags": NEXT}, {"flags": WRITE}, {"flags": INDIRECT}, {"address": BASE - 1}, {"address": BASE + RAM - 3},
        {"address": 0}, {"address": BASE + RAM + 1, "length": 0}, {"length": 0xFFFF_FFFF}, {"address": (1 << 64) - 2},
        {"head": SIZE}, {"head": 0xFFFF}, {"length": ROOM - 4},
    ],
)  # fmt: skip
def test_what_is_no_plain_buffer_is_left(request_: dict[str, int]) -> None:
    ring = Ring()
    ring.offer(b"before")
    ring.offer(b"strange", **request_)
    assert ring.run() == (CHANGED, b"before")
    assert ring.queue.indices()[:2] == (1, 1)
    assert ring.get("H", USED + 2) == 1
    assert ring.queue.has_requests


def test_a_ring_that_claims_more_than_it_has_is_left() -> None:
    ring = Ring()
    ring.put("H", AVAILABLE + 2, SIZE + 1)
    assert ring.run() == (CHANGED, b"")


def test_interrupts_are_wanted_as_python_finds() -> None:
    dice = random.Random(5)
    for _ in range(200):
        first, count, event = dice.randrange(1 << 16), dice.randrange(1, SIZE), dice.randrange(-10, 10)
        ring, other = Ring(first), Ring(first)
        for each in (ring, other):
            for _ in range(count):
                each.offer(b"x")
            each.want_after(first + event)
        while (chain := other.queue.pop()) is not None:
            other.queue.push(chain, 0)
        wanted = other.queue.wants_interrupt()
        outcome, data = ring.run(idle_us=20)
        assert (outcome, data) == (WANTED if wanted else IN_VAIN, b"x" * count)
        assert ring.queue.wants_interrupt() == wanted
        assert ring.queue.indices() == other.queue.indices()


def test_what_ends_a_call() -> None:
    ring = Ring()
    ring.want_after(-1)
    assert ring.run(idle_us=10) == (IN_VAIN, b"")
    ring.offer(b"held")
    ring.want_after(1)
    began = time.monotonic()
    assert ring.run(idle_us=1e6, longest_us=2000) == (GATHERED, b"held")
    assert time.monotonic() - began >= 0.002
    ticks = int(1e6 * ring.code.ticks_per_us)
    assert ring.drain.run(ring.code, (ticks, 1, ticks, ticks), ctypes.addressof(ring.bell), 0, ROOM)[0] == CROWDED
    ring.bell.value = 7
    assert ring.drain.run(ring.code, (ticks, ticks, ticks, ticks), ctypes.addressof(ring.bell), 6, ROOM) == (CHANGED, b"")


def test_not_where_answers_need_more_than_the_ring() -> None:
    ring = Ring()
    assert ring.queue.drainable
    ring.memory.logs[0].start()
    assert not ring.queue.drainable, "what devices write is logged"
    ring.memory.logs[0].stop()
    ring.queue.event_index = False
    assert not ring.queue.drainable
    ring.queue.event_index = True
    ring.queue.before_push = lambda queue, head, written: None
    assert not ring.queue.drainable, "answers are noted first"
    ring.queue.before_push = None
    ring.queue.reset()
    assert not ring.queue.drainable
