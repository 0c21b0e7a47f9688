"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): registers, status, queues, interrupts.

Wraps one VirtioDevice, or none: an empty slot reads as device id 0 and the driver passes on. Registers come
from vCPU threads; queues are served on the I/O thread, which learns of kicks by ioeventfds (machine/irq.py).
A driver that breaks the rules gets DEVICE_NEEDS_RESET, a counter counts it, and its queues rest until it
resets the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import msgspec

from qemu_user.devices.device import Device, FdtNode, InterruptLine, Place, State, StateError, require
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.device import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    VirtioDevice,
    VirtioState,
)
from qemu_user.devices.virtio.queue import Queue, QueueError, QueueState

MAGIC_VALUE, VERSION, DEVICE_ID, VENDOR_ID = 0x000, 0x004, 0x008, 0x00C
DEVICE_FEATURES, DEVICE_FEATURES_SEL = 0x010, 0x014
DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x020, 0x024
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x060, 0x064, 0x070
QUEUE_DESC_LOW, QUEUE_DESC_HIGH = 0x080, 0x084
QUEUE_DRIVER_LOW, QUEUE_DRIVER_HIGH = 0x090, 0x094
QUEUE_DEVICE_LOW, QUEUE_DEVICE_HIGH = 0x0A0, 0x0A4
SHM_LEN_LOW, SHM_LEN_HIGH, SHM_BASE_LOW, SHM_BASE_HIGH = 0x0B0, 0x0B4, 0x0B8, 0x0BC
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
VENDOR = 0x4D564B53  # "SKVM"
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
USED_BUFFER, CONFIG_CHANGE = 1, 2
OFFERED = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX


class VirtioMmioState(State, frozen=True, tag="virtio_mmio", kw_only=True):
    """The transport's registers and queues; `own` is the device's state in its own format, as it was
    saved.
    """

    version: Literal[1] = 1
    device_id: int
    status: int
    device_features_select: int
    driver_features_select: int
    driver_features: int
    queue_select: int
    interrupt_status: int
    config_generation: int
    queues: list[QueueState]
    own: Any = None


