"""A driver of virtio-mmio devices, written from the specification's driver side: what the device tests talk
through.

Works on a VirtioMmio object and real memory (a memfd mapping), as a guest would: registers by read/write,
rings by bytes. `raw` access to the rings is open, so that tests can also be a bad driver.
"""

from __future__ import annotations

import mmap
import os
import struct

from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio import mmio
from qemu_user.devices.virtio.mmio import VirtioMmio

RAM_BASE = 0x8000_0000
RAM_SIZE = 1 << 20
NEXT, WRITE, INDIRECT = 1, 2, 4


class Line:
    """An interrupt wire that remembers."""

    def __init__(self) -> None:
        self.level = False
        self.asserted = 0

    def assert_line(self) -> None:
        self.level = True
        self.asserted += 1

    def release_line(self) -> None:
        self.level = False


def make_memory(size: int = RAM_SIZE) -> tuple[GuestMemory, mmap.mmap]:
    """Guest RAM as the machine has it: a shared mapping of a memfd."""
    fd = os.memfd_create("test-ram")
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    os.close(fd)
    return GuestMemory([(RAM_BASE, memoryview(mapping))]), mapping


class DriverQueue:
    """The driver's side of one split ring, at fixed places."""

    def __init__(self, driver: Driver, index: int, size: int, at: int) -> None:
        self.driver, self.index, self.size = driver, index, size
        self.table, self.available, self.used = at, at + 16 * size, at + 0x1800
        self.buffers = at + 0x2000
        self._next = 0
        self._free = 0
        self._seen = 0
        self._room = self.buffers

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.driver.put(self.table + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, head: int) -> None:
        """Put a head into the available ring and move its index."""
        self.driver.put(self.available + 4 + 2 * (self._next % self.size), struct.pack("<H", head))
        self._next = (self._next + 1) & 0xFFFF
        self.driver.put(self.available + 2, struct.pack("<H", self._next))

    def allocate(self, data: bytes | int) -> tuple[int, int]:
        """(address, length) of a fresh buffer holding `data`, or of that many zero bytes."""
        content = bytes(data) if isinstance(data, int) else data
        address = self._room
        self._room += -(-len(content) // 16) * 16
        if self._room > self.buffers + 0x1C000:
            self._room = self.buffers + len(content)
            address = self.buffers
        self.driver.put(address, content)
        return address, len(content)

    def add(
        self, readable: list[bytes], writable: list[int], indirect: bool = False
    ) -> tuple[int, list[int]]:
        """Queue one request; returns (head, addresses of the writable buffers)."""
        pieces = [(*self.allocate(data), 0) for data in readable]
        pieces += [(*self.allocate(length), WRITE) for length in writable]
        if indirect:
            entries = b"".join(
                struct.pack("<QIHH", address, length, flags | (NEXT if i + 1 < len(pieces) else 0), i + 1)
                for i, (address, length, flags) in enumerate(pieces)
            )
            table, length = self.allocate(entries)
            head = self._take()
            self.descriptor(head, table, length, INDIRECT)
        else:
            heads = [self._take() for _ in pieces]
            head = heads[0]
            for i, (address, length, flags) in enumerate(pieces):
                more = i + 1 < len(pieces)
                self.descriptor(
                    heads[i], address, length, flags | (NEXT if more else 0), heads[i + 1] if more else 0
                )
        self.offer(head)
        return head, [address for address, _, flags in pieces if flags & WRITE]

    def _take(self) -> int:
        self._free += 1
        return (self._free - 1) % self.size

    def kick(self) -> None:
        self.driver.write(mmio.QUEUE_NOTIFY, self.index)

    def returned(self) -> list[tuple[int, int]]:
        """(head, written) of what the device gave back since the last call."""
        (index,) = struct.unpack("<H", self.driver.get(self.used + 2, 2))
        found = []
        while self._seen != index:
            at = self.used + 4 + 8 * (self._seen % self.size)
            found.append(struct.unpack("<II", self.driver.get(at, 8)))
            self._seen = (self._seen + 1) & 0xFFFF
        return found


class Driver:
    """Brings a device up and talks to it."""

    def __init__(self, device: VirtioMmio, memory: GuestMemory) -> None:
        self.device, self.memory = device, memory
        self.queues: list[DriverQueue] = []

    def read(self, offset: int, size: int = 4) -> int:
        return self.device.read(offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.device.write(offset, size, value)

    def put(self, gpa: int, data: bytes) -> None:
        self.memory.write(gpa, data)

    def get(self, gpa: int, length: int) -> bytes:
        return self.memory.read(gpa, length)

    def features(self) -> int:
        self.write(mmio.DEVICE_FEATURES_SEL, 0)
        low = self.read(mmio.DEVICE_FEATURES)
        self.write(mmio.DEVICE_FEATURES_SEL, 1)
        return low | self.read(mmio.DEVICE_FEATURES) << 32

    def start(self, features: int | None = None, size: int = 64) -> Driver:
        """Reset, negotiate (everything, or these and VERSION_1), set the queues up, DRIVER_OK."""
        self.write(mmio.STATUS, 0)
        self.write(mmio.STATUS, mmio.ACKNOWLEDGE)
        self.write(mmio.STATUS, mmio.ACKNOWLEDGE | mmio.DRIVER)
        wanted = self.features() if features is None else features | mmio.F_VERSION_1
        for select in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, select)
            self.write(mmio.DRIVER_FEATURES, wanted >> 32 * select & 0xFFFFFFFF)
        status = mmio.ACKNOWLEDGE | mmio.DRIVER | mmio.FEATURES_OK
        self.write(mmio.STATUS, status)
        assert self.read(mmio.STATUS) == status
        self.queues = []
        at = RAM_BASE
        for index in range(64):
            self.write(mmio.QUEUE_SEL, index)
            if not self.read(mmio.QUEUE_NUM_MAX):
                break
            queue = DriverQueue(self, index, min(size, self.read(mmio.QUEUE_NUM_MAX)), at)
            at += 0x3000 if len(self.queues) > 3 else 0x20000
            self.put(queue.available, bytes(8 + 2 * queue.size))
            self.put(queue.used, bytes(8 + 8 * queue.size))
            self.write(mmio.QUEUE_NUM, queue.size)
            for offset, value in (
                (mmio.QUEUE_DESC_LOW, queue.table),
                (mmio.QUEUE_DRIVER_LOW, queue.available),
                (mmio.QUEUE_DEVICE_LOW, queue.used),
            ):
                self.write(offset, value & 0xFFFFFFFF)
                self.write(offset + 4, value >> 32)
            self.write(mmio.QUEUE_READY, 1)
            self.queues.append(queue)
        self.write(mmio.STATUS, status | mmio.DRIVER_OK)
        return self

    @property
    def needs_reset(self) -> bool:
        return bool(self.read(mmio.STATUS) & mmio.NEEDS_RESET)
