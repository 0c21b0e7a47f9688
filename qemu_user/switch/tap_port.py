"""A TAP interface of the host as a port: the way to the host itself, or to a bridge with the world behind it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.tap import HEADER_SIZE, open_tap, set_offloads
from qemu_user.switch.forwarding import LONGEST
from qemu_user.switch.port import LENGTH, Piece, Port, split
from qemu_user.switch.settings import PortSettings

_BUFFER = 512 << 10
_OFFLOADS = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9
"""virtio-net's GUEST_CSUM, TSO4, TSO6, ECN: who cannot take such frames gets them completed and cut (vlan.py)."""


class TapPort(Port):
    """The interface `ifname`, made if it is not there (and we may). Frames that it does not take are dropped."""

    kind = "tap"
    header = True

    def __init__(self, name: str, settings: PortSettings, loop: IoLoop, ifname: str) -> None:
        super().__init__(name, settings, loop)
        self._ifname = ifname
        self._view = memoryview(bytearray(_BUFFER))

    @property
    def peer(self) -> str:
        return self._ifname

    def start(self) -> None:
        self._fd = open_tap(self._ifname, f"port {self.name}")
        set_offloads(self._fd, _OFFLOADS)
        self.is_up = True
        self._listen()
        self.changed(self)

    def _readable(self) -> None:
        at = 0
        while _BUFFER - at >= 4 + LONGEST:
            try:
                count = os.readv(self._fd, [self._view[at + 4 : at + 4 + LONGEST]])
            except BlockingIOError:
                break
            except OSError as error:  # an interface that is down tells by epoll when that changes; one deleted never does
                if error.errno == errno.EBADFD:
                    self.close()
                    self.gone(self)
                    return
                break
            if count > HEADER_SIZE:
                LENGTH.pack_into(self._view, at, count)
                at += 4 + count
        if at:
            self.forward(self, self._view, 0, at)
            self.came(at)

    def _emit(self, pieces: Sequence[Piece]) -> bytes:
        for frame in split(pieces):
            try:
                os.writev(self._fd, frame)
            except OSError:  # its queue is full, it is down, or the frame is none
                self.tx_dropped += 1
                self.tx_dropped_bytes += sum(map(len, frame))
        return b""

    def close(self) -> None:
        super().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self.loop.remove(fd)
            os.close(fd)
