"""MSIs into the in-kernel IMSIC: each MSI-X vector in use is an irqfd whose GSI is routed to its message.

The routing table is kvmcore's as a whole (KVM_SET_GSI_ROUTING), so it is kept here: the APLIC's pins, then one GSI
per vector. Used by devices/pci/msix.py through MsiVector; made by machine/irq.py.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from protocol.abi import structs
from protocol.abi.errors import KvmError
from qemu_user.devices.pci.msix import MsiVector

if TYPE_CHECKING:
    from protocol.client import Vm


class MsiRoutes:
    """`pins`: how many GSIs are the APLIC's, GSI n being pin n."""

    def __init__(self, vm: Vm, pins: int) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        chip = structs.IRQ_ROUTING_TYPE_IRQCHIP
        self._table = [_entry(gsi, chip, structs.IRQ_ROUTING_IRQCHIP.build(irqchip=0, pin=gsi)) for gsi in range(pins)]
        self._fds: list[int] = []

    def make(self) -> MsiVector:
        """One more vector."""
        return _Vector(self)

    def add(self, address: int, data: int) -> tuple[int, int]:
        """(GSI, eventfd) of a new message."""
        with self._lock:
            gsi = len(self._table)
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._fds.append(fd)
            self._table.append(_message(gsi, address, data))
            self._vm.set_gsi_routing(self._table)
            self._vm.irqfd(fd, gsi)
        return gsi, fd

    def route(self, gsi: int, address: int, data: int) -> None:
        """Replace a message."""
        with self._lock:
            self._table[gsi] = _message(gsi, address, data)
            self._vm.set_gsi_routing(self._table)

    def close(self) -> None:
        """Give the descriptors back."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)


class _Vector:
    """kvmcore learns of a message when it is first used: drivers set up many more vectors than ever fire."""

    def __init__(self, routes: MsiRoutes) -> None:
        self._routes = routes
        self._gsi, self._fd = 0, -1
        self._message = self._routed = (0, 0)

    def route(self, address: int, data: int) -> None:
        self._message = address, data

    def fire(self) -> None:
        try:
            if self._fd < 0:
                self._gsi, self._fd = self._routes.add(*self._message)
                self._routed = self._message
            elif self._message != self._routed:
                self._routes.route(self._gsi, *self._message)
                self._routed = self._message
        except KvmError:
            return  # kvmcore is gone, which the machine notices by itself, and the message with it
        os.eventfd_write(self._fd, 1)


def _message(gsi: int, address: int, data: int) -> bytes:
    body = structs.IRQ_ROUTING_MSI.build(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
    return _entry(gsi, structs.IRQ_ROUTING_TYPE_MSI, body)


def _entry(gsi: int, kind: int, body: bytes) -> bytes:
    return structs.IRQ_ROUTING_ENTRY.build(gsi=gsi, type=kind, u=body.ljust(32, b"\0"))
