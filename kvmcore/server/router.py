"""Requests in, replies out: the ROUTER socket of a daemon or VM process.

Called by the I/O loop. Finds the session that a request names, checks that the process that sent it is the session's
own, and sends the one reply; kvmcore/server/requests.py performs it in between. Bad frames are answered with an errno
where they can be, else dropped; nobody else notices. Must never wait for a client.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from errno import EAGAIN, EBADMSG, EINVAL, EIO, ESTALE

import zmq

from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.requests import Ticket, dispatch
from kvmcore.server.session import ClientSession
from protocol.abi.errors import KvmError
from protocol.channel import zmq_socket
from protocol.codec import control, envelope
from protocol.codec.envelope import FrameError, Reply, Request

log = logging.getLogger("kvmcore.router")

#: Requests that are served before the loop looks at its other descriptors again.
_MESSAGES_PER_TURN = 256
#: Bytes of answers that go into one message: a frame, less its header.
_ROOM = envelope.MAX_FRAME - 64
_MOST_WAITING = 4 << 20
"""Bytes of one session's messages that wait until it may have more served."""
_REST = 0.002
"""Seconds more than it must, so that it is worth the while."""


class Router:
    """Serves `sock` until the loop ends. `sessions` is the owner's live table, by session id."""

    def __init__(
        self,
        loop: EventLoop,
        sock: zmq.Socket[bytes],
        incarnation: int,
        sessions: dict[bytes, ClientSession],
        quotas: Quotas,
        rate: int = 0,
    ) -> None:
        """`rate`: requests a second that are served of one session, the others wait; 0: any number."""
        self.on_hello: Callable[[str, bytes], bytes] | None = None
        """Opens a session for the owner of a CURVE key, given the payload of HELLO (tcp); returns the extra."""
        self._loop = loop
        self._sock = sock
        self._incarnation = incarnation
        self._sessions = sessions
        self._quotas, self._rate = quotas, rate
        self._peers: dict[bytes, int] = {}
        self._together: list[bytes] | None = None
        """Answers to the batch that is being served."""
        self._resumed: ClientSession | None = None
        """Whose messages that have waited are being served."""
        self._thread = threading.get_ident()
        loop.add_reader(int(sock.getsockopt(zmq.FD)), lambda: None)
        loop.add_every_turn(self._turn)

    # -- in ---------------------------------------------------------------------------------------------------

    def _turn(self) -> bool:
        """Serve what has arrived. The fd of a ZeroMQ socket is edge-triggered: read until there is no more."""
        for _ in range(_MESSAGES_PER_TURN):
            try:
                message = zmq_socket.receive_from(self._sock)
            except zmq.Again:
                return False
            if message is not None:
                try:
                    self._serve(*message)
                except Exception:
                    log.exception("internal error while serving a request")
        return True

    def _serve(self, identity_frame: zmq.Frame, frame: zmq.Frame) -> None:
        self._serve_frame(identity_frame.bytes, frame, frame.bytes)

    def _serve_frame(self, identity: bytes, frame: zmq.Frame, data: bytes, known: ClientSession | None = None) -> None:
        """One request: the bytes of `frame`, or some of them, if it is a batch. `known`: the session that the batch itself is
        of, whose owner its sender is.
        """
        try:
            request = envelope.decode_request(data)
        except FrameError as error:
            log.info("bad frame: %s", error)
            if error.seq is not None:
                self._send_frame(identity, Reply(error.seq, -1, EBADMSG, extra=str(error).encode()))
            return
        if request.request == control.BATCH:
            self._serve_batch(identity, frame, request)
            return
        if request.request == control.HELLO and self.on_hello is not None:
            self._hello(identity, frame, request)
            return
        if known is not None and request.session == known.id and not known.dead:
            session: ClientSession | None = known
        else:
            session = self._sessions.get(request.session)
            if session is not None and not self._is_owner(identity, frame, session):
                session = None
        if request.incarnation != self._incarnation:
            self._refuse(identity, request, ESTALE, "the server has been restarted")
        elif session is None:
            self._refuse(identity, request, EIO, "not a session of this process")
        elif session.in_flight >= self._quotas.in_flight:
            self._refuse(identity, request, EAGAIN, "too many requests in flight")
        elif self._rate and self._together is None and not self._allowed(session, 1):
            self._keep_waiting(session, identity, frame, request)
        else:
            session.in_flight += 1
            dispatch(Ticket(self.finish, identity, session, request))

    # -- clients that ask too fast: ioctl(2) never fails for that, it takes its time ------------------------------

    def _allowance(self, session: ClientSession) -> float:
        """Requests that the session may have served now: a token bucket of one second."""
        now = time.monotonic()
        session.allowance = min(self._rate, session.allowance + (now - session.allowed_at) * self._rate)
        session.allowed_at = now
        return session.allowance

    def _allowed(self, session: ClientSession, requests: int) -> bool:
        """Whether a message of so many requests may be served now. The last one may overdraw what there is."""
        if (session.waiting and session is not self._resumed) or self._allowance(session) < 1:
            return False
        session.allowance -= requests
        return True

    def _keep_waiting(self, session: ClientSession, identity: bytes, frame: zmq.Frame, request: Request) -> None:
        """The message is served when its turn comes. EAGAIN: too many wait already."""
        if len(session.waiting) >= self._quotas.in_flight or session.bytes_waiting + len(frame) > _MOST_WAITING:
            self._refuse(identity, request, EAGAIN, f"more than {self._rate} requests a second, and too many that wait")
            return
        session.waiting.append((identity, frame))
        session.bytes_waiting += len(frame)
        if len(session.waiting) == 1:
            self._resume_later(session)

    def _resume_later(self, session: ClientSession) -> None:
        self._loop.call_later(max(1 - session.allowance, 0.0) / self._rate + _REST, lambda: self._resume(session))

    def _resume(self, session: ClientSession) -> None:
        """Serve what has waited, as far as the session may by now."""
        self._resumed = session
        try:
            while session.waiting:
                if self._allowance(session) < 1 and not session.dead:
                    self._resume_later(session)
                    return
                identity, frame = session.waiting.popleft()
                session.bytes_waiting -= len(frame)
                if not session.dead:
                    self._serve_frame(identity, frame, frame.bytes)
        finally:
            self._resumed = None

    def _serve_batch(self, identity: bytes, frame: zmq.Frame, batch: Request) -> None:
        """Requests in one message; each is checked as if it had come by itself."""
        if self._together is not None:
            self._refuse(identity, batch, EINVAL, "a batch in a batch")
            return
        try:
            frames = envelope.decode_batch(batch.payload, control.MAX_BATCH)
        except FrameError as error:
            self._refuse(identity, batch, EBADMSG, str(error))
            return
        session = self._sessions.get(batch.session)
        if session is not None and not self._is_owner(identity, frame, session):
            session = None
        if self._rate and session is not None and not self._allowed(session, len(frames)):
            self._keep_waiting(session, identity, frame, batch)
            return
        self._together = []
        try:
            if session is not None:
                session.table.batch_begins()
            for data in frames:
                self._serve_frame(identity, frame, data, session)
        finally:
            answers, self._together = self._together, None
            if session is not None:
                session.table.batch_ends()
        extra: list[bytes] = []
        room = _ROOM
        for answer in answers:
            if len(answer) + 4 > room and extra:
                self._send_frame(identity, Reply(batch.seq, 0, 0, extra=envelope.encode_batch(extra)))
                extra, room = [], _ROOM
            if len(answer) + 4 > room:
                zmq_socket.send_to(self._sock, identity, answer)  # so long that it goes by itself
                continue
            extra.append(answer)
            room -= len(answer) + 4
        self._send_frame(identity, Reply(batch.seq, 0, 0, extra=envelope.encode_batch(extra)))

    def _is_owner(self, identity: bytes, frame: zmq.Frame, session: ClientSession) -> bool:
        """Whether the process that sent `frame` is the session's: another one, a forked child too, gets EIO."""
        if session.peer.key:
            return zmq_socket.peer_key(frame) == session.peer.key
        pid = self._peers.get(identity)
        if pid is None:
            sender = zmq_socket.peer_credentials(frame)
            if sender is None:
                return False
            pid = sender.pid
            if identity[:1] == b"\0":  # chosen by libzmq and unique; any other one is the peer's own choice
                if len(self._peers) > 8192:
                    self._peers.clear()
                self._peers[identity] = pid
        return pid == session.peer.pid

    def _refuse(self, identity: bytes, request: Request, errno: int, reason: str) -> None:
        self._send_frame(identity, Reply(request.seq, -1, errno, extra=reason.encode()))

    def _send_frame(self, identity: bytes, reply: Reply) -> None:
        """An answer that no ticket waits for."""
        frame = envelope.encode_reply(reply)
        if self._together is not None:
            self._together.append(frame)
        else:
            zmq_socket.send_to(self._sock, identity, frame)

    def _hello(self, identity: bytes, frame: zmq.Frame, request: Request) -> None:
        assert self.on_hello is not None
        try:
            extra = self.on_hello(zmq_socket.peer_key(frame), request.payload)
        except KvmError as error:
            self._refuse(identity, request, error.errno or EIO, error.reason)
            return
        self._send_frame(identity, Reply(request.seq, 0, 0, extra=extra))

    # -- out --------------------------------------------------------------------------------------------------

    def finish(self, ticket: Ticket, frame: bytes) -> None:
        """Send the one reply of `ticket`. Any thread; the socket itself belongs to the I/O thread."""
        if threading.get_ident() == self._thread:
            if self._together is not None:  # its request has come in the batch that is being served
                ticket.session.in_flight -= 1
                self._together.append(frame)
            else:
                self._send(ticket, frame)
        else:
            self._loop.call_soon_threadsafe(lambda: self._send(ticket, frame))

    def _send(self, ticket: Ticket, frame: bytes) -> None:
        ticket.session.in_flight -= 1
        if not zmq_socket.send_to(self._sock, ticket.identity, frame):
            log.info("%s does not take its replies: one is dropped", ticket.session.peer)
