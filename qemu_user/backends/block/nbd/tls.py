"""TLS under NBD: what the client knows of certificates, and a socket that encrypts.

Certificates lie as QEMU and libnbd have them: `tls-certificates=DIR` with ca-cert.pem and, for servers that ask who we are,
client-cert.pem and client-key.pem. Without it the host's certificate authorities are trusted. OpenSSL's state is for one
thread at a time; here one sends and another receives, so it works on buffers, under a lock that nobody holds while he waits.
"""

from __future__ import annotations

import os
import socket
import ssl
import threading
from typing import cast

from qemu_user.backends.errors import BackendError

_PIECE = 256 << 10
PARAMETERS = ("socket", "tls-certificates", "tls-hostname")


def tls_context(uri: str, query: dict[str, str]) -> ssl.SSLContext:
    """Whom to trust and who we are. BackendError: files that cannot be used, or a parameter that nobody knows."""
    if unknown := set(query) - set(PARAMETERS):
        raise BackendError(f"disk {uri}: {', '.join(sorted(unknown))}: not known; there are {', '.join(PARAMETERS)}")
    folder = query.get("tls-certificates", "")
    authority, certificate, key = (os.path.join(folder, name) for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"))
    try:
        context = ssl.create_default_context(cafile=authority if folder else None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if folder and os.path.exists(certificate):
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise BackendError(f"disk {uri}: certificates in {folder}: {error.strerror or error}") from error
    return context


class TlsSocket:
    """Over `sock`, which it owns from now on."""

    def __init__(self, context: ssl.SSLContext, host: str, sock: socket.socket) -> None:
        """Shakes hands. OSError: ssl.SSLError if the server is not who it should be."""
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        if not host:
            raise OSError("TLS over a Unix socket needs tls-hostname=NAME, the name in the server's certificate")
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=host)
        self._state, self._sending = threading.Lock(), threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._put_out()
                self._fetch()
            except ssl.SSLError:
                self._put_out()  # the alert that tells the server why
                raise
            else:
                break
        self._put_out()

    def _put_out(self) -> None:
        if waiting := self._out.read():
            self._sock.sendall(waiting)

    def _fetch(self) -> None:
        data = self._sock.recv(_PIECE)
        with self._state:
            if data:
                self._in.write(data)
            else:
                self._in.write_eof()

    def recvmsg_into(self, views: list[memoryview]) -> tuple[int]:
        """(bytes received,), 0 at the end of the stream."""
        while True:
            with self._state:
                try:
                    # with a buffer it returns a number, whatever typeshed says
                    return (cast(int, self._tls.read(len(views[0]), views[0])),)
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return (0,)
            self._fetch()

    def sendmsg(self, views: list[memoryview]) -> int:
        """Bytes sent, of the first view at most."""
        piece = views[0][:_PIECE]
        with self._sending:
            with self._state:
                self._tls.write(piece)
                data = self._out.read()
            self._sock.sendall(data)
        return len(piece)

    def sendall(self, data: bytes) -> None:
        """All of it."""
        view = memoryview(data)
        while view:
            view = view[self.sendmsg([view]) :]

    def settimeout(self, seconds: float | None) -> None:
        """Of the socket."""
        self._sock.settimeout(seconds)

    def shutdown(self, how: int) -> None:
        """Of the socket, without TLS's leave: NBD has its own."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """The socket."""
        self._sock.close()
