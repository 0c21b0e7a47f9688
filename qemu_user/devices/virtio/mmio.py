"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): the registers of one slot.

Wraps one VirtioDevice, or none: an empty slot reads as device id 0 and the driver passes on. What the registers do
is transport.py's; kicks come by ioeventfds (machine/build.py). One interrupt line for everything.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar, Literal

from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State, require
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.queue import Queue
from qemu_user.devices.virtio.transport import TransportState, VirtioTransport

MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x080, 0x084
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x090, 0x094
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0x0A0, 0x0A4
SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0x0B0, 0x0B4, 0x0B8, 0x0BC
QUEUE_RESET = 0x0C0
CONFIG_GENERATION, CONFIG = 0x0FC, 0x100

_ADDRESSES = {
    QUEUE_DESC_LOW: ("descriptors", 0),
    QUEUE_DESC_HIGH: ("descriptors", 32),
    QUEUE_DRIVER_LOW: ("available", 0),
    QUEUE_DRIVER_HIGH: ("available", 32),
    QUEUE_DEVICE_LOW: ("used", 0),
    QUEUE_DEVICE_HIGH: ("used", 32),
}
MAGIC = 0x74726976  # "virt"
VENDOR = 0x554D4551
"""QEMU's: small guests that were written for its machine look for it."""
USED_BUFFER, CONFIG_CHANGE = 1, 2


class VirtioMmioState(State, frozen=True, tag="virtio_mmio", kw_only=True):
    """The transport's registers; `common` is None for an empty slot."""

    version: Literal[1] = 1
    interrupt_status: int
    common: TransportState | None


class VirtioMmio(Device):
    """One slot. Level-triggered: the line is asserted while InterruptStatus is not zero."""

    compatible: ClassVar[str | list[str]] = "virtio,mmio"
    region_size = 0x1000
    State = VirtioMmioState

    def __init__(
        self, name: str, irq: InterruptLine, memory: GuestMemory, virtio: VirtioDevice | None = None
    ) -> None:
        super().__init__(name)
        self._irq = irq
        self.virtio = virtio
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        # Small guests set no feature above bit 31. A device may go on without VERSION_1 (6.2), and as QEMU's ours does.
        self.transport = VirtioTransport(virtio, memory, self.counters, self.lock, self, required=0) if virtio else None

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == INTERRUPT_STATUS and size == 4:
            return self._interrupt_status  # without the lock: a vCPU's interrupt must not wait for a disk
        transport = self.transport
        if transport is None:
            return {MAGIC_VALUE: MAGIC, VERSION: 2, VENDOR_ID: VENDOR}.get(offset, 0) if size == 4 else 0
        with self.lock:
            if offset >= CONFIG:
                return transport.read_config(offset - CONFIG, size)
            if size != 4:
                return self.bad_access(offset, size)
            return self._read_register(offset, transport)

    def _read_register(self, offset: int, transport: VirtioTransport) -> int:
        if offset == MAGIC_VALUE:
            return MAGIC
        if offset == VERSION:
            return 2
        if offset == DEVICE_ID:
            return transport.virtio.device_id
        if offset == VENDOR_ID:
            return VENDOR
        if offset == DEVICE_FEATURES:
            return transport.device_features()
        if offset == QUEUE_NUM_MAX:
            return queue.max_size if (queue := transport.queue()) else 0
        if offset == QUEUE_READY:
            return int(queue.ready) if (queue := transport.queue()) else 0
        if offset == QUEUE_RESET:
            return 0  # done before the write was: 0 says that it is over (4.2.2.1)
        if offset == STATUS:
            return transport.status
        if offset == CONFIG_GENERATION:
            return transport.generation
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return 0xFFFFFFFF  # no shared memory region has this id (4.2.2.1)
        return self.bad_access(offset, 4)

    def write(self, offset: int, size: int, value: int) -> None:
        transport = self.transport
        if transport is None:
            return
        value &= (1 << 8 * size) - 1
        if offset >= CONFIG:
            with self.lock:
                transport.virtio.write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size != 4:
            self.bad_access(offset, size)
        elif offset == INTERRUPT_ACK:
            self._acknowledge(value)
        elif offset == QUEUE_NOTIFY:
            transport.notified(value)
        else:
            with self.lock:
                self._write_register(offset, value, transport)

    def _write_register(self, offset: int, value: int, transport: VirtioTransport) -> None:
        if offset == DEVICE_FEATURES_SEL:
            transport.device_features_select = value
        elif offset == DRIVER_FEATURES_SEL:
            transport.driver_features_select = value
        elif offset == DRIVER_FEATURES:
            transport.accept_features(value)
        elif offset == QUEUE_SEL:
            transport.queue_select = value
        elif offset == STATUS:
            transport.set_status(value)
        elif offset == QUEUE_READY:
            self._write_ready(value, transport)
        elif offset == QUEUE_RESET and value == 1:
            transport.reset_queue()
        elif offset == QUEUE_NUM:
            if queue := transport.idle_queue():
                queue.size = value & 0xFFFF
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            transport.set_address(name, shift, value)
        else:
            self.bad_access(offset, 4)

    def _write_ready(self, value: int, transport: VirtioTransport) -> None:
        if value & 1:
            transport.enable_queue()
        elif queue := transport.queue():
            queue.ready = False
        else:
            self.counters.count("bad_queue_write")

    # -- interrupts --------------------------------------------------------------------------------

    def used(self, queue: Queue) -> None:
        self._interrupt(USED_BUFFER)

    def config_changed(self) -> None:
        self._interrupt(CONFIG_CHANGE)

    def quiet(self) -> None:
        self._acknowledge(0xFFFFFFFF)

    def repeat(self) -> None:
        with self._interrupt_lock:
            if self._interrupt_status:
                self._irq.assert_line()

    def prepare(self) -> None:
        pass

    def _interrupt(self, reason: int) -> None:
        with self._interrupt_lock:
            self._interrupt_status |= reason
            self._irq.assert_line()

    def _acknowledge(self, bits: int) -> None:
        with self._interrupt_lock:
            self._interrupt_status &= ~bits
            if not self._interrupt_status:
                self._irq.release_line()

    # -- tree and state ----------------------------------------------------------------------------

    def fdt_node(self, place: Place) -> FdtNode:
        return FdtNode(f"virtio_mmio@{place.base:x}", place.properties(self.compatible))

    def save(self) -> VirtioMmioState:
        with self.lock:
            common = self.transport.save() if self.transport else None
            return VirtioMmioState(interrupt_status=self._interrupt_status, common=common)

    def restore(self, state: Any) -> None:
        transport = self.transport
        require(0 <= state.interrupt_status <= 3, f"{self.name}: interrupt_status out of range")
        require(
            (state.common is None) == (transport is None), f"{self.name}: saved from a virtio device of another kind"
        )
        with self.lock:
            if transport is not None:
                transport.restore(state.common, transport.check(state.common))
            with self._interrupt_lock:
                self._interrupt_status = state.interrupt_status
                if self._interrupt_status:
                    self._irq.assert_line()
                else:
                    self._irq.release_line()

    def reset(self) -> None:
        if self.transport is not None:
            self.transport.reset()
