"""A driver of virtio devices, written from the specification's driver side: what the device tests talk through.

Works on a VirtioMmio (Driver) or a VirtioPci (PciDriver) and real memory (a memfd mapping), as a guest would:
registers by read/write, rings by bytes. Both name registers as virtio-mmio does. `raw` access to the rings is open, so
that tests can also be a bad driver.
"""

from __future__ import annotations

import mmap
import os
import struct

from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.pci import config_space as cfg
from qemu_user.devices.pci.host import PciHost
from qemu_user.devices.virtio import mmio, pci
from qemu_user.devices.virtio.device import F_VERSION_1
from qemu_user.devices.virtio.mmio import VirtioMmio
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.devices.virtio.transport import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET

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

    def __init__(self, device: VirtioMmio | VirtioPci, memory: GuestMemory) -> None:
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
        self.write(mmio.STATUS, ACKNOWLEDGE)
        self.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
        wanted = self.features() if features is None else features | F_VERSION_1
        for select in (0, 1):
            self.write(mmio.DRIVER_FEATURES_SEL, select)
            self.write(mmio.DRIVER_FEATURES, wanted >> 32 * select & 0xFFFFFFFF)
        status = ACKNOWLEDGE | DRIVER | FEATURES_OK
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
        self.write(mmio.STATUS, status | DRIVER_OK)
        return self

    @property
    def needs_reset(self) -> bool:
        return bool(self.read(mmio.STATUS) & NEEDS_RESET)


class PciDriver(Driver):
    """The same over PCI: finds the structures by their capabilities, places the BARs, gives each queue a vector.

    read/write take virtio-mmio's register names and go to the field of the common configuration that does the same.
    """

    FIELDS = {
        mmio.DEVICE_FEATURES_SEL: (pci.DEVICE_FEATURE_SELECT, 4),
        mmio.DEVICE_FEATURES: (pci.DEVICE_FEATURE, 4),
        mmio.DRIVER_FEATURES_SEL: (pci.DRIVER_FEATURE_SELECT, 4),
        mmio.DRIVER_FEATURES: (pci.DRIVER_FEATURE, 4),
        mmio.STATUS: (pci.DEVICE_STATUS, 1),
        mmio.CONFIG_GENERATION: (pci.CONFIG_GENERATION, 1),
        mmio.QUEUE_SEL: (pci.QUEUE_SELECT, 2),
        mmio.QUEUE_NUM: (pci.QUEUE_SIZE, 2),
        mmio.QUEUE_NUM_MAX: (pci.QUEUE_SIZE, 2),
        mmio.QUEUE_READY: (pci.QUEUE_ENABLE, 2),
        mmio.QUEUE_RESET: (pci.QUEUE_RESET, 2),
        mmio.QUEUE_DESC_LOW: (pci.QUEUE_DESC, 4),
        mmio.QUEUE_DESC_HIGH: (pci.QUEUE_DESC + 4, 4),
        mmio.QUEUE_DRIVER_LOW: (pci.QUEUE_DRIVER, 4),
        mmio.QUEUE_DRIVER_HIGH: (pci.QUEUE_DRIVER + 4, 4),
        mmio.QUEUE_DEVICE_LOW: (pci.QUEUE_DEVICE, 4),
        mmio.QUEUE_DEVICE_HIGH: (pci.QUEUE_DEVICE + 4, 4),
    }

    def __init__(self, device: VirtioPci, memory: GuestMemory, host: PciHost, msix: bool = True) -> None:
        super().__init__(device, memory)
        self.function, self.host = device, host
        self.window = host.windows[1]
        self.base = self.window.bus_base + 0x10000 * device.slot
        self.structures: dict[int, tuple[int, int, int]] = {}
        for at, identifier in capabilities(self):
            if identifier == pci.VENDOR_CAPABILITY:
                kind, bar, where = (self.config(at + field, size) for field, size in ((3, 1), (4, 1), (8, 4)))
                self.structures.setdefault(kind, (bar, where, at))
            elif identifier == 0x11:
                self.msix_at = at
        self.set_config(cfg.BARS + 4 * 1, 4, self.base + 0x8000)
        self.set_config(cfg.BARS + 4 * 4, 8, self.base)
        self.set_config(cfg.COMMAND, 2, cfg.MEMORY_ENABLE | cfg.BUS_MASTER)
        if msix:
            self.set_config(self.msix_at + 2, 2, 0x8000)
            for vector in range(device.msix.count if device.msix else 0):
                self.set_vector(vector, 0x2800_0000, 1 + vector, masked=False)

    def config(self, offset: int, size: int) -> int:
        return self.host.read(self.function.slot << 15 | offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.host.write(self.function.slot << 15 | offset, size, value)

    def set_vector(self, vector: int, address: int, data: int, masked: bool) -> None:
        at = 0x8000 + 16 * vector
        for field, value in ((0, address & 0xFFFFFFFF), (4, address >> 32), (8, data), (12, int(masked))):
            self.bar_write(at + field, 4, value)

    def bar_read(self, offset: int, size: int) -> int:
        return self.window.read(self.base - self.window.bus_base + offset, size)

    def bar_write(self, offset: int, size: int, value: int) -> None:
        self.window.write(self.base - self.window.bus_base + offset, size, value)

    def _place(self, offset: int, size: int) -> tuple[int, int]:
        if offset == mmio.INTERRUPT_STATUS:
            return self.structures[pci.ISR_CFG][1], 1
        if offset >= mmio.CONFIG:
            return self.structures[pci.DEVICE_CFG][1] + offset - mmio.CONFIG, size
        field, width = self.FIELDS[offset]
        return self.structures[pci.COMMON_CFG][1] + field, width

    def read(self, offset: int, size: int = 4) -> int:
        if offset == mmio.QUEUE_NUM_MAX and self.read(mmio.QUEUE_SEL) >= len(self.function.virtio.queues):
            return 0
        return self.bar_read(*self._place(offset, size))

    def write(self, offset: int, value: int, size: int = 4) -> None:
        if offset == mmio.QUEUE_NOTIFY:
            common = self.structures[pci.COMMON_CFG][1]
            self.bar_write(common + pci.QUEUE_SELECT, 2, value)
            where = self.bar_read(common + pci.QUEUE_NOTIFY_OFF, 2) * pci.NOTIFY_MULTIPLIER
            self.bar_write(self.structures[pci.NOTIFY_CFG][1] + where, 2, value)
            return
        if offset == mmio.QUEUE_READY:
            self.bar_write(self.structures[pci.COMMON_CFG][1] + pci.QUEUE_MSIX_VECTOR, 2, 1 + self.read(mmio.QUEUE_SEL))
            self.bar_write(self.structures[pci.COMMON_CFG][1] + pci.CONFIG_MSIX_VECTOR, 2, 0)
            if not value:  # a driver takes a queue back by resetting it (2.6.1)
                self.write(mmio.QUEUE_RESET, 1)
                return
        self.bar_write(*self._place(offset, size), value)


def capabilities(driver: PciDriver) -> list[tuple[int, int]]:
    """(offset, id) of each capability, by walking the list as software does."""
    found, at = [], driver.config(cfg.CAPABILITIES, 1)
    while at and len(found) < 48:
        found.append((at, driver.config(at, 1)))
        at = driver.config(at + 1, 1)
    return found
