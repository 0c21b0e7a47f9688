"""The contract of a virtio device, apart from how it is reached (transport.py, with mmio.py or pci.py before it).

A device names its id, features and queues, keeps its own State, and answers on_queue() when the driver has
kicked. The transport gives it a Transport: interrupts for used buffers and configuration changes, and a way
out when the driver breaks the rules. Both work under the transport's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import msgspec

from qemu_user.devices.device import Counters
from qemu_user.devices.virtio.queue import Queue

F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1, F_RING_RESET = 1 << 28, 1 << 29, 1 << 32, 1 << 40
"""Feature bits that the transport offers for every device (virtio 1.2, section 6)."""


class Transport(Protocol):
    """What a device asks of its transport."""

    lock: threading.RLock
    defer: Callable[[Callable[[], None]], None]
    """Puts a call off to the I/O thread."""

    def run(self, work: Callable[[], None]) -> None:
        """Work on the queues for the back end: under the lock, if the device is live, QueueError being the
        driver's.
        """

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """The same in so many seconds, on the I/O thread."""

    def notify_used(self, queue: Queue) -> None:
        """Interrupt the driver if it wants to know of the buffers pushed on `queue`."""

    def rest(self, queue: Queue) -> None:
        """`queue` is empty. Have the driver call when there is more and tell it of what was pushed; or look for a while whether
        there is more, and do that then.
        """

    def notify_config(self) -> None:
        """Tell the driver that the configuration changed."""

    def broken(self, reason: str) -> None:
        """The driver broke the rules: DEVICE_NEEDS_RESET."""

    def serve_later(self, index: int) -> None:
        """Call on_queue(index) again soon, on the I/O thread."""


class VirtioState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="virtio", kw_only=True):
    """Base of a virtio device's own state (the transport keeps status, features and queues)."""

    version: int


class VirtioDevice:
    """One virtio device. `name` is what the user calls it."""

    device_id: ClassVar[int]
    pci_class: ClassVar[int]
    """PCI class code (base class, subclass, interface), as QEMU's virtio devices have it."""
    own_thread: ClassVar[bool] = False
    """Whether its queues are served by an I/O thread of their own."""
    required: ClassVar[int] = 0
    """Features without which no driver is taken, whatever the transport."""
    State: ClassVar[type[VirtioState]]

    def __init__(self, name: str, features: int, queue_sizes: list[int]) -> None:
        self.name = name
        self.features = features
        """What is offered, without the transport's own bits."""
        self.counters = Counters()
        self.queues = [Queue(index, size) for index, size in enumerate(queue_sizes)]
        self.negotiated = 0
        """What the driver took, once the device is live."""
        self.live = False
        """Between DRIVER_OK and the next reset or rule broken."""
        self.transport: Transport

    def config(self) -> bytes:
        """The configuration space as it reads now."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes to the configuration space."""
        self.counters.count("bad_access")

    def features_good(self, wanted: int) -> bool:
        """Whether the offered features `wanted` go together (a feature may require another one)."""
        return True

    def activate(self) -> None:
        """DRIVER_OK: the queues may be used from now on."""

    def on_queue(self, index: int) -> None:
        """The driver kicked queue `index`: work on it. QueueError (from pop) means that the driver broke
        the rules.
        """
        raise NotImplementedError

    def resumed(self) -> None:
        """The machine goes on after a stop or a restore."""

    def last_call(self) -> None:
        """The driver is about to reset the live device: what it has handed over and still counts on is served now, kick or
        not. Linux resets its devices at every shutdown and reboot, without waiting for their queues.
        """

    def changes_state(self, index: int) -> bool:
        """Whether serving queue `index` changes what save() gives, beyond the queue's own indices."""
        return False

    def takes(self, index: int) -> int:
        """Bytes that the device would take out of queue `index` now whatever they are, from requests that need no answer
        (drain.py); 0: it wants to see them."""
        return 0

    def took(self, index: int, data: bytes) -> None:
        """They came, and are given back."""

    def queue_reset(self, index: int) -> None:
        """The driver reset queue `index` alone: forget what is held of it."""

    def save(self) -> Any:
        """This device's own state."""
        raise NotImplementedError

    def check(self, state: Any) -> None:
        """StateError unless restore() can take `state`."""

    def restore(self, state: Any) -> None:
        """Become what the checked `state` says."""

    def reset(self) -> None:
        """The driver reset the device (or the machine was). The queues are reset by the transport."""
