"""`-chardev socket,path=`: a serial line over a Unix stream socket, server or client, bytes as they are.

A server takes one peer at a time and waits for the next when it goes; `wait` makes the VM's start wait for
the first.
"""

from __future__ import annotations

import contextlib
import os
import socket

from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.unix_address import listen_unix


class SocketChardev(DescriptorChardev):
    """Nobody there: output is dropped, and a console port tells the guest that it is closed."""

    def __init__(self, name: str, path: str, server: bool, wait: bool = False) -> None:
        super().__init__(name, own=True)
        self._path = path
        self._listener: socket.socket | None = None
        if not server:
            self._take(self._connect())
            return
        self._listener = listen_unix(path, f"chardev {name}")
        if wait:
            self._take(self._listener.accept()[0])
        self._listener.setblocking(False)

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            raise BackendError(f"chardev {self.name}: cannot connect to {self._path}: {error.strerror}") from error
        return sock

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._in = self._out_fd = sock.detach()
        self.is_open = True

    def start(self, loop: IoLoop) -> None:
        super().start(loop)
        if self._listener is not None:
            loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if self.is_open:
            sock.close()
            return
        self._take(sock)
        self.frontend.opened()
        self.resume_input()

    def _end_of_input(self) -> None:
        self._hang_up()

    def _lost_reader(self, count: int) -> int:
        self._hang_up()
        return count

    def _hang_up(self) -> None:
        if not self.is_open:
            return
        self._pause()
        self._stop_writer()
        fd, self._in, self._out_fd = self._in, -1, -1
        os.close(fd)
        self.is_open = False
        self.frontend.closed()
        self.hung_up()

    def close(self) -> None:
        super().close()
        listener, self._listener = self._listener, None
        if listener is not None:
            if self._loop is not None:
                self._loop.remove(listener.fileno())
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)
