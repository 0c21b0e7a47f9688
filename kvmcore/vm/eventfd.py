"""What a guest's MMIO store meets before it becomes an exit: ioeventfds and coalesced zones (KVM_ABI 1.9).

`Eventfds` is the VM's MMIO bus and the owner of its irqfds. Called by exits.py for each store without a slot,
and by kvmcore/ioctl/vm.py. Devices match in the order of address, then registration. The coalesced ring lies in a page
that the client writes too: its indices are checked at each use.
"""

from __future__ import annotations

import os
import threading
from errno import EEXIST, EINVAL, ENOENT, ENOSPC
from typing import TYPE_CHECKING, NamedTuple

from protocol.abi import run_page, structs
from protocol.abi.errors import KvmError

from kvmcore.vm.irqfd import Irqfds
from kvmcore.vm.objects import eventfd_of

if TYPE_CHECKING:
    from kvmcore.vm.objects import HostFile
    from kvmcore.vm.vm import Vm

MAX_BUS_DEVICES = 1000
"""Devices on one bus that are not ioeventfds; from then on ENOSPC, for ioeventfds too (KVM_ABI 1.14)."""
_FLAGS = (1 << 5) - 1
_U64 = (1 << 64) - 1


def eventfd_id(fd: int) -> int:
    """What tells one eventfd from another: the kernel's id, the same for every descriptor of it."""
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
        for line in info:
            if line.startswith("eventfd-id:"):
                return int(line.split(":")[1])
    status = os.fstat(fd)
    return status.st_dev << 32 | status.st_ino


class Ioeventfd(NamedTuple):
    """A registration: stores of `length` bytes (0: any) of `datamatch` (None: any value) to exactly `addr`."""

    order: int
    bus: str
    addr: int
    length: int
    datamatch: int | None
    identity: int
    fd: int

    def collides(self, bus: str, addr: int, length: int, datamatch: int | None) -> bool:
        """Whether a second registration would be ambiguous."""
        if (self.bus, self.addr) != (bus, addr):
            return False
        if not self.length or not length:
            return True
        return self.length == length and (
            self.datamatch is None or datamatch is None or self.datamatch == datamatch
        )

    def accepts(self, length: int, data: bytes) -> bool:
        """Whether a store to `addr` is for this eventfd."""
        if self.length == 0:
            return True
        if self.length != length:
            return False
        return self.datamatch is None or self.datamatch & ((1 << 8 * length) - 1) == int.from_bytes(data, "little")


class Zone(NamedTuple):
    """A coalesced zone: stores inside [addr, addr + size) go to the ring."""

    order: int
    addr: int
    size: int
    pio: int

    def contains(self, addr: int, length: int) -> bool:
        """Whether [addr, addr + length) lies in the zone."""
        return self.addr <= addr and addr + length <= self.addr + self.size and addr + length <= _U64


