"""How ports come to be over sockets: VMs of ours that say who they are, QEMUs that just connect, QEMUs that are called."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from protocol.codec import switch_hello
from protocol.codec.switch_hello import Hello, HelloError, Welcome
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.unix_address import listen_unix

_GREETING_SECONDS = 5.0
_GREETERS = 64
"""Connections that have not said yet who they are."""
RECONNECT_SECONDS = 1.0


class Listener:
    """A Unix socket at `path`; `accepted` gets each connection. BackendError."""

    def __init__(self, path: str, loop: IoLoop, accepted: Callable[[socket.socket], None]) -> None:
        self._path, self._loop, self._accepted = path, loop, accepted
        self._listener = listen_unix(path, "switch")
        self._listener.setblocking(False)
        loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._accepted(sock)

    def close(self) -> None:
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


class Greeter:
    """Connections of VMs of ours: reads their Hello. `greeted` makes the port, and says what to answer."""

    def __init__(self, loop: IoLoop, greeted: Callable[[socket.socket, Hello], Welcome]) -> None:
        self._loop, self._greeted = loop, greeted
        self._waiting: dict[int, Callable[[], None]] = {}

    def accept(self, sock: socket.socket) -> None:
        """A connection came."""
        if len(self._waiting) >= _GREETERS:
            sock.close()
            return
        sock.setblocking(False)
        fd = sock.fileno()
        data = bytearray()

        def leave() -> None:
            self._waiting.pop(fd)()
            self._loop.remove(fd)
            sock.close()

        def readable() -> None:
            try:
                part = sock.recv(switch_hello.MAX_HELLO)
                data.extend(part)
                hello = switch_hello.unpack(bytes(data), Hello)
            except (BlockingIOError, InterruptedError):
                return
            except (OSError, HelloError):
                leave()
                return
            if hello is not None and len(data) == switch_hello.size(bytes(data)):
                self._waiting.pop(fd)()
                self._loop.remove(fd)
                self._answer(sock, hello)
            elif not part or hello is not None:  # it hung up, or did not wait for our answer
                leave()

        self._waiting[fd] = self._loop.call_later(_GREETING_SECONDS, leave)
        self._loop.add_reader(fd, readable)

    def _answer(self, sock: socket.socket, hello: Hello) -> None:
        welcome = self._greeted(sock, hello)
        if welcome.error:
            with contextlib.suppress(OSError):
                sock.send(switch_hello.pack(welcome))
            sock.close()


class Caller:
    """Connects to the Unix socket `path`, again and again while nobody is there."""

    def __init__(self, path: str, loop: IoLoop, connected: Callable[[socket.socket], None]) -> None:
        self._path, self._loop, self._connected = path, loop, connected
        self._closed = False

    def call(self) -> None:
        """Try now, then every RECONNECT_SECONDS until it works."""
        if self._closed:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            self._loop.call_later(RECONNECT_SECONDS, self.call)
        else:
            self._connected(sock)

    def close(self) -> None:
        self._closed = True
