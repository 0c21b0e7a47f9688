"""Requests with a deadline on a session's ROUTER: what tells a server that hangs from one that refuses.

protocol.client waits as long as the server lives; here every reply must come within a time, many requests may be on
their way at once, and frames need not be well formed.
"""

from __future__ import annotations

import itertools
import select
import time

import zmq

from protocol.channel import zmq_socket
from protocol.client.link import Link, shared_context
from protocol.codec import control, envelope
from protocol.codec.envelope import Copy, FrameError, Reply, Request

_BATCH = 1 << 63
"""What tells the sequence numbers of batches from those of requests."""


_SLICE = 0.5
"""Seconds."""


class Hang(Exception):
    """No reply in time, and the server's process lives."""


class Gone(Exception):
    """The server's process has ended."""


class Wire:
    """One DEALER of `link`. `deadline`: seconds that a reply may take."""

    def __init__(self, link: Link, *, deadline: float = 10.0) -> None:
        self.link, self.deadline = link, deadline
        self._sequence = itertools.count(1)
        self._replies: dict[int, Reply] = {}
        self.failed = False
        """Whether the server has ended, or has not answered in time."""
        self._socket = zmq_socket.dealer(shared_context(), str(link.welcome["router"]))
        self._fds = (int(self._socket.getsockopt(zmq.FD)), link.fileno())

    def frame(
        self, handle: int, number: int, arg: int = 0, copies: tuple[Copy, ...] = (), payload: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """(sequence number, encoded request)."""
        sequence = next(self._sequence)
        request = Request(self.link.incarnation, self.link.session, sequence, handle, number, arg, flags, copies, payload)
        return sequence, envelope.encode_request(request)

    def send(self, frame: bytes) -> None:
        """Gone, Hang: nobody takes it."""
        patience = self.deadline
        while True:
            try:
                return self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                if not self.link.alive:
                    self.failed = True
                    raise Gone("the process has ended") from None
                if patience <= 0:
                    self.failed = True
                    raise Hang(f"nothing is taken for {self.deadline:g} s") from None
                self._socket.poll(int(1000 * _SLICE), zmq.POLLOUT)
                patience -= _SLICE
            except zmq.ZMQError as error:
                self.failed = True
                raise Gone(str(error)) from error

    def batch(self, frames: list[bytes]) -> None:
        """Several frames in one message; wait() gives their replies as if each had been sent by itself. Gone."""
        if len(frames) == 1:
            self.send(frames[0])
            return
        payload = envelope.encode_batch(frames)
        sequence = _BATCH | next(self._sequence)
        batch = Request(self.link.incarnation, self.link.session, sequence, 0, control.BATCH, 0, payload=payload)
        self.send(envelope.encode_request(batch))

    def wait(self, sequence: int, seconds: float | None = None) -> Reply | None:
        """The reply to `sequence`; None if it has not come in `seconds`. Hang after the deadline, Gone.

        Time counts in slices, at most so long each, so that a machine that stood still meanwhile is no hang.
        """
        patience = self.deadline if seconds is None else seconds
        while (reply := self._replies.pop(sequence, None)) is None:
            self._take()
            if sequence in self._replies:
                continue
            if patience <= 0:
                if seconds is not None:
                    return None
                self.failed = True
                raise Hang(f"no reply in {self.deadline:g} s")
            before = time.monotonic()
            ready = select.select(self._fds, (), (), min(patience, _SLICE))[0]  # to the microsecond; zmq's poll: to the ms
            patience -= min(time.monotonic() - before, _SLICE)
            if self._fds[1] in ready and not self.link.alive:
                self._take()  # what it said last
                if sequence not in self._replies:
                    self.failed = True
                    raise Gone("the process has ended")
        return reply

    def _take(self) -> None:
        while True:
            try:
                reply = envelope.decode_reply(self._socket.recv(zmq.NOBLOCK))
                if reply.seq & _BATCH and not reply.errno:
                    for frame in envelope.decode_batch(reply.extra, control.MAX_BATCH):
                        answer = envelope.decode_reply(frame)
                        self._replies[answer.seq] = answer
                    continue
            except zmq.Again:
                return
            except FrameError as error:
                raise Gone(f"a reply that is no reply: {error}") from error
            self._replies[reply.seq] = reply

    def forget(self) -> None:
        """Replies that nobody has waited for."""
        self._replies.clear()

    def close(self) -> None:
        self._socket.close()
