"""Requests with a deadline on a session's ROUTER: what tells a server that hangs from one that refuses.

protocol.client waits as long as the server lives; here every reply must come within a time, many requests may be on
their way at once, and frames need not be well formed.
"""

from __future__ import annotations

import itertools
import time

import zmq

from protocol.channel import zmq_socket
from protocol.client.link import Link, shared_context
from protocol.codec import envelope
from protocol.codec.envelope import Copy, FrameError, Reply, Request


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
        self._socket = zmq_socket.dealer(shared_context(), str(link.welcome["router"]))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(link.fileno(), zmq.POLLIN)

    def frame(
        self, handle: int, number: int, arg: int = 0, copies: tuple[Copy, ...] = (), payload: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """(sequence number, encoded request)."""
        sequence = next(self._sequence)
        request = Request(self.link.incarnation, self.link.session, sequence, handle, number, arg, flags, copies, payload)
        return sequence, envelope.encode_request(request)

    def send(self, frame: bytes) -> None:
        """Gone: nobody takes it."""
        try:
            self._socket.send(frame)
        except zmq.ZMQError as error:
            raise Gone(str(error)) from error

    def wait(self, sequence: int, seconds: float | None = None) -> Reply | None:
        """The reply to `sequence`; None if it has not come in `seconds`. Hang after the deadline, Gone."""
        end = time.monotonic() + (self.deadline if seconds is None else seconds)
        while (reply := self._replies.pop(sequence, None)) is None:
            left = end - time.monotonic()
            if left <= 0:
                if seconds is not None:
                    return None
                raise Hang(f"no reply in {self.deadline:g} s")
            ready = dict(self._poller.poll(int(left * 1000) + 1))
            if self._socket in ready:
                self._take()
            elif ready and not self.link.alive:
                self._take()  # what it said last
                if sequence not in self._replies:
                    raise Gone("the process has ended")
        return reply

    def _take(self) -> None:
        while True:
            try:
                reply = envelope.decode_reply(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except FrameError as error:
                raise Gone(f"a reply that is no reply: {error}") from error
            self._replies[reply.seq] = reply

    def close(self) -> None:
        self._poller.unregister(self._socket)
        self._socket.close()
