"""The virtio-pci transport, modern only (virtio 1.2, section 4.1): one PCI function per virtio device.

BAR 4 holds the four structures, BAR 1 the MSI-X table; capabilities say where. What the registers do is transport.py's;
queue notifications are ioeventfds (a Doorbell per queue) that move with BAR 4. Without MSI-X: INTx and the ISR status.
"""

from __future__ import annotations

import struct
import threading
from functools import partial
from typing import Any, Literal

from qemu_user.devices.device import Doorbell, MakeDoorbell, State, require
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.pci.config_space import Bar, Identity
from qemu_user.devices.pci.function import MAX_VECTORS, FunctionState, PciFunction
from qemu_user.devices.pci.msix import MakeVector
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.queue import Queue
from qemu_user.devices.virtio.transport import TransportState, VirtioTransport

VENDOR, FIRST_DEVICE, SUBSYSTEM = 0x1AF4, 0x1040, 0x1100
MODERN_REVISION = 1
BAR = 4
COMMON, ISR, CONFIG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
"""Where the structures lie in the BAR, each with a page of its own."""
PAGE, BAR_SIZE = 0x1000, 0x4000
NOTIFY_MULTIPLIER = 4
VENDOR_CAPABILITY = 0x09
COMMON_CFG, NOTIFY_CFG, ISR_CFG, DEVICE_CFG, PCI_CFG = 1, 2, 3, 4, 5
"""cfg_type of the capabilities (4.1.4)."""
NO_VECTOR = 0xFFFF
QUEUE_INTERRUPT, CONFIG_INTERRUPT = 1, 2
"""ISR status bits (4.1.4.5)."""

DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE = 0x00, 0x04, 0x08, 0x0C
CONFIG_MSIX_VECTOR, NUM_QUEUES, DEVICE_STATUS, CONFIG_GENERATION = 0x10, 0x12, 0x14, 0x15
QUEUE_SELECT, QUEUE_SIZE, QUEUE_MSIX_VECTOR, QUEUE_ENABLE, QUEUE_NOTIFY_OFF = 0x16, 0x18, 0x1A, 0x1C, 0x1E
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE, QUEUE_NOTIFY_DATA, QUEUE_RESET = 0x20, 0x28, 0x30, 0x38, 0x3A
_ADDRESSES = {QUEUE_DESC: "descriptors", QUEUE_DRIVER: "available", QUEUE_DEVICE: "used"}
_WIDTHS = {
    **dict.fromkeys((DEVICE_FEATURE_SELECT, DEVICE_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_FEATURE), (4,)),
    **dict.fromkeys((CONFIG_MSIX_VECTOR, NUM_QUEUES, QUEUE_SELECT, QUEUE_SIZE, QUEUE_MSIX_VECTOR), (2,)),
    **dict.fromkeys((QUEUE_ENABLE, QUEUE_NOTIFY_OFF, QUEUE_NOTIFY_DATA, QUEUE_RESET), (2,)),
    **dict.fromkeys((DEVICE_STATUS, CONFIG_GENERATION), (1,)),
    **dict.fromkeys(_ADDRESSES, (4, 8)),
    **dict.fromkeys((offset + 4 for offset in _ADDRESSES), (4,)),
}
"""Width of each field of the common configuration (4.1.3.1: other widths are the driver's fault)."""
_CAPABILITY = struct.Struct("<BBBB2xII")


class VirtioPciState(State, frozen=True, tag="virtio_pci", kw_only=True):
    """`vectors`: the MSI-X vector of the configuration, then of each queue."""

    version: Literal[1] = 1
    function: FunctionState
    common: TransportState
    vectors: list[int]
    isr: int


