"""How many connections a ROUTER on ipc holds: no more than its process has descriptors for.

libzmq aborts its process when accept(2) on an ipc socket finds no descriptor (KVM_ABI section 6), and any client knows where to
connect. So the socket has another name, which nobody knows, while there are too many, and its own again when enough have
left; those that are connected are served meanwhile. (Unbinding would hang up on them.) Counted by libzmq's socket monitor, on
the I/O thread: some more come in before we know, so the limit is to be far below the descriptors there are.
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
from contextlib import suppress

import zmq

from kvmcore.server.loop import EventLoop

log = logging.getLogger("kvmcore.router")

_EVENT = struct.Struct("<HI")
_LOOK = 0.5
"""Seconds between looks whether enough have left."""


class ConnectionLimit:
    """Watches `sock`, bound to `endpoint`: at most about `most` connections."""

    def __init__(self, loop: EventLoop, sock: zmq.Socket[bytes], endpoint: str, most: int) -> None:
        self._loop, self._sock, self._most = loop, sock, most
        self._path = endpoint.removeprefix("ipc://")
        self._taken: set[int] = set()
        """Descriptors of connections; some may have been closed meanwhile, for not every end is told."""
        self._hidden = ""
        self._monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED)
        loop.add_reader(int(self._monitor.getsockopt(zmq.FD)), self._take)
        loop.call_later(0.0, self._take)  # what came before we watched

    def _take(self) -> None:
        while True:
            try:
                event = self._monitor.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return
            self._taken.add(_EVENT.unpack(event)[1])
            if len(self._taken) > self._most and not self._hidden:
                self._forget_closed()
                if len(self._taken) > self._most:
                    self._close()

    def _forget_closed(self) -> None:
        self._taken &= {int(name) for name in os.listdir("/proc/self/fd")}

    def _close(self) -> None:
        log.warning("more than %d connections: nobody else is let in until some have left", self._most)
        hidden = f"{self._path}-{secrets.token_hex(8)}"
        with suppress(OSError):
            os.rename(self._path, hidden)
            self._hidden = hidden
        self._loop.call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Have the name again if enough have left."""
        self._forget_closed()
        if len(self._taken) > self._most * 3 // 4:
            self._loop.call_later(_LOOK, self._look)
            return
        log.warning("connections are taken again")
        self._open()

    def _open(self) -> None:
        if self._hidden:
            with suppress(OSError):
                os.rename(self._hidden, self._path)
            self._hidden = ""

    def stop(self) -> None:
        """Before the socket is closed."""
        self._open()
        self._loop.remove_reader(int(self._monitor.getsockopt(zmq.FD)))
        with suppress(zmq.ZMQError):
            self._sock.disable_monitor()
        self._monitor.close(linger=0)  # else the context never ends
