"""ZeroMQ sockets with the options that KVM_ABI section 6 found to be needed; nobody sets socket options elsewhere.

Called by kvmcore/server (ROUTER) and protocol.client (DEALER). Bytes only. A ROUTER on tcp exists only with CURVE
keys and an authenticator; a ROUTER on ipc lies in a directory that only its owner may enter. Contexts are made
after the last fork of a process, never before.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from errno import EAGAIN, EHOSTUNREACH

import zmq

from protocol.channel.fd_passing import Credentials, credentials

#: Longest message that is accepted; the peer that sends a longer one is disconnected.
MAX_MESSAGE = 1 << 20
#: Messages that wait for one peer, in each direction.
HIGH_WATER = 64
#: How long a first message waits for its connection.
CONNECT_MS = 5_000
_HEARTBEAT_MS = 2_000
_HEARTBEAT_TIMEOUT_MS = 6_000


@dataclass(frozen=True)
class Curve:
    """A CURVE key pair (Z85, 40 characters each). On a client also the server's public key."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes = b""

    @classmethod
    def generate(cls, server: bytes = b"") -> Curve:
        """A fresh key pair."""
        public, secret = zmq.curve_keypair()
        return cls(public, secret, server)


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """A Context with one I/O thread whose sockets never linger."""
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    made.setsockopt(zmq.LINGER, 0)
    return made


def _common(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER)
    sock.setsockopt(zmq.RCVHWM, HIGH_WATER)
    sock.setsockopt(zmq.HANDSHAKE_IVL, 2_000)


def router(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve | None = None) -> zmq.Socket[bytes]:
    """A bound ROUTER. tcp without `curve` is refused (ValueError). zmq.ZMQError: the address is taken, ..."""
    remote = is_tcp(endpoint)
    if remote and curve is None:
        raise ValueError("tcp endpoints need CURVE keys")
    sock = ctx.socket(zmq.ROUTER)
    try:
        _common(sock)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 0)
        if remote and curve is not None:
            _heartbeat(sock)
            sock.setsockopt(zmq.CURVE_SERVER, 1)
            sock.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
            sock.setsockopt(zmq.ZAP_DOMAIN, b"kvmcore")
        sock.bind(endpoint)
    except BaseException:
        sock.close()
        raise
    return sock


def dealer(ctx: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve | None = None) -> zmq.Socket[bytes]:
    """A DEALER that connects to `endpoint`. tcp needs `curve` with the server's key (ValueError)."""
    remote = is_tcp(endpoint)
    if remote and (curve is None or not curve.server):
        raise ValueError("tcp endpoints need CURVE keys, the server's public one among them")
    sock = ctx.socket(zmq.DEALER)
    try:
        _common(sock)
        if remote and curve is not None:
            _heartbeat(sock)
            sock.setsockopt(zmq.CURVE_SERVERKEY, curve.server)
            sock.setsockopt(zmq.CURVE_PUBLICKEY, curve.public)
            sock.setsockopt(zmq.CURVE_SECRETKEY, curve.secret)
        else:
            sock.setsockopt(zmq.RECONNECT_IVL, -1)  # a new server on this path is not the old one
        # Queue nothing for a server that is not there: it would be replayed to its successor.
        sock.setsockopt(zmq.IMMEDIATE, 1)
        sock.setsockopt(zmq.SNDTIMEO, CONNECT_MS)
        sock.connect(endpoint)
    except BaseException:
        sock.close()
        raise
    return sock


def send_to(sock: zmq.Socket[bytes], identity: bytes, payload: bytes) -> bool:
    """Send to one peer of a ROUTER without waiting. False: it is gone, or it does not read what it is sent."""
    try:
        sock.send_multipart((identity, payload), zmq.NOBLOCK)
    except zmq.ZMQError as error:
        if error.errno in (EHOSTUNREACH, EAGAIN):
            return False
        raise
    return True


def receive_from(sock: zmq.Socket[bytes]) -> tuple[zmq.Frame, zmq.Frame] | None:
    """(identity, payload) of the next message of a ROUTER; None for one that is not exactly one payload frame.

    zmq.Again when there is no message.
    """
    frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
    return (frames[0], frames[1]) if len(frames) == 2 else None


def peer_credentials(frame: zmq.Frame) -> Credentials | None:
    """Which process sent a frame that came over ipc; None when it has hung up already."""
    try:
        copy = os.dup(int(frame.get(zmq.SRCFD)))
    except (OSError, zmq.ZMQError):
        return None
    with socket.socket(fileno=copy) as peer:
        try:
            return credentials(peer)
        except OSError:
            return None


def peer_key(frame: zmq.Frame) -> str:
    """The CURVE public key (Z85) of the peer that sent a frame, as the authenticator vouched for it; '' on ipc."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def bound_to(sock: zmq.Socket[bytes]) -> str:
    """Where a bound socket listens, with the port that `*` has become."""
    name = sock.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(name, bytes)
    return name.rstrip(b"\0").decode()


def is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def _heartbeat(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TTL, _HEARTBEAT_TIMEOUT_MS)
