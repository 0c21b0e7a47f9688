"""`-netdev stream`: Ethernet frames over a Unix stream socket, as QEMU and passt frame them; server or
client.

Two VMs can be joined by it, ours or QEMU's. Base of passt.py. A peer that goes takes the link down; a server
then waits for the next one, a client tries again when `reconnect` says so.
"""

from __future__ import annotations

import contextlib
import os
import socket

from protocol.codec.ethernet_stream import FrameReader, StreamError, header
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import NetBackend

_FRAMES_PER_TURN = 64
_SOCKET_BUFFER = 1 << 20


class SocketNet(NetBackend):
    """Frames over one connected stream socket; subclasses say where it comes from."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loop: IoLoop | None = None
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._unsent = b""
        self._refused = False
        self._reading = False

    def _use(self, sock: socket.socket) -> None:
        """Speak over `sock` from now on."""
        assert self._loop is not None
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        self._socket, self._reader, self._unsent = sock, FrameReader(), b""
        self.is_up = True
        self._listen()
        self.frontend.link(True)

    def _lost(self) -> None:
        """The peer is gone. Subclasses decide what then."""
        self._drop()
        self.frontend.link(False)
        if self._refused:
            self._refused = False
            self.frontend.sent()

    def _drop(self) -> None:
        sock, self._socket = self._socket, None
        self.is_up = self._reading = False
        self._unsent = b""
        if sock is not None:
            if self._loop is not None:
                self._loop.remove(sock.fileno())
            sock.close()

    # -- in ----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        if not self._reading and self._socket is not None and self._loop is not None:
            self._reading = True
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def _rest(self) -> None:
        if self._reading and self._socket is not None and self._loop is not None:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _readable(self) -> None:
        if self._socket is None:
            return
        room = self._reader.room()
        try:
            count = self._socket.recv_into(room) if room else -1
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count == 0:
            self._lost()
            return
        if count > 0:
            self._reader.received(count)
        self._deliver()

    def _deliver(self) -> None:
        try:
            for frame in self._reader.frames():
                if not self.frontend.receive(frame):
                    self._rest()
                    return
        except StreamError:
            self._lost()
            return
        self._listen()

    def resume(self) -> None:
        if self._socket is not None and not self._reading:
            self._deliver()

    # -- out ---------------------------------------------------------------------------------------

    def send(self, frame: list[memoryview]) -> bool:
        if self._socket is None:
            return True  # no cable: the frame is lost, as it is on the wire
        if self._unsent:
            self._refused = True
            return False
        length = sum(map(len, frame))
        pieces: list[bytes | memoryview] = [header(length), *frame]
        try:
            sent = self._socket.sendmsg(pieces)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost()
            return True
        if sent < 4 + length:
            if sent == 0:
                self._refused = True
                self._await_room()
                return False
            self._unsent = b"".join(pieces)[sent:]
            self._await_room()
        return True

    def _await_room(self) -> None:
        if self._socket is not None and self._loop is not None:
            self._loop.add_writer(self._socket.fileno(), self._writable)

    def _writable(self) -> None:
        if self._socket is None or self._loop is None:
            return
        if self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                return
            except OSError:
                self._lost()
                return
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())
            if self._refused:
                self._refused = False
                self.frontend.sent()

    def close(self) -> None:
        self._drop()


class StreamNet(SocketNet):
    """A Unix socket at `path`: `server` binds and waits there, else it connects (again every `reconnect` s
    if > 0). `virtio_header`: both ends put virtio-net headers before their frames.
    """

    def __init__(
        self, name: str, path: str, server: bool, reconnect: float = 0, virtio_header: bool = False
    ) -> None:
        super().__init__(name)
        self.virtio_header = virtio_header
        self._path, self._server, self._reconnect = path, server, reconnect
        self._listener: socket.socket | None = None

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        if self._server:
            self._bind()
        elif not self._connect():
            if not self._reconnect:
                raise BackendError(
                    f"netdev {self.name}: nobody listens on {self._path} (start the server side first)"
                )
            self._later()

    def _bind(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._clear_stale()
            listener.bind(self._path)
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise BackendError(
                f"netdev {self.name}: cannot listen on {self._path}: {error.strerror}"
            ) from error
        listener.setblocking(False)
        self._listener = listener
        assert self._loop is not None
        self._loop.add_reader(listener.fileno(), self._accept)

    def _clear_stale(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._path)
            except ConnectionRefusedError:
                os.unlink(self._path)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if self._socket is not None:
            sock.close()  # one cable, one peer
        else:
            self._use(sock)

    def _connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            return False
        self._use(sock)
        return True

    def _later(self) -> None:
        def again() -> None:
            if self._reconnect and self._socket is None and not self._connect():
                self._later()

        assert self._loop is not None
        self._loop.call_later(self._reconnect, again)

    def _lost(self) -> None:
        super()._lost()
        if self._reconnect and not self._server:
            self._later()

    def close(self) -> None:
        self._reconnect = 0
        super().close()
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                os.unlink(self._path)