class VirtioMmio(Device):
    """One slot. Level-triggered: the line is asserted while InterruptStatus is not zero."""

    compatible: ClassVar[str | list[str]] = "virtio,mmio"
    region_size = 0x1000
    State = VirtioMmioState

    def __init__(
        self, name: str, irq: InterruptLine, memory: GuestMemory, virtio: VirtioDevice | None = None
    ) -> None:
        super().__init__(name)
        self._irq, self._memory = irq, memory
        self.virtio = virtio
        self._interrupt_lock = threading.Lock()
        self.defer: Callable[[Callable[[], None]], None] = lambda call: call()
        """How work is put off to the I/O thread; machine/machine.py sets it."""
        self._clear()
        if virtio is not None:
            virtio.transport = self

    def _clear(self) -> None:
        self._status = self._interrupt_status = self._generation = 0
        self._device_features_select = self._driver_features_select = 0
        self._driver_features = self._queue_select = 0

    # -- registers ---------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset == INTERRUPT_STATUS and size == 4:
            return self._interrupt_status  # without the lock: a vCPU's interrupt must not wait for a disk
        if self.virtio is None:
            return {MAGIC_VALUE: MAGIC, VERSION: 2, VENDOR_ID: VENDOR}.get(offset, 0) if size == 4 else 0
        with self.lock:
            if offset >= CONFIG:
                config = self.virtio.config()[offset - CONFIG : offset - CONFIG + size]
                return int.from_bytes(config, "little")
            if size != 4:
                return self.bad_access(offset, size)
            return self._read_register(offset, self.virtio)

    def _read_register(self, offset: int, virtio: VirtioDevice) -> int:
        if offset == MAGIC_VALUE:
            return MAGIC
        if offset == VERSION:
            return 2
        if offset == DEVICE_ID:
            return virtio.device_id
        if offset == VENDOR_ID:
            return VENDOR
        if offset == DEVICE_FEATURES:
            if self._device_features_select > 1:
                return 0
            return (virtio.features | OFFERED) >> 32 * self._device_features_select & 0xFFFFFFFF
        if offset == QUEUE_NUM_MAX:
            return queue.max_size if (queue := self._queue()) else 0
        if offset == QUEUE_READY:
            return int(queue.ready) if (queue := self._queue()) else 0
        if offset == STATUS:
            return self._status
        if offset == CONFIG_GENERATION:
            return self._generation
        if SHM_LEN_LOW <= offset <= SHM_BASE_HIGH:
            return 0xFFFFFFFF  # no shared memory region has this id (4.2.2.1)
        return self.bad_access(offset, 4)

    def write(self, offset: int, size: int, value: int) -> None:
        if self.virtio is None:
            return
        value &= (1 << 8 * size) - 1
        if offset >= CONFIG:
            with self.lock:
                self.virtio.write_config(offset - CONFIG, value.to_bytes(size, "little"))
        elif size != 4:
            self.bad_access(offset, size)
        elif offset == INTERRUPT_ACK:
            self._acknowledge(value)
        elif offset == QUEUE_NOTIFY:
            if value < len(self.virtio.queues):
                self.serve_later(value)
            else:
                self.counters.count("bad_notify")
        else:
            with self.lock:
                self._write_register(offset, value, self.virtio)

    def _write_register(self, offset: int, value: int, virtio: VirtioDevice) -> None:
        if offset == DEVICE_FEATURES_SEL:
            self._device_features_select = value
        elif offset == DRIVER_FEATURES_SEL:
            self._driver_features_select = value
        elif offset == DRIVER_FEATURES:
            self._write_features(value)
        elif offset == QUEUE_SEL:
            self._queue_select = value
        elif offset == STATUS:
            self._write_status(value, virtio)
        elif offset == QUEUE_READY:
            self._write_ready(value)
        elif offset == QUEUE_NUM or offset in _ADDRESSES:
            queue = self._queue()
            if queue is None or queue.ready:
                self.counters.count("bad_queue_write")  # a driver must not touch a live queue (4.2.2.2)
            elif offset == QUEUE_NUM:
                queue.size = value & 0xFFFF
            else:
                name, shift = _ADDRESSES[offset]
                kept = getattr(queue, name) & ~(0xFFFFFFFF << shift)
                setattr(queue, name, kept | value << shift)
        else:
            self.bad_access(offset, 4)

    def _queue(self) -> Queue | None:
        assert self.virtio is not None
        queues = self.virtio.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _write_features(self, value: int) -> None:
        if self._status & FEATURES_OK or self._driver_features_select > 1:
            self.counters.count("late_features")
            return
        shift = 32 * self._driver_features_select
        self._driver_features = self._driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def _write_status(self, value: int, virtio: VirtioDevice) -> None:
        if value == 0:
            self.reset()
            return
        value &= 0xFF
        if value & FEATURES_OK and not self._status & FEATURES_OK and not self._features_good(virtio):
            value &= ~FEATURES_OK  # the driver reads it back and gives up (3.1.1 step 6)
        started = value & DRIVER_OK and not self._status & DRIVER_OK
        # Bits are set one after the other and only a reset clears them (2.1.1).
        self._status |= value & ~NEEDS_RESET
        if started:
            if not self._status & FEATURES_OK:
                self.broken("DRIVER_OK without FEATURES_OK")
                return
            self._start(virtio)
            self._guarded(virtio.activate)

    def _features_good(self, virtio: VirtioDevice) -> bool:
        wanted = self._driver_features
        good = wanted & F_VERSION_1 and not wanted & ~(virtio.features | OFFERED)
        if not good:
            self.counters.count("features_refused")
        return bool(good)

    def _start(self, virtio: VirtioDevice) -> None:
        virtio.negotiated = self._driver_features
        virtio.live = not self._status & NEEDS_RESET
        for queue in virtio.queues:
            queue.event_index = bool(self._driver_features & F_EVENT_IDX)
            queue.indirect = bool(self._driver_features & F_INDIRECT_DESC)

    def _write_ready(self, value: int) -> None:
        queue = self._queue()
        if queue is None:
            self.counters.count("bad_queue_write")
        elif not value & 1:
            queue.ready = False
        elif not queue.ready:
            try:
                queue.enable(self._memory)
            except QueueError as error:
                self.broken(str(error))

    # -- queues ------------------------------------------------------------------------------------

    def kicked(self, index: int) -> None:
        """I/O thread: the driver notified queue `index`."""
        virtio = self.virtio
        if virtio is None:
            return
        with self.lock:
            if virtio.live and virtio.queues[index].ready:
                self._guarded(lambda: virtio.on_queue(index))

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except QueueError as error:
            self.broken(str(error))

    def run(self, work: Callable[[], None]) -> None:
        """Back ends' way in: `work` under the lock, if the device is live; a QueueError breaks the device."""
        with self.lock:
            if self.virtio is not None and self.virtio.live:
                self._guarded(work)

    def serve_later(self, index: int) -> None:
        self.defer(lambda: self.kicked(index))

    def resume(self) -> None:
        """The machine goes on after a restore or a stop: look at all queues, kicks may have been missed, and tell
        the driver again what it has not acknowledged, for a pulse may have been under way.
        """
        with self._interrupt_lock:
            if self._interrupt_status:
                self._irq.assert_line()
        for queue in self.virtio.queues if self.virtio else ():
            self.serve_later(queue.index)

    # -- interrupts --------------------------------------------------------------------------------

    def notify_used(self, queue: Queue) -> None:
        if queue.wants_interrupt():
            self._interrupt(USED_BUFFER)

    def notify_config(self) -> None:
        self._generation = (self._generation + 1) & 0xFFFFFFFF
        if self._status & DRIVER_OK:
            self._interrupt(CONFIG_CHANGE)

    def broken(self, reason: str) -> None:
        self.counters.count("driver_errors")
        assert self.virtio is not None
        self.virtio.live = False
        self.last_error = reason
        if not self._status & NEEDS_RESET:
            self._status |= NEEDS_RESET
            if self._status & DRIVER_OK:  # then a configuration change notification is due (2.1.2)
                self._interrupt(CONFIG_CHANGE)

    last_error = ""
    """What the driver did last that it must not."""

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
            virtio = self.virtio
            return VirtioMmioState(
                device_id=virtio.device_id if virtio else 0,
                status=self._status,
                device_features_select=self._device_features_select,
                driver_features_select=self._driver_features_select,
                driver_features=self._driver_features,
                queue_select=self._queue_select,
                interrupt_status=self._interrupt_status,
                config_generation=self._generation,
                queues=[queue.save() for queue in virtio.queues] if virtio else [],
                own=_plain(virtio.save()) if virtio else None,
            )

    def restore(self, state: Any) -> None:
        virtio = self.virtio
        own_id, queues = (virtio.device_id, virtio.queues) if virtio else (0, [])
        require(state.device_id == own_id, f"{self.name}: saved from a virtio device of another kind")
        require(len(state.queues) == len(queues), f"{self.name}: saved with another number of queues")
        require(
            0 <= state.status <= 0xFF and 0 <= state.interrupt_status <= 3,
            f"{self.name}: status out of range",
        )
        for name in ("device_features_select", "driver_features_select", "queue_select", "config_generation"):
            require(0 <= getattr(state, name) < 1 << 32, f"{self.name}: {name} out of range")
        require(0 <= state.driver_features < 1 << 64, f"{self.name}: driver_features out of range")
        if virtio is not None and state.status & FEATURES_OK:
            # Guests keep what was negotiated: a machine that offers less cannot take this state.
            require(
                not state.driver_features & ~(virtio.features | OFFERED),
                f"{self.name}: the saved driver uses features that this device does not offer",
            )
        own = _typed(virtio, state.own) if virtio else None
        for queue, saved in zip(queues, state.queues, strict=True):
            queue.check(saved, self._memory)
        with self.lock:
            self._restore(state, virtio, own)

    def _restore(self, state: VirtioMmioState, virtio: VirtioDevice | None, own: VirtioState | None) -> None:
        self._status, self._generation = state.status, state.config_generation
        self._device_features_select = state.device_features_select
        self._driver_features_select = state.driver_features_select
        self._driver_features, self._queue_select = state.driver_features, state.queue_select
        if virtio is not None:
            for queue, saved in zip(virtio.queues, state.queues, strict=True):
                queue.restore(saved, self._memory)
            self._start(virtio)
            virtio.live = bool(state.status & DRIVER_OK and not state.status & NEEDS_RESET)
            virtio.restore(own)
        with self._interrupt_lock:
            self._interrupt_status = state.interrupt_status
            if self._interrupt_status:
                self._irq.assert_line()
            else:
                self._irq.release_line()

    def reset(self) -> None:
        with self.lock:
            if self.virtio is not None:
                self.virtio.live = False
                self.virtio.negotiated = 0
                for queue in self.virtio.queues:
                    queue.reset()
                self.virtio.reset()
            with self._interrupt_lock:
                self._clear()
                self._irq.release_line()


def _plain(state: VirtioState) -> Any:
    """A device's state as maps and lists, as it stands after a trip through bytes."""
    return msgspec.to_builtins(state, builtin_types=(bytes,))


def _typed(virtio: VirtioDevice, plain: Any) -> VirtioState:
    """The reverse, for hostile input."""
    try:
        state = msgspec.convert(plain, virtio.State)
    except msgspec.ValidationError as error:
        raise StateError(f"{virtio.name}: {error}") from error
    virtio.check(state)
    return state
