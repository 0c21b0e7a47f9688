"""A client that asks faster than it may is kept waiting, in order, and nobody else is."""

from __future__ import annotations

import os
import time
from errno import EAGAIN

import pytest
import zmq

from kvmcore.server import router as router_module
from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.router import Router
from kvmcore.server.session import ClientSession, Peer
from protocol.channel import zmq_socket
from protocol.codec import control, envelope
from protocol.codec.envelope import Reply, Request

RATE = 50


class Host:
    """A router whose sockets are lists."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = EventLoop()
        self.sessions = [self._session(b"a" * 16), self._session(b"b" * 16)]
        with zmq_socket.context() as context, context.socket(zmq.ROUTER) as unused:
            table = {session.id: session for session in self.sessions}
            self.router = Router(self.loop, unused, 1, table, Quotas.of_this_process(), RATE)
        self.replies: list[Reply] = []
        monkeypatch.setattr(self.router, "_is_owner", lambda *_: True)
        monkeypatch.setattr(router_module.zmq_socket, "send_to", self._send_to)

    def _session(self, number: bytes) -> ClientSession:
        made = ClientSession(number, Peer(os.getpid(), os.getuid()), Quotas.of_this_process())
        made.allowance = RATE
        return made

    def _send_to(self, sock: object, identity: bytes, frame: bytes) -> bool:
        reply = envelope.decode_reply(frame)
        inside = envelope.decode_batch(reply.extra, control.MAX_BATCH) if reply.extra and reply.seq > 10_000 else []
        self.replies += [envelope.decode_reply(each) for each in inside] or [reply]
        return True

    def ask(self, session: int, *numbers: int) -> None:
        """PINGs: one, or several in a batch."""
        frames = [
            envelope.encode_request(Request(1, self.sessions[session].id, number, 0, control.PING, 0)) for number in numbers
        ]
        if len(frames) > 1:
            payload = envelope.encode_batch(frames)
            batch = Request(1, self.sessions[session].id, 10_001, 0, control.BATCH, 0, payload=payload)
            frames = [envelope.encode_request(batch)]
        self.router._serve(zmq.Frame(b"\0peer"), zmq.Frame(frames[0]))

    def turn(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(monkeypatch)
    made.loop._every_turn.clear()
    return made


def test_what_comes_too_fast_waits_in_order(host: Host) -> None:
    begin = time.monotonic()
    for number in range(1, RATE + 11):
        host.ask(0, number)
    host.ask(0, *range(RATE + 11, RATE + 16))
    host.ask(1, 1)
    at_once = len(host.replies)
    if time.monotonic() - begin < 0.1:  # else the first has waited long enough on this machine
        assert RATE < at_once <= RATE + 6
        assert host.replies[-1].seq == 1
    while len(host.replies) < RATE + 16:
        assert time.monotonic() - begin < 60
        host.turn(0.05)
    others = host.replies.pop(at_once - 1)
    assert (others.seq, others.errno) == (1, 0)
    assert [(reply.seq, reply.errno) for reply in host.replies] == [(number, 0) for number in range(1, RATE + 16)]
    assert host.sessions[0].bytes_waiting == len(host.sessions[0].waiting) == host.sessions[0].in_flight == 0


def test_nobody_hoards(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    session = host.sessions[0]
    session.allowance = -1e9
    monkeypatch.setattr(router_module, "_MOST_WAITING", 1000)
    for number in range(30):
        host.ask(0, number)
    assert 5 < len(session.waiting) < 30
    assert [reply.errno for reply in host.replies] == [EAGAIN] * (30 - len(session.waiting))
    session.close()
    host.router._resume(session)
    assert not session.waiting
    assert session.bytes_waiting == 0
