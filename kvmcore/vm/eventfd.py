"""What a guest's MMIO store meets before it becomes an exit: ioeventfds and coalesced zones (KVM_ABI 1.9).

`Eventfds` is the VM's MMIO bus and the owner of its irqfds. Called by exits.py for each store without a slot,
and by kvmcore/ioctl/vm.py. Devices match in the order of Linux's bus: by address, of two at one address the
shorter first, else as registered. The coalesced ring lies in a page that the client writes too: its indices
are checked at each use.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from errno import EEXIST, EINVAL, ENOENT, ENOSPC
from typing import TYPE_CHECKING, NamedTuple

from kvmcore.engine import machine_state
from kvmcore.vm.event_signal import EventSignal
from kvmcore.vm.irqfd import Irqfds
from kvmcore.vm.objects import eventfd_of
from protocol.abi import run_page, structs
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.objects import HostFile
    from kvmcore.vm.vm import Vm

MAX_BUS_DEVICES = 1000
"""Devices on one bus that are not ioeventfds; from then on ENOSPC, for ioeventfds too (KVM_ABI 1.14)."""
_FLAGS = (1 << 5) - 1
_U64 = (1 << 64) - 1


class Ioeventfd(NamedTuple):
    """A registration: stores of `length` bytes (0: any) of `datamatch` (None: any value) to exactly `addr`.
    """

    bus: str
    addr: int
    length: int
    datamatch: int | None
    identity: int | None
    signal: EventSignal

    @property
    def size(self) -> int:
        return self.length

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
        return self.datamatch is None or self.datamatch & ((1 << 8 * length) - 1) == int.from_bytes(
            data, "little"
        )


class Zone(NamedTuple):
    """A coalesced zone: stores inside [addr, addr + size) go to the ring."""

    addr: int
    size: int
    pio: int

    def contains(self, addr: int, length: int) -> bool:
        """Whether [addr, addr + length) lies in the zone."""
        return self.addr <= addr and addr + length <= self.addr + self.size and addr + length <= _U64


def _insert(bus: list[Ioeventfd | Zone], new: Ioeventfd | Zone) -> list[Ioeventfd | Zone]:
    """A copy of `bus` with `new` where Linux puts it: before the first device that begins later or ends
    later.
    """
    end = new.addr + new.size
    for index, old in enumerate(bus):
        if old.addr > new.addr or (old.addr == new.addr and new.size and old.addr + old.size > end):
            return [*bus[:index], new, *bus[index:]]
    return [*bus, new]


def _on_mmio(device: Ioeventfd | Zone) -> bool:
    return not device.pio if isinstance(device, Zone) else device.bus == "mmio"


def _native(device: Ioeventfd | Zone) -> tuple[int, int, int, int, int]:
    """As Machine.set_bus wants it."""
    if isinstance(device, Zone):
        return device.addr, device.size, machine_state.BUS_ZONE, 0, 0
    kind = machine_state.BUS_EVENT if device.datamatch is None else machine_state.BUS_MATCHING_EVENT
    return device.addr, device.length, kind, device.datamatch or 0, device.signal.fd


class Eventfds:
    """The MMIO and PIO buses of one VM, and its irqfds."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.irqfds = Irqfds(vm)
        self._lock = threading.Lock()
        self._events: dict[int, list[Ioeventfd]] = {}
        self._zones = 0
        self._bus: list[Ioeventfd | Zone] = []
        """Everything, in the order of matching. Replaced, never changed: vCPU threads walk it without a
        lock.
        """
        self._reserved = 0
        self._stuck: list[EventSignal] = []
        """What a blocked vCPU may be writing to in native code."""

    @property
    def empty(self) -> bool:
        """Whether nothing that a guest does is written to an eventfd."""
        return not self._events and self.irqfds.empty

    def _publish(self, gone: Iterable[EventSignal] = ()) -> None:
        """Native code sees the bus as it is now; what is `gone` is closed. The lock is held."""
        free = not self.vm.tells_engine or self.vm.machine.set_bus(
            [_native(device) for device in self._bus if _on_mmio(device)], self.vm.ring.address if self._zones else 0
        )
        if not free:
            self._stuck.extend(gone)
            return
        for signal in gone:
            signal.close()

    def publish(self) -> None:
        """Guests are about to run: give the engine the bus."""
        with self._lock:
            if self._bus:
                self._publish()

    # -- the guest's side --------------------------------------------------------------------------

    def write(self, addr: int, data: bytes) -> bool:
        """A guest's store. True when an ioeventfd or the ring has taken it."""
        if not self._zones:
            return any(self._signal(event, data) for event in self._events.get(addr, ()))
        length = len(data)
        for device in self._bus:
            if isinstance(device, Zone):
                taken = not device.pio and device.contains(addr, length) and self._coalesce(addr, data, 0)
            else:
                taken = device.addr == addr and self._signal(device, data)
            if taken:
                return True
        return False

    @staticmethod
    def _signal(event: Ioeventfd, data: bytes) -> bool:
        return event.bus == "mmio" and event.accepts(len(data), data) and event.signal.send()

    def _coalesce(self, addr: int, data: bytes, pio: int) -> bool:
        machine = self.vm.machine
        machine.lock_ring()
        try:
            ring = self.vm.ring.view
            (last,) = run_page.U32.unpack_from(ring, 4)
            (first,) = run_page.U32.unpack_from(ring, 0)
            if last >= run_page.COALESCED_MAX or (last + 1) % run_page.COALESCED_MAX == first:
                return False
            at = 8 + last * run_page.COALESCED_ENTRY_SIZE
            run_page.COALESCED_ENTRY.pack_into(ring, at, addr, len(data), pio, data)
            # One store: pack_into() clears its target first, and to the client, which may look now, 0 is an index.
            ring[4:8] = run_page.U32.pack((last + 1) % run_page.COALESCED_MAX)
        finally:
            machine.unlock_ring()
        return True

    # -- ioeventfd ---------------------------------------------------------------------------------

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
            event = Ioeventfd(bus, addr, length, match, file.eventfd_id, EventSignal(file.dup()))
            self._events[addr] = [*self._events.get(addr, ()), event]
            self._bus = _insert(self._bus, event)
            self._publish()

    def _deassign(self, file: HostFile, bus: str, addr: int, length: int, match: int | None) -> None:
        key = (bus, addr, length, match, file.eventfd_id)
        with self._lock:
            events = self._events.get(addr, [])
            for event in events:
                if event[:5] == key:
                    self._bus = [device for device in self._bus if device is not event]
                    rest = [other for other in events if other is not event]
                    if rest:
                        self._events[addr] = rest
                    else:
                        del self._events[addr]
                    self._publish([event.signal])
                    return
        raise KvmError(ENOENT, reason="no such ioeventfd")

    # -- coalesced zones ---------------------------------------------------------------------------

    def register_zone(self, addr: int, size: int, pio: int) -> None:
        """KVM_REGISTER_COALESCED_MMIO. Zones may repeat and be empty. EINVAL: pio not 0 or 1; ENOSPC."""
        if pio not in (0, 1):
            raise KvmError(EINVAL, reason=f"pio {pio}")
        with self._lock:
            self._check_room(pio)
            self._bus = _insert(self._bus, Zone(addr, size, pio))
            self._zones += 1
            self._publish()

    def unregister_zone(self, addr: int, size: int, pio: int) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: every zone that contains the range; none is no error."""
        if pio not in (0, 1):
            raise KvmError(EINVAL, reason=f"pio {pio}")
        with self._lock:
            self._bus = [
                device
                for device in self._bus
                if not (isinstance(device, Zone) and device.pio == pio and device.contains(addr, size))
            ]
            self._zones = sum(isinstance(device, Zone) for device in self._bus)
            self._publish()

    def reserve(self, devices: int) -> None:
        """An in-kernel device takes places on the MMIO bus. ENOSPC."""
        with self._lock:
            self._check_room(0, devices)
            self._reserved += devices

    def _check_room(self, pio: int, devices: int = 1) -> None:
        zones = sum(isinstance(device, Zone) and device.pio == pio for device in self._bus)
        used = zones + (0 if pio else self._reserved)
        if used + devices > MAX_BUS_DEVICES:
            raise KvmError(ENOSPC, reason="the bus is full")

    # -- lifetime ----------------------------------------------------------------------------------

    def release_irqfds(self) -> None:
        """The VM handle is closed: irqfds go at once, even when vCPUs keep the VM."""
        self.irqfds.release()

    def release(self) -> None:
        """The VM is gone."""
        self.irqfds.release()
        with self._lock:
            events, self._events = self._events, {}
            if self._bus:
                self._zones, self._bus = 0, []
                self._publish([event.signal for group in events.values() for event in group])
            stuck, self._stuck = self._stuck, []
            for signal in stuck:
                signal.close()
