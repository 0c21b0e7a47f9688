"""Virtio 1.2, section 5.3: the console device. Test names begin with the section of the requirement."""

from __future__ import annotations

import ctypes
import random
import struct

import pytest

from qemu_user.backends.polling import Watched
from qemu_user.devices.virtio import console, mmio
from qemu_user.devices.virtio.console import PORT_NAME, PORT_OPEN, PORT_READY, VirtioConsole
from tests.framework.devices import Bench, MemoryChardev
from tests.framework.virtio_driver import DriverQueue


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


def test_5_3_6_2_ports_are_introduced(bench: Bench) -> None:
    ports = Ports(bench)
    events = [struct.unpack("<IHH", message[:8]) for message in ports.control]
    assert (0, 4, 1) in events
    assert (0, PORT_OPEN, 1) in events
    named = next(message for message in ports.control if struct.unpack("<IHH", message[:8])[1] == PORT_NAME)
    assert named[8:] == b"org.softkvm.stdin\0"


def test_5_3_6_2_input_waits_until_the_guest_has_opened_the_port(bench: Bench) -> None:
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


def test_5_3_6_output_is_held_back(bench: Bench) -> None:
    ports = Ports(bench)
    ports.other.takes = 5
    queue = ports.driver.queues[5]
    queue.add([b"0123", b"4567"], [])
    queue.add([b"89"], [])
    queue.kick()
    assert bytes(ports.other.taken) == b"01234"
    assert queue.returned() == []
    ports.other.takes = 100
    ports.other.frontend.output_ready()
    assert bytes(ports.other.taken) == b"0123456789"
    assert len(queue.returned()) == 2


def test_2_4_output_that_nobody_has_served_survives_the_reset(bench: Bench) -> None:
    ports = Ports(bench)
    ports.other.takes = 3
    queue = ports.driver.queues[5]
    queue.add([b"0123"], [])
    queue.kick()
    queue.add([b"exit 7"], [])  # no kick has arrived when the guest shuts down
    ports.driver.write(mmio.STATUS, 0)
    assert bytes(ports.other.taken) == b"0123exit 7"


def test_5_3_6_2_end_of_input_and_size_are_told(bench: Bench) -> None:
    ports = Ports(bench)
    ports.other.is_open = False
    ports.other.frontend.closed()
    ports.say(1, PORT_OPEN, 1)
    assert struct.pack("<IHH", 1, PORT_OPEN, 0) in ports.control
    ports.main.frontend.resized(40, 132)
    ports.say(0, PORT_OPEN, 1)
    assert struct.pack("<IHHHH", 0, 5, 1, 132, 40) in ports.control
    assert ports.driver.read(mmio.CONFIG, 2) == 132


def test_5_3_4_configuration(bench: Bench) -> None:
    ports = Ports(bench)
    ports.main.frontend.resized(25, 80)
    columns, rows, count = (ports.driver.read(mmio.CONFIG + at, size) for at, size in ((0, 2), (2, 2), (4, 4)))
    assert (columns, rows, count) == (80, 25, 2)


def test_5_3_4_size_is_told_by_an_interrupt_without_multiport(bench: Bench) -> None:
    chardev = MemoryChardev()
    driver = bench.driver(bench.virtio(VirtioConsole("console", [(0, "", chardev)]))).start(console.F_SIZE)
    before = bench.interrupts
    chardev.frontend.resized(50, 200)
    assert bench.interrupts == before + 1
    assert driver.read(mmio.CONFIG, 2) == 200


def test_5_3_6_without_multiport_port_0_works_and_no_control_message_comes(bench: Bench) -> None:
    main, other = MemoryChardev(), MemoryChardev()
    device = VirtioConsole("console", [(0, "", main), (1, "one", other)])
    driver = bench.driver(bench.virtio(device)).start(0, size=16)
    driver.queues[1].add([b"hello"], [])
    driver.queues[1].kick()
    assert bytes(main.taken) == b"hello"
    _, where = driver.queues[0].add([], [16])
    driver.queues[0].kick()
    assert main.feed(b"typed") == 5
    assert driver.get(where[0], 5) == b"typed"
    driver.queues[2].add([], [96])
    main.frontend.resized(1, 1)
    assert driver.queues[2].returned() == []


def test_5_3_6_1_emergency_write_needs_no_driver(bench: Bench) -> None:
    chardev = MemoryChardev()
    driver = bench.driver(bench.virtio(VirtioConsole("console", [(0, "", chardev)])))
    assert driver.features() & console.F_EMERG_WRITE
    driver.write(mmio.CONFIG + 8, ord("!"))
    assert bytes(chardev.taken) == b"!"


def test_5_3_6_2_several_ports_are_apart(bench: Bench) -> None:
    chardevs = [MemoryChardev() for _ in range(4)]
    device = VirtioConsole("console", [(n, f"port{n}" if n else "", c) for n, c in enumerate(chardevs)])
    driver = bench.driver(bench.virtio(device)).start(size=16)
    for number in range(4):
        queue = driver.queues[1 if number == 0 else 3 + 2 * number]
        queue.add([b"to %d" % number], [])
        queue.kick()
    assert [bytes(chardev.taken) for chardev in chardevs] == [b"to 0", b"to 1", b"to 2", b"to 3"]


def test_messages_for_ports_that_are_not_there_are_counted(bench: Bench) -> None:
    ports = Ports(bench)
    ports.say(9, PORT_READY, 1)
    ports.say(0, 77, 1)
    assert ports.device.counters["bad_control"] == 2
    ports.driver.queues[3].add([b"short"], [])
    ports.driver.queues[3].kick()
    assert ports.driver.needs_reset


@pytest.mark.parametrize("seed", range(3))
def test_random_control_messages_never_raise(bench: Bench, seed: int) -> None:
    choice = random.Random(seed)
    ports = Ports(bench)
    for _ in range(500):
        ports.driver.queues[3].add([choice.randbytes(choice.choice((8, 8, 8, 20)))], [])
        ports.driver.queues[3].kick()
        ports.driver.queues[3].returned()
    assert not ports.driver.needs_reset


def test_2_7_10_a_queue_that_is_looked_at_needs_no_notification(bench: Bench) -> None:
    """avail_event stays where it was until the look is over; then notifications are wanted again."""
    ports = Ports(bench)
    looks: list[Watched] = []

    def watch(queue: Watched, address: int, known: int) -> bool:
        assert ctypes.c_uint16.from_address(address).value == known
        looks.append(queue)
        return True

    queue = ports.driver.queues[5]
    queue.add([b"zero"], [])
    queue.kick()
    assert _kick_wanted_at(queue) == 1
    ports.device.transport.watch = watch  # type: ignore[attr-defined]
    queue.add([b"one"], [])
    queue.kick()
    queue.add([b"two"], [])
    looks[-1].serve()
    assert bytes(ports.other.taken) == b"zeroonetwo"
    assert _kick_wanted_at(queue) == 1
    queue.add([b"three"], [])  # between the last look and the rest
    looks[-1].rest()
    assert bytes(ports.other.taken) == b"zeroonetwothree"
    looks[-1].rest()
    assert _kick_wanted_at(queue) == 4
    assert len(queue.returned()) == 4
    ports.driver.write(mmio.STATUS, 0)
    for old in looks:  # the driver has reset the device meanwhile
        old.serve()
        old.settle()
        old.rest()


def _kick_wanted_at(queue: DriverQueue) -> int:
    """avail_event: which request is to be notified of."""
    (event,) = struct.unpack("<H", queue.driver.get(queue.used + 4 + 8 * queue.size, 2))
    return int(event)
