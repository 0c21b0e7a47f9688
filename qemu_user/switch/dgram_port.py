"""A QEMU over Unix datagrams (`-netdev dgram,local.type=unix,..,remote.type=unix,..`): a frame is a datagram."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

from protocol.codec.ethernet_stream import MAX_FRAME
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.dgram import prepare
from qemu_user.backends.unix_address import bind_unix
from qemu_user.switch.port import LENGTH, Piece, Port, split
from qemu_user.switch.settings import PortSettings

_BUFFER = 512 << 10
_RETRY_SECONDS = 0.002


class DgramPort(Port):
    """Bound to `local`; frames go to `remote`."""

    kind = "dgram"

    def __init__(self, name: str, settings: PortSettings, loop: IoLoop, local: str, remote: str) -> None:
        super().__init__(name, settings, loop)
        self._local, self._remote = local, remote
        self._socket: socket.socket | None = None
        self._view = memoryview(bytearray(_BUFFER))

    @property
    def peer(self) -> str:
        return self._remote

    def start(self) -> None:
        self._socket = bind_unix(self._local, f"port {self.name}")
        prepare(self._socket)
        self._fd = self._socket.fileno()
        self.is_up = True
        self._listen()
        self.changed(self)

    def _readable(self) -> None:
        at = 0
        while self._socket is not None and _BUFFER - at >= 4 + MAX_FRAME:
            try:
                count = self._socket.recv_into(self._view[at + 4 : at + 4 + MAX_FRAME])
            except OSError:
                break
            if count:
                LENGTH.pack_into(self._view, at, count)
                at += 4 + count
        if at:
            self.forward(self, self._view, 0, at)
            self.came(at)

    def _emit(self, pieces: Sequence[Piece]) -> bytes:
        frames = split(pieces)
        for frame in frames:
            try:
                assert self._socket is not None
                self._socket.sendmsg(frame, [], socket.MSG_NOSIGNAL, self._remote)
            except BlockingIOError:
                left = [frame, *frames]
                return b"".join(LENGTH.pack(sum(map(len, each))) + b"".join(each) for each in left)
            except OSError:  # nobody there, or a frame longer than it takes: lost, as on the wire
                self.tx_dropped += 1
                self.tx_dropped_bytes += sum(map(len, frame))
        return b""

    def _await_room(self) -> None:
        # A datagram socket that is not connected polls writable though the other's queue is full.
        self.loop.call_later(_RETRY_SECONDS, self.drain)

    def close(self) -> None:
        super().close()
        sock, self._socket, self._fd = self._socket, None, -1
        if sock is not None:
            self.loop.remove(sock.fileno())
            sock.close()
            with contextlib.suppress(OSError):
                os.unlink(self._local)
