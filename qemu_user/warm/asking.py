"""Asking the warm parent for a process: by a command for itself (front.py), or for a VM in the background (process.py). The
C half of the socket module does: the other one imports a dozen more.
"""

from __future__ import annotations

import os
import struct
from _socket import AF_UNIX, CMSG_SPACE, MSG_CMSG_CLOEXEC, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket

from qemu_user.runtime_folder import runtime_folder
from qemu_user.warm.request import Request

SOCKET = "warm.sock"
_LONGEST_WORD = 200


class Asked:
    """The parent's answer: a process, whose end will be told over the same connection."""

    def __init__(self, connection: socket, pid: int, pidfd: int) -> None:
        self._connection, self.pid, self.pidfd = connection, pid, pidfd

    def fileno(self) -> int:
        """Readable when end() does not block."""
        return self._connection.fileno()

    def end(self) -> tuple[str, int] | None:
        """("exit", status) or ("signal", number); None: the parent has died. Blocks until the process has ended."""
        word, _ = _receive(self._connection)
        kind, _, number = word.partition(" ")
        return (kind, int(number)) if number.isdigit() else None

    def close(self) -> None:
        """Not interested in its end."""
        self._connection.close()
        os.close(self.pidfd)


def ask(request: Request, fds: list[int]) -> Asked | None:
    """A process; None: there is no parent, or it does not do it. `fds`: working directory, the pipe if it DIES, the others."""
    connection = socket(AF_UNIX, SOCK_STREAM)
    try:
        connection.connect(f"{runtime_folder()}/{SOCKET}")
        data = request.encode()
        sent = connection.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))])
        connection.sendall(data[sent:])
        word, came = _receive(connection)
        kind, _, number = word.partition(" ")
        if kind == "pid" and len(came) == 1:
            return Asked(connection, int(number), came[0])
    except OSError:
        pass  # nobody listens
    connection.close()
    return None


def _receive(connection: socket) -> tuple[str, list[int]]:
    """A line, and descriptors; "" at the end."""
    line, fds = b"", list[int]()
    while not line.endswith(b"\n") and len(line) < _LONGEST_WORD:
        data, ancillary, _, _ = connection.recvmsg(1, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        for level, kind, payload in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                fds += struct.unpack("i", payload)
        if not data:
            return "", fds
        line += data
    return line.decode(errors="replace").strip(), fds