class Eventfds:
    """The MMIO and PIO buses of one VM, and its irqfds."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.irqfds = Irqfds(vm)
        self._lock = threading.Lock()
        self._order = 0
        self._events: dict[int, list[Ioeventfd]] = {}
        self._zones: list[Zone] = []
        self._reserved = 0

    # -- the guest's side -----------------------------------------------------------------------------------------

    def write(self, addr: int, data: bytes) -> bool:
        """A guest's store. True when an ioeventfd or the ring has taken it."""
        events = self._events.get(addr, ())
        if not self._zones:
            return any(self._signal(event, data) for event in events)
        length = len(data)
        matches: list[tuple[int, int, Ioeventfd | Zone]] = [(addr, event.order, event) for event in events]
        matches += [(zone.addr, zone.order, zone) for zone in self._zones if not zone.pio and zone.contains(addr, length)]
        matches.sort(key=lambda match: match[:2])
        for _, _, match in matches:
            if self._signal(match, data) if isinstance(match, Ioeventfd) else self._coalesce(addr, data, match.pio):
                return True
        return False

    @staticmethod
    def _signal(event: Ioeventfd, data: bytes) -> bool:
        if event.bus != "mmio" or not event.accepts(len(data), data):
            return False
        try:
            os.eventfd_write(event.fd, 1)
        except BlockingIOError:
            pass  # the counter is at its maximum: the waiter has enough reason to wake as it is
        return True

    def _coalesce(self, addr: int, data: bytes, pio: int) -> bool:
        with self._lock:
            ring = self.vm.ring.view
            (last,) = run_page.U32.unpack_from(ring, 4)
            (first,) = run_page.U32.unpack_from(ring, 0)
            if last >= run_page.COALESCED_MAX or (last + 1) % run_page.COALESCED_MAX == first:
                return False
            at = 8 + last * run_page.COALESCED_ENTRY_SIZE
            run_page.COALESCED_ENTRY.pack_into(ring, at, addr, len(data), pio, data)
            run_page.U32.pack_into(ring, 4, (last + 1) % run_page.COALESCED_MAX)
        return True

    # -- ioeventfd ------------------------------------------------------------------------------------------------

    def ioeventfd(self, number: int, addr: int, length: int, datamatch: int, flags: int) -> None:
        """KVM_IOEVENTFD. EINVAL, EBADF, EEXIST, ENOSPC; for DEASSIGN ENOENT."""
        bus = "pio" if flags & structs.IOEVENTFD_FLAG_PIO else "mmio"
        if flags & structs.IOEVENTFD_FLAG_CCW_NOTIFY and bus == "mmio":
            bus = "ccw"
        match = datamatch if flags & structs.IOEVENTFD_FLAG_DATAMATCH else None
        if flags & structs.IOEVENTFD_FLAG_DEASSIGN:
            self._deassign(eventfd_of(self.vm.session, number), bus, addr, length, match)
            return
        if length not in (0, 1, 2, 4, 8) or addr + length > _U64:
            raise KvmError(EINVAL, reason=f"length {length} at {addr:#x}")
        if flags & ~_FLAGS or (length == 0 and match is not None):
            raise KvmError(EINVAL, reason=f"flags {flags:#x}")
        file = eventfd_of(self.vm.session, number)
        with self._lock:
            if any(event.collides(bus, addr, length, match) for event in self._events.get(addr, ())):
                raise KvmError(EEXIST, reason=f"an ioeventfd watches {addr:#x}")
            self._check_room(1 if bus == "pio" else 0)
            event = Ioeventfd(self._next(), bus, addr, length, match, eventfd_id(file.fd), file.dup())
            self._events[addr] = [*self._events.get(addr, ()), event]

    def _deassign(self, file: HostFile, bus: str, addr: int, length: int, match: int | None) -> None:
        key = (bus, addr, length, match, eventfd_id(file.fd))
        with self._lock:
            events = self._events.get(addr, [])
            for event in events:
                if event[1:6] == key:
                    rest = [other for other in events if other is not event]
                    if rest:
                        self._events[addr] = rest
                    else:
                        del self._events[addr]
                    os.close(event.fd)
                    return
        raise KvmError(ENOENT, reason="no such ioeventfd")

    # -- coalesced zones --------------------------------------------------------------------------------------------

    def register_zone(self, addr: int, size: int, pio: int) -> None:
        """KVM_REGISTER_COALESCED_MMIO. Zones may repeat and be empty. EINVAL: pio not 0 or 1; ENOSPC."""
        if pio not in (0, 1):
            raise KvmError(EINVAL, reason=f"pio {pio}")
        with self._lock:
            self._check_room(pio)
            self._zones = [*self._zones, Zone(self._next(), addr, size, pio)]

    def unregister_zone(self, addr: int, size: int, pio: int) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that contains the range; none is no error."""
        if pio not in (0, 1):
            raise KvmError(EINVAL, reason=f"pio {pio}")
        with self._lock:
            self._zones = [zone for zone in self._zones if zone.pio != pio or not zone.contains(addr, size)]

    def reserve(self, devices: int) -> None:
        """An in-kernel device takes places on the MMIO bus. ENOSPC."""
        with self._lock:
            self._check_room(0, devices)
            self._reserved += devices

    def _check_room(self, pio: int, devices: int = 1) -> None:
        used = sum(zone.pio == pio for zone in self._zones) + (0 if pio else self._reserved)
        if used + devices > MAX_BUS_DEVICES:
            raise KvmError(ENOSPC, reason="the bus is full")

    def _next(self) -> int:
        self._order += 1
        return self._order

    # -- lifetime -------------------------------------------------------------------------------------------------

    def release_irqfds(self) -> None:
        """The VM handle is closed: irqfds go at once, even when vCPUs keep the VM."""
        self.irqfds.release()

    def release(self) -> None:
        """The VM is gone."""
        self.irqfds.release()
        with self._lock:
            events, self._events = self._events, {}
            self._zones = []
        for group in events.values():
            for event in group:
                os.close(event.fd)


