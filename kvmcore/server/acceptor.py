"""The front door: a Unix SOCK_SEQPACKET listener in a private directory, and its connections.

Every stranger meets this before any ZeroMQ socket (KVM_ABI section 6). It checks who connects, lets the owner of the door
(daemon or VM process) decide on the hello, carries descriptors, and is the sign of life: a connection that ends, or
whose process dies, ends its session. Must survive anything that comes in: torn packets, floods, EMFILE.
"""

from __future__ import annotations

import logging
import os
import socket
from errno import EMFILE, ENFILE
from typing import Protocol

from kvmcore.server.loop import EventLoop
from kvmcore.server.session import ClientSession, Peer
from protocol.channel import fd_passing
from protocol.codec import session as codec
from protocol.codec.envelope import FrameError
from protocol.codec.session import Message, Op
from protocol.version import fingerprint

log = logging.getLogger("kvmcore.acceptor")

_VERSION = fingerprint()
#: A connection that has not said hello by then is closed.
HELLO_SECONDS = 5.0
#: Packets that one connection may have answered in one turn, so that a flood leaves time for others.
_PACKETS_PER_TURN = 32


class Refused(Exception):
    """The owner of the door does not want this client. errno and reason go to the client."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno
        self.reason = reason


class DoorOwner(Protocol):
    """What daemon and VM process do with visitors."""

    def hello(self, connection: Connection, message: Message) -> tuple[ClientSession, dict[str, object], list[int]]:
        """Open or attach to a session: (session, body of the answer, descriptors for it). Refused otherwise."""

    def goodbye(self, connection: Connection, session: ClientSession) -> None:
        """The connection has ended, or its process has died."""


class Connection:
    """One connected client process. `peer` is certain; `session` is None until its hello."""

    def __init__(self, acceptor: Acceptor, sock: socket.socket, peer: Peer, pidfd: int) -> None:
        self.acceptor = acceptor
        self.sock = sock
        self.peer = peer
        self.pidfd = pidfd
        self.session: ClientSession | None = None
        self.closed = False

    def on_packets(self) -> None:
        """The socket is readable."""
        for _ in range(_PACKETS_PER_TURN):
            if self.closed or not self._one_packet():
                return

    def _one_packet(self) -> bool:
        try:
            data, fds = fd_passing.receive(self.sock, codec.MAX_MESSAGE, block=False)
        except BlockingIOError:
            return False
        except OSError as error:
            log.info("%s: %s", self.peer, error)
            self.close()
            return False
        if not data:
            self.close()
            return False
        try:
            self._serve(data, fds)
        except (FrameError, BlockingIOError, BrokenPipeError, ConnectionError) as error:
            log.info("%s: closed: %s", self.peer, error or type(error).__name__)
            self.close()
        finally:
            fd_passing.close_all(fds)
        return not self.closed

    def _serve(self, data: bytes, fds: list[int]) -> None:
        message = codec.decode(data)
        if self.session is not None:
            answer, shared = self.session.serve(message, fds)
            self._send(answer, shared)
        elif message.op == Op.HELLO:
            self._hello(message)
        else:
            raise FrameError("said something before its hello")

    def _hello(self, message: Message) -> None:
        try:
            session, body, shared = self.acceptor.owner.hello(self, message)
        except Refused as refused:
            self._send(Message(Op.HELLO, message.seq, refused.errno, body={"reason": refused.reason}), [])
            self.close()
            return
        self.session = session
        self._send(Message(Op.HELLO, message.seq, body={**body, "version": _VERSION}), shared)

    def _send(self, message: Message, fds: list[int]) -> None:
        fd_passing.send(self.sock, codec.encode(message), fds, block=False)

    def close(self) -> None:
        """Hang up; the session, if there is one, is told. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self.acceptor.forget(self)
        self.sock.close()
        os.close(self.pidfd)
        if self.session is not None:
            self.acceptor.owner.goodbye(self, self.session)


class Acceptor:
    """Listens on `path` (already bound and listening socket) and keeps the connections."""

    def __init__(self, loop: EventLoop, listener: socket.socket, owner: DoorOwner, *, limit: int) -> None:
        self.owner = owner
        self._loop = loop
        self._listener = listener
        self._limit = limit
        self._connections: set[Connection] = set()
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        listener.setblocking(False)
        loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(16):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (EMFILE, ENFILE):
                    self._turn_away()
                    return
                log.warning("accept: %s", error)
                return
            self._admit(sock)

    def _turn_away(self) -> None:
        """Out of descriptors: use the spare one to take the visitor in and close the door in his face.

        Leaving him in the backlog would make the listener readable for ever.
        """
        log.warning("out of descriptors: a client was turned away")
        os.close(self._spare)
        try:
            sock, _ = self._listener.accept()
            sock.close()
        except OSError:
            pass
        self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _admit(self, sock: socket.socket) -> None:
        try:
            peer = fd_passing.credentials(sock)
            if peer.uid not in (0, os.geteuid()) or len(self._connections) >= self._limit:
                log.info("turned away process %d of user %d", peer.pid, peer.uid)
                sock.close()
                return
            pidfd = fd_passing.peer_pidfd(sock)
        except OSError:
            sock.close()
            return
        connection = Connection(self, sock, Peer(peer.pid, peer.uid), pidfd)
        self._connections.add(connection)
        self._loop.add_reader(sock.fileno(), connection.on_packets)
        self._loop.add_reader(pidfd, connection.close)
        self._loop.call_later(HELLO_SECONDS, lambda: self._check_hello(connection))

    @staticmethod
    def _check_hello(connection: Connection) -> None:
        if connection.session is None:
            connection.close()

    def forget(self, connection: Connection) -> None:
        """Stop watching a connection that is about to close."""
        self._connections.discard(connection)
        self._loop.remove_reader(connection.sock.fileno())
        self._loop.remove_reader(connection.pidfd)

    def shut(self) -> None:
        """Nobody comes in any more; who is inside stays. Idempotent."""
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    def close(self) -> None:
        """Close the door and every connection."""
        self.shut()
        for connection in list(self._connections):
            connection.close()
        os.close(self._spare)
