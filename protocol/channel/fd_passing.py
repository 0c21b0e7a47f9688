"""Unix SOCK_SEQPACKET sockets that carry messages with descriptors, and who is at the other end.

Called by kvmcore/server (acceptor, zygote) and protocol.client. Bytes and descriptors only. Must never leak a
descriptor: whatever arrives beyond what the caller wants is closed here, and a truncated control message
(MSG_CTRUNC: the kernel has closed some already) is an error, not a short list.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from errno import EMSGSIZE, EPROTO
from typing import NamedTuple

MAX_FDS = 8
_SPACE = socket.CMSG_SPACE(MAX_FDS * 4)
#: Plain numbers: Python takes longer to combine flags than the kernel to say that there is nothing.
_NO_SIGNAL, _CLOSE_ON_EXEC, _NO_WAIT = map(int, (socket.MSG_NOSIGNAL, socket.MSG_CMSG_CLOEXEC, socket.MSG_DONTWAIT))
_CREDENTIALS = struct.Struct("iII")
_SO_PEERPIDFD = 77
#: sizeof(sockaddr_un.sun_path) less its terminating zero.
MAX_PATH = 107


class Credentials(NamedTuple):
    """The process that connected, as the kernel vouches for it."""

    pid: int
    uid: int
    gid: int


def make_room(count: int = 1024) -> None:
    """To be called in a process that has one thread yet: so many descriptors will then be had at once. The kernel makes a table
    that is full larger, from 64 on, and where threads share it waits 5 to 20 ms for all of the machine (synchronize_rcu). Fewer
    are allowed: no matter."""
    try:
        os.close(fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, count - 1))
    except OSError:
        pass  # descriptor 0 is closed, or the limit is lower


def connect(path: str) -> socket.socket:
    """A connected socket, close-on-exec. OSError: ENOENT, ECONNREFUSED, ENAMETOOLONG... as connect(2) has them."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def pair() -> tuple[socket.socket, socket.socket]:
    """A connected pair of packet sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def credentials(sock: socket.socket) -> Credentials:
    """Who connected to `sock` (SO_PEERCRED)."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Credentials(*_CREDENTIALS.unpack(raw))


def peer_pidfd(sock: socket.socket) -> int:
    """A pidfd of the process that connected: readable when it has died. Race-free where the kernel has SO_PEERPIDFD.

    OSError ESRCH if it is gone already.
    """
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # before Linux 6.5
        return os.pidfd_open(credentials(sock).pid)


def send(sock: socket.socket, data: bytes, fds: list[int] | None = None, *, block: bool = True) -> None:
    """Send one packet with up to MAX_FDS descriptors (borrowed). BlockingIOError if `block` is False and it is full."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, _NO_SIGNAL if block else _NO_SIGNAL | _NO_WAIT)


def receive(sock: socket.socket, limit: int, *, block: bool = True) -> tuple[bytes, list[int]]:
    """One packet and its descriptors (close-on-exec, owned by the caller). b'' at the end of the stream.

    OSError EMSGSIZE: the packet is longer than `limit`. EPROTO: descriptors were lost (MSG_CTRUNC).
    """
    data, ancillary, result, _ = sock.recvmsg(limit, _SPACE, _CLOSE_ON_EXEC if block else _CLOSE_ON_EXEC | _NO_WAIT)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    lost = result & socket.MSG_CTRUNC
    if lost or result & socket.MSG_TRUNC:
        close_all(list(fds))
        raise OSError(EPROTO if lost else EMSGSIZE, "descriptors were lost" if lost else "packet too long")
    return data, list(fds)


def close_all(fds: list[int]) -> None:
    """Close each of them."""
    for fd in fds:
        os.close(fd)
