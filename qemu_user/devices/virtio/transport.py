"""What every virtio transport has: the status protocol, feature negotiation, queue life and hostile drivers.

mmio.py and pci.py put their registers in front of one VirtioTransport each and say, as Wires, how the driver is
interrupted. Registers come from vCPU threads; queues are served on the I/O thread. A driver that breaks the rules
gets DEVICE_NEEDS_RESET (virtio 1.2, 2.1.2), a counter counts it, and its queues rest until it resets the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from protocol.channel.vdso import Vdso
from qemu_user.backends.polling import Watched
from qemu_user.devices.device import Counters, StateError, require
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.device import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_RING_RESET,
    F_VERSION_1,
    VirtioDevice,
    VirtioState,
)
from qemu_user.devices.virtio.drain import Drain
from qemu_user.devices.virtio.queue import Queue, QueueError, QueueState

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
"""Device status bits (2.1)."""
MAX_WARNINGS = 3
"""Sentences about one device: a hostile guest does not fill the terminal."""
OFFERED = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_RESET


class Wires(Protocol):
    """How a transport reaches the driver. Any thread."""

    def used(self, queue: Queue) -> None:
        """Used buffer notification of `queue`."""

    def config_changed(self) -> None:
        """Configuration change notification."""

    def quiet(self) -> None:
        """The device was reset: nothing is asserted any more."""

    def repeat(self) -> None:
        """The machine goes on after a stop or a restore: tell the driver again, a pulse may have been under way."""

    def prepare(self) -> None:
        """Set up what interrupts need that will come."""


class TransportState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both transports save; `own` is the device's state in its own format, as it was saved."""

    device_id: int
    status: int
    device_features_select: int
    driver_features_select: int
    driver_features: int
    queue_select: int
    config_generation: int
    queues: list[QueueState]
    own: Any