class VirtioPci(PciFunction):
    """`make_vector` delivers MSIs (None: the machine has none), `make_doorbell` the queue notifications."""

    State = VirtioPciState

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        virtio: VirtioDevice,
        make_vector: MakeVector | None,
        make_doorbell: MakeDoorbell | None = None,
    ) -> None:
        identity = Identity(
            VENDOR, FIRST_DEVICE + virtio.device_id, virtio.pci_class, MODERN_REVISION, VENDOR, SUBSYSTEM
        )
        bars = [Bar(BAR, BAR_SIZE, "memory64", prefetchable=True)]
        vectors = min(len(virtio.queues) + 1, MAX_VECTORS)
        super().__init__(name, identity, bars, vectors, make_vector, pin=1)
        self.virtio = virtio
        self._interrupt_lock = threading.Lock()
        self._isr = 0
        self._vectors = [NO_VECTOR] * (1 + len(virtio.queues))
        self.transport = VirtioTransport(virtio, memory, self.counters, self.lock, self)
        self._add_capabilities()
        self._doorbells: list[Doorbell] = [
            make_doorbell(partial(self.transport.kicked, queue.index), 2) for queue in virtio.queues if make_doorbell
        ]

    def _add_capabilities(self) -> None:
        add = self.config_space.add_capability
        for kind, offset, extra in (
            (COMMON_CFG, COMMON, b""),
            (ISR_CFG, ISR, b""),
            (DEVICE_CFG, CONFIG, b""),
            (NOTIFY_CFG, NOTIFY, struct.pack("<I", NOTIFY_MULTIPLIER)),
        ):
            size = _CAPABILITY.size + 2 + len(extra)
            add(VENDOR_CAPABILITY, _CAPABILITY.pack(size, kind, BAR, 0, offset, PAGE) + extra)
        # The window into the BAR through configuration space (4.1.4.9): bar, offset, length, data are writable.
        body = _CAPABILITY.pack(_CAPABILITY.size + 6, PCI_CFG, 0, 0, 0, 0) + bytes(4)
        mask = _CAPABILITY.pack(0, 0, 0xFF, 0, 0xFFFFFFFF, 0xFFFFFFFF) + b"\xff" * 4
        self._window_at = add(VENDOR_CAPABILITY, body, mask)
        self.add_express_capability()

    # -- configuration space -----------------------------------------------------------------------

    def _window(self, offset: int, size: int) -> tuple[int, int, int] | None:
        """(BAR, offset, length) if the access meets pci_cfg_data and the capability is set up well."""
        at = self._window_at
        if not (at + 16 <= offset and offset + size <= at + 20):
            return None
        bar, where, length = (self.config_space.read(at + field, width) for field, width in ((4, 1), (8, 4), (12, 4)))
        known = self.config_space.bars.get(bar)
        if known is None or length not in (1, 2, 4) or where % length or where + length > known.size:
            self.counters.count("bad_window")
            return None
        return bar, where, length

    def read(self, offset: int, size: int) -> int:
        if window := self._window(offset, size):
            bar, where, length = window
            self.config_space.set(self._window_at + 16, length, self.read_bar(bar, where, length))
        return super().read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        super().write(offset, size, value)
        if window := self._window(offset, size):
            bar, where, length = window
            self.write_bar(bar, where, length, self.config_space.read(self._window_at + 16, length))

    def bar_moved(self, index: int, address: int | None) -> None:
        if index == BAR:
            for number, doorbell in enumerate(self._doorbells):
                doorbell.place(None if address is None else address + NOTIFY + NOTIFY_MULTIPLIER * number)

    # -- the BAR -----------------------------------------------------------------------------------

    def read_bar(self, index: int, offset: int, size: int) -> int:
        if index != BAR:
            return super().read_bar(index, offset, size)
        if offset == ISR:
            return self._read_isr()  # without the lock: a vCPU's interrupt must not wait for a disk
        with self.lock:
            if offset >= NOTIFY:
                return 0
            if offset >= CONFIG:
                return self.transport.read_config(offset - CONFIG, size)
            if size not in _WIDTHS.get(offset, ()):
                return self.bad_access(offset, size)
            return self._read_common(offset, size)

    def _read_common(self, offset: int, size: int) -> int:
        transport = self.transport
        queue = transport.queue()
        base = offset & ~4
        if base in _ADDRESSES:
            address = getattr(queue, _ADDRESSES[base]) if queue else 0
            return int(address >> 8 * (offset - base)) & (1 << 8 * size) - 1
        if offset == DEVICE_FEATURE:
            return transport.device_features()
        if offset == DRIVER_FEATURE:
            return transport.accepted_features()
        if offset == QUEUE_MSIX_VECTOR:
            return self._vectors[1 + queue.index] if queue else NO_VECTOR
        if offset == QUEUE_SIZE:
            return queue.size if queue else 0
        if offset == QUEUE_ENABLE:
            return int(queue.ready) if queue else 0
        if offset == QUEUE_NOTIFY_OFF:
            return queue.index if queue else 0
        return {
            DEVICE_FEATURE_SELECT: transport.device_features_select,
            DRIVER_FEATURE_SELECT: transport.driver_features_select,
            CONFIG_MSIX_VECTOR: self._vectors[0],
            NUM_QUEUES: len(self.virtio.queues),
            DEVICE_STATUS: transport.status,
            CONFIG_GENERATION: transport.generation & 0xFF,
            QUEUE_SELECT: transport.queue_select,
        }.get(offset, 0)  # queue_reset reads 0: a reset is over when its write is (4.1.4.3.1)

    def write_bar(self, index: int, offset: int, size: int, value: int) -> None:
        if index != BAR:
            super().write_bar(index, offset, size, value)
            return
        value &= (1 << 8 * size) - 1
        if offset >= NOTIFY:
            self.transport.notified((offset - NOTIFY) // NOTIFY_MULTIPLIER)
        elif offset >= CONFIG:
            with self.lock:
                self.virtio.write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size not in _WIDTHS.get(offset, ()):
            self.bad_access(offset, size)
        else:
            with self.lock:
                self._write_common(offset, size, value)

    def _write_common(self, offset: int, size: int, value: int) -> None:
        transport = self.transport
        base = offset & ~4
        if base in _ADDRESSES:
            transport.set_address(_ADDRESSES[base], 8 * (offset - base), value)
            if size == 8:
                transport.set_address(_ADDRESSES[base], 32, value >> 32)
        elif offset == DEVICE_FEATURE_SELECT:
            transport.device_features_select = value
        elif offset == DRIVER_FEATURE_SELECT:
            transport.driver_features_select = value
        elif offset == DRIVER_FEATURE:
            transport.accept_features(value)
        elif offset == DEVICE_STATUS:
            transport.set_status(value)
        elif offset == QUEUE_SELECT:
            transport.queue_select = value
        elif offset == CONFIG_MSIX_VECTOR:
            self._vectors[0] = self._checked_vector(value)
        elif offset == QUEUE_MSIX_VECTOR:
            if queue := transport.queue():
                self._vectors[1 + queue.index] = self._checked_vector(value)
        elif offset == QUEUE_SIZE:
            if queue := transport.idle_queue():
                queue.size = value
        elif offset == QUEUE_ENABLE and value == 1:
            transport.enable_queue()
        elif offset == QUEUE_RESET and value == 1:
            transport.reset_queue()
        else:
            self.bad_access(offset, size)

    def _checked_vector(self, value: int) -> int:
        """A vector that is not there reads back as NO_VECTOR (4.1.5.1.2.1)."""
        return value if self.msix is not None and value < self.msix.count else NO_VECTOR

    # -- interrupts --------------------------------------------------------------------------------

    def used(self, queue: Queue) -> None:
        self._interrupt(self._vectors[1 + queue.index], QUEUE_INTERRUPT)

    def config_changed(self) -> None:
        self._interrupt(self._vectors[0], CONFIG_INTERRUPT)

    def _interrupt(self, vector: int, reason: int) -> None:
        msix = self.msix
        if msix is not None and msix.enabled:
            if reason == CONFIG_INTERRUPT:
                with self._interrupt_lock:
                    self._isr |= reason  # 4.1.4.5.1: set before the notification, with MSI-X too
            if vector != NO_VECTOR:
                msix.fire(vector)
            return
        with self._interrupt_lock:
            self._isr |= reason
            self.set_intx(True)

    def _read_isr(self) -> int:
        with self._interrupt_lock:
            reasons, self._isr = self._isr, 0
            if reasons:
                self.set_intx(False)
        return reasons

    def quiet(self) -> None:
        self._vectors = [NO_VECTOR] * len(self._vectors)
        self._read_isr()

    def repeat(self) -> None:
        msix = self.msix
        if msix is None or not msix.enabled:
            return  # the pin is a level, which restore() has driven
        for queue in self.virtio.queues:
            if queue.answered and (vector := self._vectors[1 + queue.index]) != NO_VECTOR:
                msix.fire(vector)  # one too many does no harm

    def prepare(self) -> None:
        if self.msix is not None:
            ready = [self._vectors[1 + queue.index] for queue in self.virtio.queues if queue.ready]
            self.msix.prepare(vector for vector in ready if vector != NO_VECTOR)

    # -- life --------------------------------------------------------------------------------------

    def save(self) -> VirtioPciState:
        with self.lock:
            return VirtioPciState(
                function=self.save_function(),
                common=self.transport.save(),
                vectors=list(self._vectors),
                isr=self._isr,
            )

    def restore(self, state: Any) -> None:
        self.check_function(state.function)
        require(len(state.vectors) == len(self._vectors), f"{self.name}: saved with another number of queues")
        require(
            all(vector == self._checked_vector(vector) for vector in state.vectors if vector != NO_VECTOR),
            f"{self.name}: an MSI-X vector that is not there",
        )
        require(0 <= state.isr <= QUEUE_INTERRUPT | CONFIG_INTERRUPT, f"{self.name}: isr out of range")
        with self.lock:
            self.transport.restore(state.common, self.transport.check(state.common))
            with self._interrupt_lock:
                self._vectors, self._isr = list(state.vectors), state.isr
        self.restore_function(state.function)

    def reset(self) -> None:
        self.transport.reset()
        super().reset()
