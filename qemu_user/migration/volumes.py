"""What a VM's copy consists of beside its state: RAM, disks, the flash's banks, as units that are tracked, read and written.

A volume is tracked from start() to stop(); take() says which units were written meanwhile, by vCPUs (kvmcore's dirty
log) or devices (WriteLog). Whatever take() has named must be read after it. Used by precopy.py and by the receivers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from protocol.abi.errors import KvmError
from qemu_user.backends.block.logged import BLOCK
from qemu_user.devices.memory import PAGE
from qemu_user.holes import with_data
from qemu_user.machine.machine import RAM_SLOT
from qemu_user.migration import pages
from qemu_user.write_log import WriteLog

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

FLASH = 0x80
"""The number of the flash's first bank as a volume."""


class Ram:
    """The guest's memory, as memfd and mapped. `number` names a volume in streams: 0 is RAM, 1 + i the i-th disk, FLASH + i
    the i-th bank of the flash."""

    number, name, unit = 0, "memory", PAGE

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.fd: int = machine.ram_fd
        _, self.view = machine.memory.regions[0]
        self.size = len(self.view)
        self.address = pages.address_of(self.view)
        self._log = machine.memory.logs[0]
        self._on = False

    def start(self) -> bytearray:
        """Track from now on; the map of what is worth copying at all."""
        self._machine.complete_memory()
        self._on = True
        self._log.start()
        self._machine.log_dirty_pages(True)
        return with_data(self.fd, self.size, self.unit)

    def take(self) -> bytearray:
        """The map of what was written since start() or the last take()."""
        units = self.size // self.unit
        written = self._log.take()
        return pages.union(pages.from_bits(self._machine.vm.get_dirty_log(RAM_SLOT, units), units), written)

    def rings(self) -> list[int]:
        """Units in which queues of devices lie, which are looked at as soon as the machine goes on."""
        base = self._machine.memory.regions[0][0]
        found: list[int] = []
        for transport in self._machine.parts.transports:
            for queue in transport.virtio.queues:
                for address, size in queue.rings():
                    found += range((address - base) // self.unit, (address + size - 1 - base) // self.unit + 1)
        return found

    def stop(self) -> None:
        """Track no more. Idempotent."""
        if self._on:
            self._on = False
            self._log.stop()
            try:
                self._machine.log_dirty_pages(False)
            except KvmError:
                if self._machine.vm.alive:  # else nobody logs anything any more
                    raise


class Copied(Protocol):
    """What a Disk asks of a disk's backend (LoggedDisk), or of a bank of the flash (BankContent)."""

    size: int
    log: WriteLog

    @property
    def descriptor(self) -> int | None: ...

    def lock(self) -> None: ...

    def with_data(self, unit: int, chain: bool = True) -> bytearray: ...

    def read(self, offset: int, views: list[memoryview]) -> None: ...

    def write(self, offset: int, views: list[memoryview]) -> None: ...

    def zero(self, offset: int, length: int, unmap: bool) -> None: ...

    def flush(self) -> None: ...


class Disk:
    """A disk image, through its backend, or a bank of the flash."""

    unit = BLOCK

    def __init__(self, number: int, disk: Copied) -> None:
        self.number = number
        self.name = f"disk{number - 1}" if number < FLASH else f"flash{number - FLASH}"
        self.disk, self.size = disk, disk.size
        self.chain = True
        """Whether what is in backing files is to be copied too."""

    def start(self) -> bytearray:
        self.disk.log.start()
        return self.disk.with_data(self.unit, self.chain)

    def take(self) -> bytearray:
        return self.disk.log.take()

    def stop(self) -> None:
        self.disk.log.stop()

    def read(self, first: int, count: int) -> bytearray:
        """The bytes of units [first, first + count), the last one as far as it goes."""
        start = first * self.unit
        data = bytearray(min(count * self.unit, self.size - start))
        self.disk.read(start, [memoryview(data)])
        return data


def banks(machine: Machine) -> list[Disk]:
    """The flash: all of it, for firmware that only reads may be another version's elsewhere."""
    contents = machine.flash.contents if machine.flash is not None else []
    return [Disk(FLASH + index, content) for index, content in enumerate(contents)]


def writable_disks(machine: Machine) -> list[Disk]:
    """The disks that change while the VM runs."""
    return [Disk(1 + index, disk) for index, disk in enumerate(machine.parts.disks) if not disk.readonly]