class VirtioTransport:
    """One device's common registers. `lock` guards registers, queues and the device. `required`: features without which
    no driver is taken.
    """

    def __init__(
        self,
        virtio: VirtioDevice,
        memory: GuestMemory,
        counters: Counters,
        lock: threading.RLock,
        wires: Wires,
        required: int = F_VERSION_1,
    ) -> None:
        self.virtio, self.memory, self.counters, self.lock = virtio, memory, counters, lock
        self._required = required
        self._wires = wires
        self.defer: Callable[[Callable[[], None]], None] = lambda call: call()
        """How work is put off to the I/O thread; machine/build.py sets it."""
        self.delay: Callable[[float, Callable[[], None]], object] = lambda seconds, call: call()
        """The same in so many seconds."""
        self.watch: Callable[[Watched, int, int], bool] = lambda queue, address, known: False
        """IoLoop.watch() of the thread that serves the queues; machine/build.py sets it."""
        self._watched = [
            Watched(
                partial(self.kicked, queue.index), partial(self._settle, queue), partial(self._rest, queue),
                partial(self._drain, queue),
            )
            for queue in virtio.queues
        ]  # fmt: skip
        self._drains: dict[int, Drain] = {}
        self.warn: Callable[[str], None] = lambda sentence: None
        """Tells the user of a driver that breaks the rules."""
        self.worked: Callable[[], None] = lambda: None
        """Called under the lock when queues have been served; machine/keeper.py sets it."""
        self._clear()
        virtio.transport = self

    def _clear(self) -> None:
        self.status = self.generation = 0
        self.device_features_select = self.driver_features_select = 0
        self.driver_features = self.queue_select = 0

    # -- registers (under the lock) ----------------------------------------------------------------

    @property
    def offered(self) -> int:
        """All feature bits that the driver may take."""
        return self.virtio.features | OFFERED

    def device_features(self) -> int:
        """The 32 offered feature bits that device_features_select selects."""
        return self.offered >> 32 * self.device_features_select & 0xFFFFFFFF if self.device_features_select < 2 else 0

    def accepted_features(self) -> int:
        """The 32 driver feature bits that driver_features_select selects."""
        return self.driver_features >> 32 * self.driver_features_select & 0xFFFFFFFF if self.driver_features_select < 2 else 0

    def accept_features(self, value: int) -> None:
        """The driver writes the 32 feature bits that driver_features_select selects."""
        if self.status & FEATURES_OK or self.driver_features_select > 1:
            self.counters.count("late_features")
            return
        shift = 32 * self.driver_features_select
        self.driver_features = self.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    def queue(self) -> Queue | None:
        """The queue that queue_select selects."""
        queues = self.virtio.queues
        return queues[self.queue_select] if self.queue_select < len(queues) else None

    def idle_queue(self) -> Queue | None:
        """The selected queue if the driver may still set it up (4.1.4.3.2, 4.2.2.2)."""
        queue = self.queue()
        if queue is None or queue.ready:
            self.counters.count("bad_queue_write")
            return None
        return queue

    def set_address(self, name: str, shift: int, value: int) -> None:
        """One half (`shift` 0 or 32) of a ring's address: `name` is descriptors, available or used."""
        queue = self.idle_queue()
        if queue is not None:
            setattr(queue, name, getattr(queue, name) & ~(0xFFFFFFFF << shift) | (value & 0xFFFFFFFF) << shift)

    def enable_queue(self) -> None:
        """The selected queue's rings are in place."""
        queue = self.queue()
        if queue is None:
            self.counters.count("bad_queue_write")
        elif not queue.ready:
            try:
                queue.enable(self.memory)
            except QueueError as error:
                self.broken(str(error))

    def reset_queue(self) -> None:
        """VIRTIO_F_RING_RESET (2.6.1): the selected queue as after a reset; nothing of it is used any more."""
        queue = self.queue()
        if queue is None or not self.driver_features & F_RING_RESET:
            self.counters.count("bad_queue_write")
        else:
            queue.reset()
            self.virtio.queue_reset(queue.index)

    def set_status(self, value: int) -> None:
        """The driver writes the device status; 0 resets."""
        if value == 0:
            self.reset()
            return
        value &= 0xFF
        if value & FEATURES_OK and not self.status & FEATURES_OK and not self._features_good():
            value &= ~FEATURES_OK  # the driver reads it back and gives up (3.1.1 step 6)
        started = value & DRIVER_OK and not self.status & DRIVER_OK
        # Bits are set one after the other and only a reset clears them (2.1.1).
        self.status |= value & ~NEEDS_RESET
        if started:
            if not self.status & FEATURES_OK:
                self.broken("DRIVER_OK without FEATURES_OK")
                return
            self._start()
            self._guarded(self.virtio.activate)

    def _features_good(self) -> bool:
        wanted = self.driver_features
        missing = ((self._required | self.virtio.required) & ~wanted) | (wanted & ~self.offered)
        good = not missing and self.virtio.features_good(wanted)
        if not good:
            self.counters.count("features_refused")
        return good

    def _start(self) -> None:
        self.virtio.negotiated = self.driver_features
        self.virtio.live = not self.status & NEEDS_RESET
        for queue in self.virtio.queues:
            queue.event_index = bool(self.driver_features & F_EVENT_IDX)
            queue.indirect = bool(self.driver_features & F_INDIRECT_DESC)

    def read_config(self, offset: int, size: int) -> int:
        """Device configuration space (2.5); what lies beyond it reads as zero."""
        return int.from_bytes(self.virtio.config()[offset : offset + size], "little")

    # -- queues ------------------------------------------------------------------------------------

    def kicked(self, index: int) -> None:
        """I/O thread: the driver notified queue `index`."""
        with self.lock:
            if self.virtio.live and self.virtio.queues[index].ready:
                try:
                    self.virtio.on_queue(index)
                except QueueError as error:
                    self.broken(str(error))
                self.worked()

    def notified(self, index: int) -> None:
        """vCPU thread: a notification that no ioeventfd took."""
        if index < len(self.virtio.queues):
            self.serve_later(index)
        else:
            self.counters.count("bad_notify")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except QueueError as error:
            self.broken(str(error))

    def run(self, work: Callable[[], None]) -> None:
        """Back ends' way in: `work` under the lock, if the device is live; a QueueError breaks the device."""
        with self.lock:
            if self.virtio.live:
                self._guarded(work)
                self.worked()

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """The same in so many seconds, on the I/O thread."""
        self.delay(seconds, partial(self.run, work))

    def serve_later(self, index: int) -> None:
        self.defer(lambda: self.kicked(index))

    def rest(self, queue: Queue) -> None:
        if not queue.ready:
            return
        if not self.watch(self._watched[queue.index], queue.index_address, queue.next_available):
            self._rest(queue)

    def _rest(self, queue: Queue) -> None:
        with self.lock:
            if self.virtio.live:
                if queue.allow_kicks():
                    self.serve_later(queue.index)
                self.notify_used(queue)

    def _settle(self, queue: Queue) -> None:
        with self.lock:
            if self.virtio.live:
                self.notify_used(queue)

    def _drain(self, queue: Queue, code: Vdso, pace: tuple[int, int, int, int], bell: int, known: int) -> int | None:
        with self.lock:
            if not self.virtio.live or not queue.drainable or not (room := self.virtio.takes(queue.index)):
                return None
            drain = self._drains.get(queue.index)
            if drain is None:
                drain = self._drains[queue.index] = Drain(queue, self.memory)
            outcome, data = drain.run(code, pace, bell, known, room)
            if data:
                self.virtio.took(queue.index, data)
            self._watched[queue.index].known = queue.next_available
            return outcome

    def prepare(self) -> None:
        """The machine has been given a state: what its interrupts need is set up now."""
        self._wires.prepare()

    def resume(self) -> None:
        """The machine goes on after a restore or a stop: look at all queues, kicks may have been missed, and tell the
        driver again what it may not have been told.
        """
        self._wires.repeat()
        with self.lock:
            self.virtio.resumed()
        for queue in self.virtio.queues:
            if not queue.rests:
                self.serve_later(queue.index)

    # -- interrupts --------------------------------------------------------------------------------

    def notify_used(self, queue: Queue) -> None:
        if queue.wants_interrupt():
            self._wires.used(queue)

    def notify_config(self) -> None:
        self.generation = (self.generation + 1) & 0xFFFFFFFF
        if self.status & DRIVER_OK:
            self._wires.config_changed()

    def broken(self, reason: str) -> None:
        self.counters.count("driver_errors")
        self.virtio.live = False
        if self.counters["driver_errors"] <= MAX_WARNINGS:
            what = f"the guest's driver broke a rule of virtio ({reason})"
            self.warn(f"device {self.virtio.name}: {what}; the device rests until the guest resets it")
        if not self.status & NEEDS_RESET:
            self.status |= NEEDS_RESET
            if self.status & DRIVER_OK:  # then a configuration change notification is due (2.1.2)
                self._wires.config_changed()

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> TransportState:
        return TransportState(
            device_id=self.virtio.device_id,
            status=self.status,
            device_features_select=self.device_features_select,
            driver_features_select=self.driver_features_select,
            driver_features=self.driver_features,
            queue_select=self.queue_select,
            config_generation=self.generation,
            queues=[queue.save() for queue in self.virtio.queues],
            own=msgspec.to_builtins(self.virtio.save(), builtin_types=(bytes,)),
        )

    def check(self, state: TransportState) -> VirtioState:
        """StateError unless restore() can take `state`; returns the device's own, typed."""
        virtio, name = self.virtio, self.virtio.name
        require(state.device_id == virtio.device_id, f"{name}: saved from a virtio device of another kind")
        require(len(state.queues) == len(virtio.queues), f"{name}: saved with another number of queues")
        require(0 <= state.status <= 0xFF, f"{name}: status out of range")
        for field in ("device_features_select", "driver_features_select", "queue_select", "config_generation"):
            require(0 <= getattr(state, field) < 1 << 32, f"{name}: {field} out of range")
        require(0 <= state.driver_features < 1 << 64, f"{name}: driver_features out of range")
        # Guests keep what was negotiated: a machine that offers less cannot take this state.
        require(
            not state.status & FEATURES_OK or not state.driver_features & ~self.offered,
            f"{name}: the saved driver uses features that this device does not offer",
        )
        own = _typed(virtio, state.own)
        for queue, saved in zip(virtio.queues, state.queues, strict=True):
            queue.check(saved, self.memory)
        return own

    def restore(self, state: TransportState, own: VirtioState) -> None:
        """Take over a checked state (under the lock)."""
        self.status, self.generation = state.status, state.config_generation
        self.device_features_select = state.device_features_select
        self.driver_features_select = state.driver_features_select
        self.driver_features, self.queue_select = state.driver_features, state.queue_select
        for queue, saved in zip(self.virtio.queues, state.queues, strict=True):
            queue.restore(saved, self.memory)
        self._start()
        self.virtio.live = bool(state.status & DRIVER_OK and not state.status & NEEDS_RESET)
        self.virtio.restore(own)

    def reset(self) -> None:
        """By the driver's status 0 or with the machine."""
        with self.lock:
            if self.virtio.live:
                self._guarded(self.virtio.last_call)
            self.virtio.live = False
            self.virtio.negotiated = 0
            for queue in self.virtio.queues:
                queue.reset()
            self.virtio.reset()
            self._clear()
            self._wires.quiet()


def _typed(virtio: VirtioDevice, plain: Any) -> VirtioState:
    """A device's own state out of hostile maps and lists."""
    try:
        state = msgspec.convert(plain, virtio.State)
    except msgspec.ValidationError as error:
        raise StateError(f"{virtio.name}: {error}") from error
    virtio.check(state)
    return state
