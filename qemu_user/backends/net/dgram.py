"""`-netdev dgram`: a frame is a datagram, over Unix or UDP sockets, as QEMU has it. Two VMs, ours or QEMU's, joined without
a connection: nobody knows whether the other is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque

from qemu_user.backends.errors import BackendBusy, BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import MAX_FRAME, NetBackend
from qemu_user.backends.unix_address import bind_unix

_FRAMES_PER_TURN = 64
_SOCKET_BUFFER = 4 << 20
_RETRY_SECONDS = 0.001
_REMEMBERED = 256
_RETRIES = 200
"""A receiver that takes nothing for so long loses frames."""

Address = str | tuple[str, int]


def prepare(sock: socket.socket) -> None:
    """Make a datagram socket non-blocking, with room for a burst of frames."""
    sock.setblocking(False)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)


class DgramNet(NetBackend):
    """Bound to `local`, sends to `remote`: both paths, or both host and port."""

    def __init__(self, name: str, local: Address, remote: Address) -> None:
        super().__init__(name)
        self._local, self._remote = local, remote
        self._loop: IoLoop | None = None
        self._socket: socket.socket | None = None
        self._buffer = memoryview(bytearray(MAX_FRAME))
        self._held = 0
        self._reading = False
        self._refusals = 0

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        if isinstance(self._local, str):
            self._socket = bind_unix(self._local, f"netdev {self.name}")
            prepare(self._socket)
        else:
            self._socket = self._bind_udp(*self._local)
        self.is_up = True
        self._listen()

    def _foreign(self, frame: memoryview) -> bool:
        """Whether a frame is another's."""
        return True

    def _bind_udp(self, host: str, port: int) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE
            )[0]
            sock = socket.socket(family, kind, protocol)
            try:
                sock.bind(address)
                if isinstance(self._remote, tuple):
                    found = socket.getaddrinfo(*self._remote, family=family, type=socket.SOCK_DGRAM)[0][4]
                    self._remote = (str(found[0]), int(found[1]))
            except OSError:
                sock.close()
                raise
        except OSError as error:
            what = BackendBusy if error.errno == errno.EADDRINUSE else BackendError
            raise what(f"netdev {self.name}: {host}:{port}: {error.strerror or error}") from error
        prepare(sock)
        return sock

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
        for _ in range(_FRAMES_PER_TURN):
            if self._socket is None:
                return
            try:
                count = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:  # nobody was at the other end when we sent: UDP tells so here
                continue
            if not self._foreign(self._buffer[:count]):
                continue
            if not self.frontend.receive(self._buffer[:count]):
                self._held = count
                self._rest()
                return

    def resume(self) -> None:
        if self._socket is None or self._reading:
            return
        if self._held and not self.frontend.receive(self._buffer[: self._held]):
            return
        self._held = 0
        self._listen()

    # -- out ---------------------------------------------------------------------------------------

    def send(self, frame: list[memoryview]) -> bool:
        if self._socket is None:
            return True
        try:
            self._socket.sendmsg(frame, [], socket.MSG_NOSIGNAL, self._remote)
        except BlockingIOError:
            return self._refuse()
        except OSError:
            pass  # nobody is there, or the frame is too long for a datagram: lost, as on the wire
        self._refusals = 0
        return True

    def _refuse(self) -> bool:
        """The other's queue is full. A socket that is not connected cannot be polled for that."""
        self._refusals += 1
        if self._refusals > _RETRIES:
            return True
        assert self._loop is not None
        self._loop.call_later(_RETRY_SECONDS, lambda: self.frontend.sent())
        return False

    def close(self) -> None:
        sock, self._socket = self._socket, None
        self.is_up = self._reading = False
        if sock is not None:
            if self._loop is not None:
                self._loop.remove(sock.fileno())
            sock.close()
            if isinstance(self._local, str):
                with contextlib.suppress(OSError):
                    os.unlink(self._local)


class MulticastNet(DgramNet):
    """`-netdev socket,mcast=`: every VM in the group `group` hears every frame, on the interface with address `interface`."""

    def __init__(self, name: str, group: tuple[str, int], interface: str = "") -> None:
        super().__init__(name, ("", group[1]), group)
        self._group, self._interface = group, interface or "0.0.0.0"
        self._own: deque[int] = deque(maxlen=_REMEMBERED)
        """Hashes of what we sent: the group sends it to us as well."""

    def send(self, frame: list[memoryview]) -> bool:
        taken = super().send(frame)
        if taken:
            self._own.append(hash(b"".join(frame)))
        return taken

    def _foreign(self, frame: memoryview) -> bool:
        try:
            self._own.remove(hash(bytes(frame)))
        except ValueError:
            return True
        return False

    def _bind_udp(self, host: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(self._group)
            group, interface = (socket.inet_aton(address) for address in (self._group[0], self._interface))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + interface)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        except OSError as error:
            sock.close()
            where = f"{self._group[0]}:{self._group[1]}"
            raise BackendError(f"netdev {self.name}: mcast={where}: {error.strerror or error}") from error
        prepare(sock)
        return sock
