"""The contract of network back ends: Ethernet frames out, frames in, and who waits for whom.

devices/virtio/net.py calls send() and resume(); the back end calls receive() on the I/O thread. Nobody drops
a frame because the other side is slow: send() is refused and sent() follows, receive() is refused and
resume() follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from qemu_user.backends.io_loop import IoLoop

MAX_FRAME = 65536 + 64
"""Bytes of the longest frame that crosses a back end, either way."""


class NetFrontend(Protocol):
    """What a back end wants of the network device."""

    def receive(self, frame: memoryview) -> bool:
        """Deliver one frame; False: no room, keep it until resume(). The view is only good during the
        call.
        """

    def sent(self) -> None:
        """After a refused send(): there is room again."""

    def link(self, up: bool) -> None:
        """The other end came or went."""


class NoFrontend:
    """Until a device is connected: frames fall on the floor."""

    def receive(self, frame: memoryview) -> bool:
        return True

    def sent(self) -> None:
        pass

    def link(self, up: bool) -> None:
        pass


class NetBackend:
    """Base of the back ends; as it is, a cable that is not plugged in."""

    mtu = 1500
    is_up = False
    virtio_header = False
    """Whether every frame, either way, is preceded by a virtio-net header (12 bytes, virtio 1.2, 5.1.6): then checksums
    may be left open and TCP segments be up to 64 KiB.
    """
    arriving = False
    """Whether the VM comes from elsewhere: its source may still have what this one needs. Set before start()."""
    trusted = False
    """Whether frames cannot be damaged on the way, in either direction, and the far end knows: checksums of TCP and UDP need
    not be verified, so they need not be there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.frontend: NetFrontend = NoFrontend()
        self.warn: Callable[[str], None] = lambda sentence: None
        """Tells the user of trouble that is not the guest's; set by the machine."""

    def connect(self, frontend: NetFrontend) -> None:
        """Join the device, before start()."""
        self.frontend = frontend

    def start(self, loop: IoLoop) -> None:
        """Open what there is to open. BackendError with a sentence for the user."""

    def send(self, frame: list[memoryview]) -> bool:
        """One frame in pieces; False: no room now, sent() will follow. I/O thread."""
        return True

    def set_offloads(self, features: int) -> None:
        """What may be in the headers of frames that come: the GUEST_* feature bits of virtio-net."""

    def resume(self) -> None:
        """receive() may be tried again. I/O thread."""

    def close(self) -> None:
        """Give everything back, children included. Idempotent."""
