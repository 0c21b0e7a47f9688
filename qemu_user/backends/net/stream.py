"""`-netdev stream` and `socket`: Ethernet frames over a Unix or TCP stream socket, as QEMU and passt frame them; server or
client.

Two VMs can be joined by it, ours or QEMU's. Base of passt.py. A peer that goes takes the link down; a server
then waits for the next one, a client tries again when `reconnect` says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

from protocol.codec.ethernet_stream import FrameReader, StreamError, header
from qemu_user.backends.errors import BackendBusy, BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import NetBackend
from qemu_user.backends.unix_address import listen_unix

_SOCKET_BUFFER = 1 << 20
_CONNECT_SECONDS = 10.0


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
    """A Unix socket at `path`, or a TCP one at `inet` (host, port): `server` binds and waits there, else it connects (again
    every `reconnect` s if > 0). `virtio_header`: both ends put virtio-net headers before their frames.
    """

    def __init__(
        self,
        name: str,
        path: str,
        server: bool,
        reconnect: float = 0,
        virtio_header: bool = False,
        inet: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(name)
        self.virtio_header = virtio_header
        self._path, self._server, self._reconnect, self._inet = path, server, reconnect, inet
        self._listener: socket.socket | None = None
        self._calling: socket.socket | None = None

    @property
    def where(self) -> str:
        """For people."""
        return f"{self._inet[0]}:{self._inet[1]}" if self._inet is not None else self._path

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        if self._server:
            self._bind()
            return
        try:
            sock = self._open()
        except OSError as error:
            if not self._reconnect:
                why = error.strerror or error
                raise BackendError(
                    f"netdev {self.name}: nobody listens on {self.where} (start the server side first): {why}"
                ) from error
            self._later()
        else:
            self._use(sock)

    def _bind(self) -> None:
        try:
            if self._inet is None:
                listener = listen_unix(self._path, f"netdev {self.name}")
            else:
                host, port = self._inet
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                listener = socket.create_server((host, port), family=family, backlog=1)
        except OSError as error:
            kind = BackendBusy if error.errno == errno.EADDRINUSE else BackendError
            raise kind(f"netdev {self.name}: cannot listen on {self.where}: {error.strerror or error}") from error
        listener.setblocking(False)
        self._listener = listener
        assert self._loop is not None
        self._loop.add_reader(listener.fileno(), self._accept)

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

    def _use(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        super()._use(sock)

    def _open(self) -> socket.socket:
        """A connected socket, at the start, where waiting is allowed. OSError."""
        if self._inet is not None:
            return socket.create_connection(self._inet, timeout=_CONNECT_SECONDS)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            raise
        return sock

    def _later(self) -> None:
        if self._loop is not None and self._reconnect and not self._server:
            self._loop.call_later(self._reconnect, self._call)

    def _call(self) -> None:
        """Connect without waiting: the loop tells when it is done."""
        loop = self._loop
        if loop is None or not self._reconnect or self._socket is not None:
            return
        address: str | tuple[str, int] = self._inet if self._inet is not None else self._path
        family = socket.AF_UNIX if self._inet is None else socket.AF_INET6 if ":" in self._inet[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            self._calling = sock
            loop.add_writer(sock.fileno(), self._called)
        except OSError:
            sock.close()
            self._later()
        else:
            self._use(sock)

    def _called(self) -> None:
        sock, self._calling = self._calling, None
        assert sock is not None
        assert self._loop is not None
        self._loop.remove(sock.fileno())
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            sock.close()
            self._later()
        else:
            self._use(sock)

    def _lost(self) -> None:
        super()._lost()
        self._later()

    def close(self) -> None:
        self._reconnect = 0
        super().close()
        calling, self._calling = self._calling, None
        if calling is not None:
            if self._loop is not None:
                self._loop.remove(calling.fileno())
            calling.close()
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove(self._listener.fileno())
            self._listener.close()
            self._listener = None
            if self._inet is None:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
