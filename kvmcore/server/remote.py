"""Sessions over tcp: a ROUTER with CURVE, an authenticator that knows the keys that may come in, and leases.

The daemon has one such door, and every VM that was made through it has one of its own, for its owner's key alone. Where no
socket shows that a client lives, it says PING: a session that has not for its lease is over. Used by daemon.py and
vm_process.py. Without shared memory, what needs a descriptor (mmap, irqfd, segments) is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from errno import EINVAL

import zmq
from zmq.auth.thread import ThreadAuthenticator

from kvmcore.server.acceptor import Refused
from kvmcore.server.loop import EventLoop
from kvmcore.server.session import ClientSession
from protocol.abi.errors import KvmError
from protocol.channel import zmq_socket
from protocol.channel.zmq_socket import Curve
from protocol.codec import control
from protocol.codec.session import Message, Op

log = logging.getLogger("kvmcore.remote")

_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Remote:
    """What the command line says of tcp: where, with which key pair, for which public keys (Z85)."""

    endpoint: str
    curve: Curve
    peers: frozenset[str]

    @property
    def host(self) -> str:
        """The interface, without the port."""
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0]


class _Known:
    """pyzmq's credentials provider: the keys that may come in."""

    def __init__(self, keys: Collection[str]) -> None:
        self._keys = frozenset(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        known = key.decode() in self._keys
        if not known:
            log.warning("refused an unknown key: %s", key.decode())
        return known


class RemoteDoor:
    """A bound tcp ROUTER and its authenticator. `endpoint` has the port that it got."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve, keys: Collection[str]) -> None:
        """zmq.ZMQError when the address cannot be had."""
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        try:
            self._authenticator.configure_curve_callback("kvmcore", _Known(keys))
            self.socket = zmq_socket.router(context, endpoint, curve)
        except BaseException:
            self._authenticator.stop()
            raise
        self.endpoint = zmq_socket.bound_to(self.socket)

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def close(self) -> None:
        self.socket.close(linger=100)
        self._authenticator.stop()


def greet(open_session: Callable[[str, dict[str, object]], dict[str, object]]) -> Callable[[str, bytes], bytes]:
    """What a Router does with HELLO: JSON in, JSON out. KvmError for a client that is not wanted."""

    def hello(key: str, payload: bytes) -> bytes:
        try:
            wishes = json.loads(payload or b"{}")
        except ValueError as error:
            raise KvmError(EINVAL, "HELLO", f"not JSON: {error}") from None
        if not isinstance(wishes, dict):
            raise KvmError(EINVAL, "HELLO", "expected an object")
        try:
            return json.dumps(open_session(key, Message(Op.HELLO, 0, body=wishes).body)).encode()
        except Refused as refused:
            raise KvmError(refused.errno, "HELLO", str(refused)) from None

    return hello


def watch_leases(
    loop: EventLoop, sessions: Callable[[], Collection[ClientSession]], over: Callable[[ClientSession], None]
) -> None:
    """Every now and then: `over` for each session of a key that has not been heard of for its lease, or is dead."""

    def look() -> None:
        for session in list(sessions()):
            if session.peer.key and (session.dead or session.silent_for > control.LEASE_SECONDS):
                over(session)
        loop.call_later(_LOOK_SECONDS, look)

    loop.call_later(_LOOK_SECONDS, look)
