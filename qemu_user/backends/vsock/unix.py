"""vsock's host side as Unix sockets, the way of Firecracker.

Host to guest: connect to PATH, send "CONNECT port\\n", read "OK host-port\\n", then talk. Guest to host: a connection to
CID 2, port N reaches who listens on PATH_N. Called by devices/virtio/vsock.py; everything on the I/O thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from functools import partial
from typing import Protocol

from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.unix_address import listen_unix

LONGEST_REQUEST = 32
"""Bytes of a CONNECT line."""
MAX_WAITING = 64
"""Clients that have not said yet where they want to go."""


class VsockFrontend(Protocol):
    """What the host side wants of the device."""

    def incoming(self, sock: socket.socket, port: int) -> None:
        """Somebody wants to talk to the guest's `port`. The device owns `sock` from now on."""

    def readable(self, sock: socket.socket) -> None:
        """watch()ed: there is something to read, or its end."""

    def writable(self, sock: socket.socket) -> None:
        """await_room()ed: it takes bytes again."""


class UnixVsock:
    """Sockets at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.frontend: VsockFrontend
        self._loop: IoLoop | None = None
        self._listener: socket.socket | None = None
        self._waiting: dict[socket.socket, bytes] = {}

    def start(self, loop: IoLoop) -> None:
        """Begin to listen. BackendError."""
        self._loop = loop
        self._listener = listen_unix(self._path, "vsock")
        self._listener.setblocking(False)
        loop.add_reader(self._listener.fileno(), self._accept)

    def connect(self, port: int) -> socket.socket:
        """The host's `port`. OSError: nobody listens."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(f"{self._path}_{port}")
        except OSError:
            sock.close()
            raise
        return sock

    def _accept(self) -> None:
        assert self._listener is not None
        assert self._loop is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._waiting) >= MAX_WAITING:
            sock.close()
            return
        sock.setblocking(False)
        self._waiting[sock] = b""
        self._loop.add_reader(sock.fileno(), partial(self._greeted, sock))

    def _greeted(self, sock: socket.socket) -> None:
        """Byte by byte up to the newline: what follows is the guest's."""
        assert self._loop is not None
        line = self._waiting[sock]
        try:
            while not line.endswith(b"\n") and len(line) < LONGEST_REQUEST:
                byte = sock.recv(1)
                if not byte:
                    break
                line += byte
        except BlockingIOError:
            self._waiting[sock] = line
            return
        except OSError:
            pass
        del self._waiting[sock]
        self._loop.remove(sock.fileno())
        match = re.fullmatch(rb"CONNECT (\d{1,10})\r?\n", line)
        if match is not None and int(match[1]) < 1 << 32:
            self.frontend.incoming(sock, int(match[1]))
        else:
            sock.close()

    # -- connected sockets -------------------------------------------------------------------------

    def watch(self, sock: socket.socket, on: bool) -> None:
        """Call frontend.readable() while there is something to read, or don't."""
        if self._loop is not None and sock.fileno() >= 0:
            if on:
                self._loop.add_reader(sock.fileno(), partial(self.frontend.readable, sock))
            else:
                self._loop.remove_reader(sock.fileno())

    def await_room(self, sock: socket.socket, on: bool) -> None:
        """Call frontend.writable() when there is room, or don't any more."""
        if self._loop is not None and sock.fileno() >= 0:
            if on:
                self._loop.add_writer(sock.fileno(), partial(self.frontend.writable, sock))
            else:
                self._loop.remove_writer(sock.fileno())

    def drop(self, sock: socket.socket) -> None:
        """Close a connected socket."""
        if self._loop is not None and sock.fileno() >= 0:
            self._loop.remove(sock.fileno())
        sock.close()

    def close(self) -> None:
        """Idempotent."""
        listener, self._listener = self._listener, None
        for sock in list(self._waiting):
            self.drop(sock)
        self._waiting.clear()
        if listener is not None:
            self.drop(listener)
            with contextlib.suppress(OSError):
                os.unlink(self._path)
