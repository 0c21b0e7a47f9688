"""One connection to an NBD server: any number of threads have requests on it, a thread of its own takes the replies."""

from __future__ import annotations

import errno
import socket
import threading
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from qemu_user.backends.block.nbd import wire
from qemu_user.backends.block.nbd.tls import TlsSocket, tls_context
from qemu_user.backends.block.nbd.wire import Export, ProtocolError, Request
from qemu_user.backends.errors import BackendError

PORT = 10809
_SECONDS = 10
"""To connect and negotiate."""


class Lost(Exception):
    """The connection has ended before the reply; whether the request was done is not known."""


class Address:
    """Where an export is: nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds:// and nbds+unix:// with TLS."""

    def __init__(self, uri: str) -> None:
        """BackendError."""
        self.uri = uri
        try:
            parts = urlsplit(uri)
            self.port = parts.port or PORT
        except ValueError as error:
            raise BackendError(f"disk {uri}: {error}") from error
        kind = parts.scheme.replace("nbds", "nbd", 1)
        if kind not in ("nbd", "nbd+tcp", "nbd+unix"):
            raise BackendError(f"disk {uri}: expected nbd://, nbd+unix://, or with TLS nbds:// or nbds+unix://")
        self.host = parts.hostname or ""
        self.export = unquote(parts.path.removeprefix("/"))
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.socket = query.get("socket", "")
        self.secure: wire.Secure | None = None
        if kind != parts.scheme:
            self.secure = partial(TlsSocket, tls_context(uri, query), query.get("tls-hostname", self.host))
        if (kind == "nbd+unix") != bool(self.socket) or (not self.socket and not self.host):
            raise BackendError(f"disk {uri}: expected nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH")

    def connect(self) -> socket.socket:
        """A connected socket. OSError."""
        if not self.socket:
            sock = socket.create_connection((self.host, self.port), _SECONDS)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(_SECONDS)
            sock.connect(self.socket)
        except BaseException:
            sock.close()
            raise
        return sock


class Connection:
    """Negotiated and ready."""

    def __init__(self, address: Address) -> None:
        """OSError, ProtocolError."""
        self._sock: Any = address.connect()
        try:
            self.export: Export
            self._sock, self.export = wire.negotiate(self._sock, address.export, address.secure)
            self._sock.settimeout(None)
        except BaseException:
            self._sock.close()
            raise
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: dict[int, Request] = {}
        self._handle = 0
        self.why = ""
        """Why it has ended; "" while it has not."""
        self._thread = threading.Thread(target=self._receive, name="nbd", daemon=True)
        self._thread.start()

    def request(
        self, kind: int, offset: int, length: int, flags: int = 0,
        data: list[memoryview] | None = None, into: list[memoryview] | None = None,
        extents: list[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """Do it and wait. `extents` is filled by BLOCK_STATUS. OSError: the server says no; Lost."""
        request = Request(offset, length, into)
        request.extents = extents
        with self._changed:
            if self.why:
                raise Lost(self.why)
            self._handle += 1
            handle = self._handle
            self._waiting[handle] = request
        head = memoryview(wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, kind, handle, offset, length))
        try:
            with self._sending:
                wire.send(self._sock, [head, *(data or ())])
        except OSError as error:
            self._end(str(error.strerror))
        with self._changed:
            while handle in self._waiting and not self.why:
                self._changed.wait()
            if self._waiting.pop(handle, None) is not None:
                raise Lost(self.why)
        if request.error == errno.ESHUTDOWN:
            self._end("the server is shutting down")
            raise Lost(self.why)
        if request.error:
            raise OSError(request.error, wire.text(request.error))

    def _receive(self) -> None:
        try:
            while True:
                handle = wire.read_reply(self._sock, self._waiting)
                if handle is not None:
                    with self._changed:
                        del self._waiting[handle]
                        self._changed.notify_all()
        except ProtocolError as error:
            self._end(f"the server {error}")
        except (OSError, KeyError) as error:
            self._end(str(error))

    def _end(self, why: str) -> None:
        with self._changed:
            self.why = self.why or why or "lost"
            self._changed.notify_all()
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Take leave."""
        try:
            with self._sending:
                self._sock.settimeout(1)
                wire.send(self._sock, [memoryview(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, wire.DISCONNECT, 0, 0, 0))])
        except OSError:
            pass
        self._end("closed")
        self._thread.join(5)
        self._sock.close()
