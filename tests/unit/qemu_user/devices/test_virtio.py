"""virtio devices behind their transport, driven by a driver of our own: good requests, and every kind of
bad one.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qemu_user.backends.net.backend import NetBackend
from qemu_user.devices.virtio import mmio
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import PORT_NAME, PORT_OPEN, PORT_READY, VirtioConsole
from qemu_user.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.transport import FEATURES_OK
from tests.framework.devices import Bench, MemoryChardev
from tests.framework.virtio_driver import INDIRECT, NEXT, RAM_BASE, RAM_SIZE, WRITE, Driver

EVENT_IDX, INDIRECT_DESC = F_EVENT_IDX, F_INDIRECT_DESC


@pytest.fixture(params=["mmio", "pci"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, request.param)


class Wire(NetBackend):
    """A network back end that keeps what is sent and can be full."""

    def __init__(self) -> None:
        super().__init__("wire")
        self.frames: list[bytes] = []
        self.full = False
        self.resumed = 0

    def send(self, frame: list[memoryview]) -> bool:
        if self.full:
            return False
        self.frames.append(b"".join(frame))
        return True

    def resume(self) -> None:
        self.resumed += 1


def _disk(bench: Bench, **options: Any) -> tuple[Driver, VirtioBlk]:
    device = VirtioBlk("disk", bench.image(**options), "serial-1")
    return bench.driver(bench.virtio(device)), device


def _request(driver: Driver, kind: int, sector: int, data: bytes = b"", room: int = 0, indirect: bool = False) -> Any:
    """(status, data read) of one request."""
    queue = driver.queues[0]
    readable = [struct.pack("<IIQ", kind, 0, sector), *([data] if data else [])]
    head, where = queue.add(readable, [*([room] if room else []), 1], indirect)
    queue.kick()
    ((returned, written),) = queue.returned()
    assert returned == head
    assert written <= room + 1
    return driver.get(where[-1], 1)[0], driver.get(where[0], room) if room else b""


@pytest.mark.parametrize("features", [0, EVENT_IDX, INDIRECT_DESC, None])
def test_disk_reads_and_writes(bench: Bench, features: int | None) -> None:
    driver, _ = _disk(bench)
    driver.start(features)
    indirect = features is None or bool(features & INDIRECT_DESC)
    for round_ in range(200):  # several times round the ring
        block = bytes([round_]) * 1024
        assert _request(driver, 1, 8 + round_, block, indirect=indirect) == (0, b"")
        assert _request(driver, 0, 8 + round_, room=1024, indirect=indirect) == (0, block)
    assert _request(driver, 8, 0, room=20)[1].rstrip(b"\0") == b"serial-1"
    assert _request(driver, 4, 0)[0] == 0
    assert _request(driver, 99, 0)[0] == 2
    assert bench.interrupts > 0
    assert not driver.needs_reset


def test_disk_refuses_what_lies_outside(bench: Bench) -> None:
    driver, _ = _disk(bench)
    driver.start()
    last = (1 << 20) // 512
    for sector in (last, last - 1, (1 << 64) - 1, 1 << 55):
        assert _request(driver, 0, sector, room=1024)[0] == 1
        assert _request(driver, 1, sector, bytes(1024))[0] == 1
    assert _request(driver, 0, 0, room=100)[0] == 1, "not whole sectors"
    assert not driver.needs_reset


def test_readonly_disk(bench: Bench) -> None:
    driver, device = _disk(bench, readonly=True)
    assert driver.features() & (1 << 5)
    driver.start()
    assert _request(driver, 1, 0, bytes(512))[0] == 1
    assert _request(driver, 0, 1, room=512)[0] == 0
    assert device.counters["errors"] == 1


def test_discard_and_write_zeroes(bench: Bench) -> None:
    driver, _ = _disk(bench, discard=True)
    driver.start()
    for kind in (11, 13):
        assert _request(driver, 1, 0, b"x" * 8192)[0] == 0
        assert _request(driver, kind, 0, struct.pack("<QII", 0, 16, 0))[0] == 0
        assert _request(driver, 0, 0, room=8192) == (0, bytes(8192))
    assert _request(driver, 13, 0, struct.pack("<QII", 0, 1, 0xFFFFFFFE))[0] == 2
    assert _request(driver, 13, 0, struct.pack("<QII", 1 << 60, 1, 0))[0] == 1
    assert _request(driver, 11, 0, b"short")[0] == 1


def test_headers_may_be_cut_anywhere(bench: Bench) -> None:
    driver, _ = _disk(bench)
    driver.start()
    header = struct.pack("<IIQ", 0, 0, 3)
    queue = driver.queues[0]
    queue.add([header[:1], header[1:9], header[9:]], [100, 412, 1])
    queue.kick()
    assert queue.returned() == [(0, 513)]


# -- bad drivers -----------------------------------------------------------------------------------


def _break(bench: Bench, how: Any) -> Driver:
    driver, _ = _disk(bench)
    driver.start()
    queue = driver.queues[0]
    how(driver, queue)
    queue.kick()
    assert driver.needs_reset
    assert driver.read(mmio.INTERRUPT_STATUS) & mmio.CONFIG_CHANGE
    assert driver.device.counters["driver_errors"] == 1
    queue.kick()  # rests until it is reset
    driver.start()
    assert not driver.needs_reset
    assert _request(driver, 0, 0, room=512)[0] == 0
    return driver


OUTSIDE = [0, RAM_BASE - 1, RAM_BASE + RAM_SIZE - 1, (1 << 64) - 1, 1 << 40]


@pytest.mark.parametrize("address", OUTSIDE)
def test_buffer_outside_ram(bench: Bench, address: int) -> None:
    _break(bench, lambda d, q: (q.descriptor(0, address, 16, 0), q.offer(0)))


def test_chain_that_loops(bench: Bench) -> None:
    def how(driver: Driver, queue: Any) -> None:
        queue.descriptor(0, RAM_BASE, 16, NEXT, 1)
        queue.descriptor(1, RAM_BASE, 16, NEXT, 0)
        queue.offer(0)

    _break(bench, how)


def test_heads_and_links_out_of_range(bench: Bench) -> None:
    _break(bench, lambda d, q: q.offer(64))
    _break(bench, lambda d, q: (q.descriptor(0, RAM_BASE, 16, NEXT, 65535), q.offer(0)))


def test_more_requests_than_the_ring_holds(bench: Bench) -> None:
    _break(bench, lambda d, q: d.put(q.available + 2, struct.pack("<H", 65)))


def test_writable_before_readable(bench: Bench) -> None:
    def how(driver: Driver, queue: Any) -> None:
        queue.descriptor(0, RAM_BASE, 16, WRITE | NEXT, 1)
        queue.descriptor(1, RAM_BASE, 16, 0)
        queue.offer(0)

    _break(bench, how)


@pytest.mark.parametrize("length", [0, 8, 17, 1 << 31])
def test_bad_indirect_tables(bench: Bench, length: int) -> None:
    _break(bench, lambda d, q: (q.descriptor(0, RAM_BASE, length, INDIRECT), q.offer(0)))


def test_nested_indirect(bench: Bench) -> None:
    def how(driver: Driver, queue: Any) -> None:
        table, _ = queue.allocate(struct.pack("<QIHH", RAM_BASE, 16, INDIRECT, 0))
        queue.descriptor(0, table, 16, INDIRECT)
        queue.offer(0)

    _break(bench, how)


def test_absurd_lengths(bench: Bench) -> None:
    _break(bench, lambda d, q: (q.descriptor(0, RAM_BASE, 0xFFFFFFFF, 0), q.offer(0)))
    _break(bench, lambda d, q: (q.descriptor(0, RAM_BASE, 0, WRITE), q.offer(0)))


def test_requests_without_header_or_status(bench: Bench) -> None:
    _break(bench, lambda d, q: q.add([b"short"], [1]))
    _break(bench, lambda d, q: q.add([bytes(16)], []))


@pytest.mark.parametrize("which", [mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW])
@pytest.mark.parametrize("address", [0, 0xFFFFFFFF, RAM_BASE + 1, RAM_BASE + RAM_SIZE - 8])
def test_rings_in_bad_places(bench: Bench, which: int, address: int) -> None:
    driver, _ = _disk(bench)
    driver.start()
    driver.write(mmio.QUEUE_SEL, 0)
    driver.write(mmio.QUEUE_READY, 0)
    driver.write(which, address)
    driver.write(mmio.QUEUE_READY, 1)
    assert driver.needs_reset
    assert driver.read(mmio.QUEUE_READY) == 0


def test_status_protocol(bench: Bench) -> None:
    driver, _ = _disk(bench)
    driver.write(mmio.STATUS, 3)
    driver.write(mmio.STATUS, 3 | FEATURES_OK)
    assert driver.read(mmio.STATUS) == 3, "FEATURES_OK without VERSION_1"
    driver.write(mmio.DRIVER_FEATURES_SEL, 1)
    driver.write(mmio.DRIVER_FEATURES, 3)
    driver.write(mmio.STATUS, 3 | FEATURES_OK)
    assert driver.read(mmio.STATUS) == 3, "a feature that is not offered"
    driver.write(mmio.STATUS, 7)
    assert driver.needs_reset, "DRIVER_OK without FEATURES_OK"
    driver.write(mmio.STATUS, 0)
    assert driver.read(mmio.STATUS) == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_rings_never_raise(bench: Bench, seed: int) -> None:
    """Rings full of noise, on every device and queue."""
    choice = random.Random(seed)
    wire = Wire()
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


# -- network, console, entropy ---------------------------------------------------------------------


def test_network_both_ways(bench: Bench) -> None:
    wire = Wire()
    device = VirtioNet("net", wire, b"\x52\x54\0\x12\x34\x56")
    driver = bench.driver(bench.virtio(device)).start()
    frame = os.urandom(60)
    driver.queues[1].add([bytes(12), frame], [])
    driver.queues[1].kick()
    assert wire.frames == [frame]
    assert not wire.frontend.receive(memoryview(frame)), "no buffers yet"
    before = wire.resumed
    head, where = driver.queues[0].add([], [2048])
    driver.queues[0].kick()
    assert wire.resumed == before + 1
    assert wire.frontend.receive(memoryview(frame))
    assert driver.queues[0].returned() == [(head, 72)]
    assert driver.get(where[0], 72) == bytes(10) + b"\1\0" + frame


def test_network_spreads_frames_over_buffers(bench: Bench) -> None:
    wire = Wire()
    driver = bench.driver(bench.virtio(VirtioNet("net", wire, bytes(6)))).start()
    frame = os.urandom(5000)
    places = [driver.queues[0].add([], [2048])[1][0] for _ in range(3)]
    assert wire.frontend.receive(memoryview(frame))
    used = driver.queues[0].returned()
    assert [written for _, written in used] == [2048, 2048, 5012 - 4096]
    data = b"".join(driver.get(at, written) for at, (_, written) in zip(places, used, strict=True))
    assert data[10:12] == b"\3\0"
    assert data[12:] == frame


def test_network_without_merging_drops_what_does_not_fit(bench: Bench) -> None:
    wire = Wire()
    device = VirtioNet("net", wire, bytes(6))
    driver = bench.driver(bench.virtio(device)).start(0)
    driver.queues[0].add([], [100])
    assert wire.frontend.receive(memoryview(bytes(1000)))
    assert device.counters["rx_too_long"] == 1
    assert wire.frontend.receive(memoryview(bytes(60)))
    assert driver.queues[0].returned() == [(0, 72)]


def test_network_waits_for_a_full_wire(bench: Bench) -> None:
    wire = Wire()
    driver = bench.driver(bench.virtio(VirtioNet("net", wire, bytes(6)))).start()
    wire.full = True
    for number in range(3):
        driver.queues[1].add([bytes(12) + bytes([number]) * 20], [])
    driver.queues[1].kick()
    assert driver.queues[1].returned() == []
    wire.full = False
    wire.frontend.sent()
    assert [frame[0] for frame in wire.frames] == [0, 1, 2]
    assert len(driver.queues[1].returned()) == 3


def test_entropy(bench: Bench) -> None:
    driver = bench.driver(bench.virtio(VirtioRng("rng"))).start()
    _, where = driver.queues[0].add([], [64])
    driver.queues[0].kick()
    assert driver.queues[0].returned() == [(0, 64)]
    assert driver.get(where[0], 64) != bytes(64)


class Ports:
    """A console with two ports and a driver that has introduced itself."""

    def __init__(self, bench: Bench) -> None:
        self.main, self.other = MemoryChardev(), MemoryChardev()
        self.device = VirtioConsole("console", [(0, "", self.main), (1, "org.softkvm.stdin", self.other)])
        self.driver = bench.driver(bench.virtio(self.device)).start(size=32)
        self.control: list[bytes] = []
        self._places = [self.driver.queues[2].add([], [96])[1][0] for _ in range(16)]
        self.say(0xFFFFFFFF, 0, 1)
        for number in (0, 1):
            self.say(number, PORT_READY, 1)

    def say(self, number: int, event: int, value: int) -> None:
        self.driver.queues[3].add([struct.pack("<IHH", number, event, value)], [])
        self.driver.queues[3].kick()
        for head, written in self.driver.queues[2].returned():
            self.control.append(self.driver.get(self._places[head], written))


def test_console_introduces_its_ports(bench: Bench) -> None:
    ports = Ports(bench)
    events = [struct.unpack("<IHH", message[:8]) for message in ports.control]
    assert (0, 4, 1) in events
    assert (0, PORT_OPEN, 1) in events
    named = next(message for message in ports.control if struct.unpack("<IHH", message[:8])[1] == PORT_NAME)
    assert named[8:] == b"org.softkvm.stdin\0"


def test_console_input_waits_for_the_guest(bench: Bench) -> None:
    ports = Ports(bench)
    queue = ports.driver.queues[4]
    _, where = queue.add([], [4])
    assert ports.other.feed(b"abcdef") == 0, "the guest has not opened the port"
    ports.say(1, PORT_OPEN, 1)
    assert ports.other.resumed > 0
    assert ports.other.feed(b"abcdef") == 6
    assert queue.returned() == [(0, 4)]
    assert ports.driver.get(where[0], 4) == b"abcd"
    assert ports.other.feed(b"more") == 0, "two bytes wait"
    _, where = queue.add([], [4])
    queue.kick()
    assert queue.returned() == [(1, 2)]
    assert ports.driver.get(where[0], 2) == b"ef"


def test_console_output_is_held_back(bench: Bench) -> None:
    ports = Ports(bench)
    ports.other.room = 5
    queue = ports.driver.queues[5]
    queue.add([b"0123", b"4567"], [])
    queue.add([b"89"], [])
    queue.kick()
    assert bytes(ports.other.taken) == b"01234"
    assert queue.returned() == []
    ports.other.room = 100
    ports.other.frontend.output_ready()
    assert bytes(ports.other.taken) == b"0123456789"
    assert len(queue.returned()) == 2


def test_console_end_of_input_closes_the_port(bench: Bench) -> None:
    ports = Ports(bench)
    ports.other.is_open = False
    ports.other.frontend.closed()
    ports.say(1, PORT_OPEN, 1)
    assert struct.pack("<IHH", 1, PORT_OPEN, 0) in ports.control
    ports.main.frontend.resized(40, 132)
    ports.say(0, PORT_OPEN, 1)
    assert struct.pack("<IHHHH", 0, 5, 1, 132, 40) in ports.control
    assert ports.driver.read(mmio.CONFIG, 2) == 132
