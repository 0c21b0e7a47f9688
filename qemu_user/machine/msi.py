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
        self._wanted: list[_Vector] = []

    def make(self) -> MsiVector:
        """One more vector."""
        return _Vector(self)

    def add(self, vectors: list[_Vector]) -> None:
        """Make those known that are not, all at once. Any thread."""
        with self._lock:
            added = []
            for vector in vectors:
                if vector.is_known:
                    continue
                gsi, message = len(self._table), vector.message
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                self._fds.append(fd)
                self._table.append(_message(gsi, *message))
                added.append((vector, gsi, fd, message))
            if not added:
                return
            self._vm.set_gsi_routing(self._table)
            batch = self._vm.batch()
            answers = [batch.irqfd(self._vm, fd, gsi) for _, gsi, fd, _ in added]
            batch.send()
            for answer in answers:
                answer.checked()
            for vector, gsi, fd, message in added:
                vector.known(gsi, fd, message)

    def want(self, vector: _Vector) -> None:
        """It will be used: settle() makes it known."""
        self._wanted.append(vector)

    def settle(self) -> None:
        """Make all that are wanted known at once."""
        vectors, self._wanted = self._wanted, []
        self.add(vectors)

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
        self.message = self._routed = (0, 0)

    def route(self, address: int, data: int) -> None:
        self.message = address, data

    @property
    def is_known(self) -> bool:
        """Whether kvmcore has a message of it."""
        return self._fd >= 0

    def prepare(self) -> None:
        if not self.is_known:
            self._routes.want(self)

    def known(self, gsi: int, fd: int, message: tuple[int, int]) -> None:
        """kvmcore has it by that GSI and eventfd."""
        self._gsi, self._routed = gsi, message
        self._fd = fd  # last: who finds it may fire

    def fire(self) -> None:
        try:
            if not self.is_known:
                self._routes.add([self])
            message = self.message
            if message != self._routed:
                self._routes.route(self._gsi, *message)
                self._routed = message
        except KvmError:
            return  # kvmcore is gone, which the machine notices by itself, and the message with it
        os.eventfd_write(self._fd, 1)


def _message(gsi: int, address: int, data: int) -> bytes:
    body = structs.IRQ_ROUTING_MSI.build(address_lo=address & 0xFFFFFFFF, address_hi=address >> 32, data=data)
    return _entry(gsi, structs.IRQ_ROUTING_TYPE_MSI, body)


def _entry(gsi: int, kind: int, body: bytes) -> bytes:
    return structs.IRQ_ROUTING_ENTRY.build(gsi=gsi, type=kind, u=body.ljust(32, b"\0"))
