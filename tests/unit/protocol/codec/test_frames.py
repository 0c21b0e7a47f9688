"""Frames of requests, replies and session messages: what is encoded comes back, anything else is a FrameError."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import envelope, session
from protocol.codec.envelope import COPY_IN, COPY_OUT, MAX_COPIES, MAX_FRAME, Copy, FrameError, Reply, Request
from protocol.codec.session import Message

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    data = draw(st.binary(max_size=64))
    direction = draw(st.sampled_from([COPY_IN, COPY_OUT, COPY_IN | COPY_OUT]))
    va = draw(st.integers(0, 2**64 - 1 - len(data)))
    return Copy(va, len(data), direction, data if direction & COPY_IN else b"")


@st.composite
def requests(draw: st.DrawFn) -> Request:
    return Request(
        draw(U64), draw(st.binary(min_size=16, max_size=16)), draw(U64), draw(U32), draw(U32), draw(U64),
        draw(st.integers(0, 0xFFFF)), tuple(draw(st.lists(copies(), max_size=5))), draw(st.binary(max_size=200)),
    )  # fmt: skip


REPLIES = st.builds(
    Reply, U64, st.integers(-(2**31), 2**31 - 1), st.integers(0, 4095),
    st.lists(st.tuples(U64, st.binary(max_size=64)), max_size=5).map(tuple), st.binary(max_size=200),
)  # fmt: skip


@given(requests())
def test_requests_come_back(request: Request) -> None:
    assert envelope.decode_request(envelope.encode_request(request)) == request


@given(REPLIES)
def test_replies_come_back(reply: Reply) -> None:
    assert envelope.decode_reply(envelope.encode_reply(reply)) == reply


@given(requests(), st.data())
def test_torn_requests(request: Request, data: st.DataObject) -> None:
    frame = envelope.encode_request(request)
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(FrameError):
        envelope.decode_request(frame[:cut])
    with pytest.raises(FrameError):
        envelope.decode_request(frame + b"x")


@given(st.binary(max_size=300))
def test_noise(noise: bytes) -> None:
    for decode in (envelope.decode_request, envelope.decode_reply, session.decode):
        with contextlib.suppress(FrameError):
            decode(noise)


@given(requests(), st.data())
def test_flipped_bits_never_do_more_than_fail(request: Request, data: st.DataObject) -> None:
    frame = bytearray(envelope.encode_request(request))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(FrameError):
        envelope.decode_request(bytes(frame))


def test_limits_of_a_request() -> None:
    good = Request(1, bytes(16), 2, 3, 4, 5)
    with pytest.raises(FrameError, match="pointees"):
        envelope.encode_request(good._replace(copies=(Copy(0, 0, COPY_IN, b""),) * (MAX_COPIES + 1)))
    with pytest.raises(FrameError, match="limit"):
        envelope.encode_request(good._replace(payload=bytes(MAX_FRAME)))
    too_much = good._replace(copies=(Copy(0, MAX_FRAME, COPY_OUT, b""),))
    with pytest.raises(FrameError, match="more than a reply holds"):
        envelope.decode_request(envelope.encode_request(too_much))
    wrapped = good._replace(copies=(Copy(2**64 - 1, 2, COPY_OUT, b""),))
    with pytest.raises(FrameError, match="bad copy"):
        envelope.decode_request(envelope.encode_request(wrapped))


def test_another_version_is_told_its_request() -> None:
    frame = bytearray(envelope.encode_request(Request(1, bytes(16), 77, 3, 4, 5)))
    struct.pack_into("<H", frame, 4, 99)
    with pytest.raises(FrameError, match="version 99") as caught:
        envelope.decode_request(bytes(frame))
    assert caught.value.seq == 77


_VALUES = st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=8), st.none())
BODIES = st.dictionaries(st.text(max_size=8), _VALUES, max_size=4)


@given(st.builds(Message, st.integers(0, 0xFFFF), U32, U32, U64, U64, U64, U64, BODIES))
def test_session_messages_come_back(message: Message) -> None:
    assert session.decode(session.encode(message)) == message


@pytest.mark.parametrize("body", [b"[]", b"{", b'"text"', b"[" * 5000])
def test_bodies_that_are_no_objects(body: bytes) -> None:
    packet = bytearray(session.encode(Message(1, 7)))
    struct.pack_into("<I", packet, len(packet) - 8, len(body))
    with pytest.raises(FrameError) as caught:
        session.decode(bytes(packet) + body)
    assert caught.value.seq == 7
