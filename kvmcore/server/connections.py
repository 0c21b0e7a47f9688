"""How many connections a ROUTER on ipc holds: no more than its process has descriptors for.

libzmq aborts its process when accept(2) on an ipc socket finds no descriptor (KVM_ABI section 6), and any client knows where to
connect. So the socket has another name, which nobody knows, while there are too many, and its own again when enough have
left; those that are connected are served meanwhile. (Unbinding would hang up on them.) libzmq takes in what comes until the
name is gone, so a thread of its own listens to libzmq's socket monitor: whatever the I/O thread is doing, some hundred come in
at most, and descriptors are kept back for those (quotas.py).
"""

from __future__ import annotations

import logging
import os
import secrets
import struct
import threading
from contextlib import suppress

import zmq

log = logging.getLogger("kvmcore.router")

_EVENT = struct.Struct("<HI")
_LOOK_MS = 500
"""Between looks whether enough have left."""


class ConnectionLimit:
    """Watches `sock`, bound to `endpoint`: at most about `most` connections."""

    def __init__(self, sock: zmq.Socket[bytes], endpoint: str, most: int) -> None:
        self._sock, self._most = sock, most
        self._path = endpoint.removeprefix("ipc://")
        self._taken: set[int] = set()
        """Descriptors of connections; some may have been closed meanwhile, for not every end is told."""
        self._hidden = ""
        self._monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_MONITOR_STOPPED)
        self._thread = threading.Thread(target=self._watch, name="connections", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        """On the thread, until the monitor is stopped."""
        with suppress(zmq.ZMQError):
            while True:
                if self._monitor.poll(_LOOK_MS if self._hidden else None):
                    kind, value = _EVENT.unpack(self._monitor.recv_multipart()[0])
                    if kind == zmq.EVENT_MONITOR_STOPPED:
                        break
                    self._accepted(value)
                elif self._hidden:
                    self._look()
        self._open()
        self._monitor.close(linger=0)  # else the context never ends

    def _accepted(self, descriptor: int) -> None:
        self._taken.add(descriptor)
        if len(self._taken) > self._most and not self._hidden:
            self._forget_closed()
            if len(self._taken) > self._most:
                self._close()

    def _forget_closed(self) -> None:
        self._taken &= {int(name) for name in os.listdir("/proc/self/fd")}

    def _close(self) -> None:
        hidden = f"{self._path}-{secrets.token_hex(8)}"
        with suppress(OSError):
            os.rename(self._path, hidden)
            self._hidden = hidden
        log.warning("more than %d connections: nobody else is let in until some have left", self._most)

    def _look(self) -> None:
        """Have the name again if enough have left."""
        self._forget_closed()
        if len(self._taken) <= self._most * 3 // 4:
            log.warning("connections are taken again")
            self._open()

    def _open(self) -> None:
        if self._hidden:
            with suppress(OSError):
                os.rename(self._hidden, self._path)
            self._hidden = ""

    def stop(self) -> None:
        """Before the socket is closed."""
        with suppress(zmq.ZMQError):
            self._sock.disable_monitor()
        self._thread.join(1.0)
