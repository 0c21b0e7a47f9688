"""A session over tcp: no Unix socket, so no shared memory and no descriptors; PINGs are the sign of life.

Stands in for Link (link.py) where the server is on another machine. Guest memory goes by READ_GPA and WRITE_GPA, kvm_run
with each KVM_RUN (envelope.FLAG_INLINE_PAGE).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from errno import ECONNREFUSED, ECONNRESET, EOPNOTSUPP
from typing import Any

from protocol.abi.errors import KvmError
from protocol.channel.zmq_socket import Curve
from protocol.client.link import Channel, Link
from protocol.codec import control
from protocol.codec.session import Op

_PING_SECONDS = control.LEASE_SECONDS / 4
_ANSWER_SECONDS, _GOODBYE_SECONDS = 5.0, 1.0


class RemoteLink(Link):
    """A session with the server at `endpoint` (tcp://HOST:PORT), whose public key `curve` names."""

    local = False

    def __init__(self, endpoint: str, curve: Curve) -> None:
        """Nothing is sent yet; hello() or join() begins."""
        self._endpoint, self._curve = endpoint, curve
        self._channels: list[Channel] = []
        self._owner = os.getpid()
        self.closed = False
        self.session, self.incarnation = b"", 0
        self.welcome: dict[str, Any] = {}
        self._until = time.monotonic() + _ANSWER_SECONDS
        self._over = threading.Event()
        self._pinger: Channel | None = None

    def hello(self, body: dict[str, Any], name: str) -> None:
        """Open a session. KvmError: refused, or nobody answers there that has this key."""
        try:
            reply = self._channel().request(0, control.HELLO, name=name, payload=json.dumps(body).encode())
        except KvmError as error:
            if error.errno != ECONNRESET:
                raise
            reason = f"{self._endpoint} does not answer: is kvmcore there, is its key right, does it know our key?"
            raise KvmError(ECONNREFUSED, name, reason) from error
        self.welcome = json.loads(reply.extra)
        self.join(bytes.fromhex(self.welcome["session"]), int(self.welcome["incarnation"]))

    def join(self, session: bytes, incarnation: int) -> None:
        """Go on with a session that is open; PINGs begin."""
        self.session, self.incarnation = session, incarnation
        self._until = time.monotonic() + control.LEASE_SECONDS
        self._pinger = self._channel()
        threading.Thread(target=self._ping_for_ever, name="kvm-ping", daemon=True).start()

    def _ping_for_ever(self) -> None:
        assert self._pinger is not None
        while not self._over.wait(_PING_SECONDS):
            try:
                self._pinger.request(0, control.PING, name="PING")
            except KvmError:
                if not self.alive:
                    return
                continue
            self._until = time.monotonic() + control.LEASE_SECONDS

    @property
    def alive(self) -> bool:
        """Whether the server has answered within the lease."""
        return not self.closed and time.monotonic() <= self._until

    def _channel(self) -> Channel:
        made = Channel(self, self._endpoint, self._curve)
        self._channels.append(made)
        return made

    def channel(self) -> Channel:
        return self._channel()

    def elsewhere(self, port: int) -> RemoteLink:
        """A link with another process of the same server, which listens on `port`."""
        host = self._endpoint.rpartition(":")[0]
        return RemoteLink(f"{host}:{port}", self._curve)

    def say(
        self,
        op: Op,
        name: str,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        d: int = 0,
        fds: list[int] | None = None,
        body: dict[str, Any] | None = None,
    ) -> list[int]:
        """KvmError(EOPNOTSUPP): descriptors do not travel over tcp."""
        raise KvmError(EOPNOTSUPP, name, "needs shared memory or descriptors, which a session over tcp has not")

    def fileno(self) -> int:
        raise KvmError(EOPNOTSUPP, "fileno", "a session over tcp has no descriptor of its own")

    def close(self) -> None:
        """Say goodbye, so that the server need not wait for the lease. Idempotent."""
        if self.closed:
            return
        self._over.set()
        self._until = min(self._until, time.monotonic() + _GOODBYE_SECONDS)
        if self.session and self.alive:
            with contextlib.suppress(KvmError):  # it is over there already
                self._channel().request(0, control.GOODBYE, name="close")
        self.closed = True
        for channel in self._channels:
            channel.close()
