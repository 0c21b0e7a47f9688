"""Who is plugged in over a Unix or TCP stream socket: a VM of ours, a QEMU (`-netdev stream`), another tool."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from protocol.codec.ethernet_stream import StreamError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.switch.port import Piece, Port
from qemu_user.switch.settings import PortSettings

_BUFFER = 512 << 10
_SOCKET_BUFFER = 1 << 20
_PIECES = 512
"""To one system call; IOV_MAX is 1024."""


class StreamPort(Port):
    """A connected socket, which it owns. `header`: both sides put virtio-net headers before frames."""

    kind = "stream"

    def __init__(self, name: str, settings: PortSettings, loop: IoLoop, sock: socket.socket, header: bool, peer: str) -> None:
        super().__init__(name, settings, loop)
        self.header, self._peer = header, peer
        self._socket: socket.socket | None = sock
        self._fd = sock.fileno()
        self._view = memoryview(bytearray(_BUFFER))
        self._end = 0
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def peer(self) -> str:
        return self._peer

    def start(self) -> None:
        self.is_up = True
        self._listen()
        self.changed(self)

    # -- in ----------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            count = self._socket.recv_into(self._view[self._end :])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            self._hang_up()
            return
        end = self._end + count
        try:
            done = self.forward(self, self._view, 0, end)
        except StreamError:
            self.rx_broken += 1
            self._hang_up()
            return
        self._end = end - done
        if done and self._end:
            self._view[: self._end] = self._view[done:end]
        self.came(count)

    def _hang_up(self) -> None:
        self.close()
        self.gone(self)

    # -- out ---------------------------------------------------------------------------------------

    def _emit(self, pieces: Sequence[Piece]) -> bytes:
        left = list(pieces)
        while left:
            if self._socket is None:
                return b""
            try:
                sent = self._socket.sendmsg(left[:_PIECES], [], socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return b"".join(left)
            except OSError:
                self.loop.call_soon(self._hang_up)
                return b""
            done = 0
            while done < len(left) and sent >= len(left[done]):
                sent -= len(left[done])
                done += 1
            del left[:done]
            if sent:
                left[0] = memoryview(left[0])[sent:]
        return b""

    def _await_room(self) -> None:
        if self._socket is not None:
            self.loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        if self._socket is not None:
            self.loop.remove_writer(self._socket.fileno())
            self.drain()

    def close(self) -> None:
        super().close()
        sock, self._socket, self._fd = self._socket, None, -1
        if sock is not None:
            self.loop.remove(sock.fileno())
            sock.close()
