"""The frames of the ioctl protocol: one request, one reply, each exactly one ZeroMQ payload frame.

Used by protocol.client and kvmcore/server. Pure: bytes in, records out. Decoding never trusts a length: a frame that
does not add up to the last byte raises FrameError, and is dropped or refused by whoever received it, with no
effect on anybody else. Integers are little-endian.

    request  magic "SKVQ" u32, version u16, flags u16, incarnation u64, session 16 bytes, seq u64, handle u32,
             request u32, arg u64, ncopy u16, reserved u16, npayload u32; ncopy * {va u64, len u32, dir u32};
             the bytes of the copies that go in, one behind the other; payload
    reply    magic "SKVR" u32, version u16, flags u16, seq u64, ret s32, errno u32, ncopy u16, reserved u16,
             nextra u32; ncopy * {va u64, len u32, reserved u32}; the bytes of the copies; extra

A copy is a pointee that travels with the request: the server sees its bytes at `va` in the session's address space
for the duration of this request, and sends back those that it wrote to.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

VERSION = 1
REQUEST_MAGIC = 0x51564B53
REPLY_MAGIC = 0x52564B53

MAX_FRAME = 1 << 20
"""Bytes of any frame, header included; the sockets refuse longer ones (ZMQ_MAXMSGSIZE)."""
MAX_COPIES = 64
COPY_IN = 1
COPY_OUT = 2

FLAG_INLINE_PAGE = 1
"""RUN without shared memory: the payload is the head of kvm_run, the reply's extra the page as it came out."""
FLAG_BRIEF = 2
"""With FLAG_INLINE_PAGE: RUN returns EINTR, as if kicked, after some 20,000 instructions or when the vCPU would wait. For
those who drive many guests that need not get anywhere: it is done at once, in the order of the other requests, and alike
each time (but where eventfds are attached, which may make it wait)."""

_REQUEST = struct.Struct("<IHHQ16sQIIQHHI")
_REPLY = struct.Struct("<IHHQiIHHI")
_COPY = struct.Struct("<QII")
_REQUEST_SIZE = _REQUEST.size
_unpack_request = _REQUEST.unpack_from
_pack_reply = _REPLY.pack
_new = tuple.__new__
_LENGTH = struct.Struct("<I")


class FrameError(ValueError):
    """Bytes that are not a frame of this protocol. `seq` is the request's number where it could be read."""

    def __init__(self, reason: str, seq: int | None = None) -> None:
        super().__init__(reason)
        self.seq = seq


class Copy(NamedTuple):
    """`length` bytes at `va`; `direction` COPY_IN, COPY_OUT or both; `data` is b'' unless it goes in."""

    va: int
    length: int
    direction: int
    data: bytes


class Request(NamedTuple):
    """An ioctl (or a control request, codec/control.py) as it travels."""

    incarnation: int
    session: bytes
    seq: int
    handle: int
    request: int
    arg: int
    flags: int = 0
    copies: tuple[Copy, ...] = ()
    payload: bytes = b""


class Reply(NamedTuple):
    """The answer to request `seq`: `ret` >= 0 and errno 0, or -1 and an errno. `copies` are (va, bytes)."""

    seq: int
    ret: int
    errno: int
    copies: tuple[tuple[int, bytes], ...] = ()
    extra: bytes = b""


def encode_request(request: Request) -> bytes:
    """The frame. FrameError if it would exceed the limits, so that an honest client never sends one that does."""
    if len(request.copies) > MAX_COPIES:
        raise FrameError(f"more than {MAX_COPIES} pointees")
    parts = [
        _REQUEST.pack(
            REQUEST_MAGIC,
            VERSION,
            request.flags,
            request.incarnation,
            request.session,
            request.seq,
            request.handle & 0xFFFFFFFF,
            request.request & 0xFFFFFFFF,
            request.arg & 0xFFFFFFFFFFFFFFFF,
            len(request.copies),
            0,
            len(request.payload),
        )
    ]
    parts += [_COPY.pack(copy.va, copy.length, copy.direction) for copy in request.copies]
    parts += [copy.data for copy in request.copies if copy.direction & COPY_IN]
    parts.append(request.payload)
    return _checked(b"".join(parts))


def decode_request(frame: bytes | memoryview) -> Request:
    """The record, every length checked. FrameError says what does not fit."""
    size = len(frame)
    if size > MAX_FRAME:
        raise FrameError("frame too long")
    if size < _REQUEST_SIZE:
        raise FrameError("frame too short")
    magic, version, flags, incarnation, session, seq, handle, number, arg, ncopy, reserved, npayload = _unpack_request(frame)
    if magic != REQUEST_MAGIC:
        raise FrameError("not a request")
    if version != VERSION:
        raise FrameError(f"protocol version {version}, this side speaks {VERSION}", seq)
    if reserved or ncopy > MAX_COPIES:
        raise FrameError("bad header", seq)
    copies, at = _decode_copies(frame, ncopy, seq) if ncopy else ((), _REQUEST_SIZE)
    if at + npayload != size:
        raise FrameError("frame length does not match its header", seq)
    payload = bytes(frame[at:]) if npayload else b""
    return _new(Request, (incarnation, session, seq, handle, number, arg, flags, copies, payload))


def _decode_copies(frame: bytes | memoryview, ncopy: int, seq: int) -> tuple[tuple[Copy, ...], int]:
    """The copies of a request, and where the payload begins."""
    at = _REQUEST_SIZE + ncopy * _COPY.size
    if len(frame) < at:
        raise FrameError("frame too short for its copies", seq)
    copies: list[Copy] = []
    outgoing = 0
    for va, length, direction in _COPY.iter_unpack(frame[_REQUEST_SIZE:at]):
        if not 0 < direction <= COPY_IN | COPY_OUT or va + length > 1 << 64:
            raise FrameError("bad copy", seq)
        data = b""
        if direction & COPY_IN:
            data = bytes(frame[at : at + length])
            at += length
        if direction & COPY_OUT:
            outgoing += length
        copies.append(_new(Copy, (va, length, direction, data)))
    if outgoing > MAX_FRAME // 2:
        raise FrameError("asks for more than a reply holds", seq)
    return tuple(copies), at


def encode_reply(reply: Reply) -> bytes:
    """The frame."""
    return reply_frame(*reply)


def reply_frame(seq: int, ret: int, errno: int, copies: tuple[tuple[int, bytes], ...] = (), extra: bytes = b"") -> bytes:
    """encode_reply() of a Reply that nobody else needs."""
    head = _pack_reply(REPLY_MAGIC, VERSION, 0, seq, ret, errno, len(copies), 0, len(extra))
    if not copies:
        return _checked(head + extra) if extra else head
    parts = [head, *[_COPY.pack(va, len(data), 0) for va, data in copies], *[data for _, data in copies], extra]
    return _checked(b"".join(parts))


def decode_reply(frame: bytes | memoryview) -> Reply:
    """The record, every length checked. FrameError says what does not fit."""
    if not _REPLY.size <= len(frame) <= MAX_FRAME:
        raise FrameError("reply too short or too long")
    magic, version, _flags, seq, ret, errno, ncopy, _, nextra = _REPLY.unpack_from(frame)
    if magic != REPLY_MAGIC or version != VERSION or ncopy > MAX_COPIES:
        raise FrameError("not a reply of this protocol version")
    at = _REPLY.size + ncopy * _COPY.size
    if len(frame) < at:
        raise FrameError("reply too short for its copies", seq)
    copies: list[tuple[int, bytes]] = []
    for index in range(ncopy):
        va, length, _ = _COPY.unpack_from(frame, _REPLY.size + index * _COPY.size)
        copies.append((va, bytes(frame[at : at + length])))
        at += length
    if at + nextra != len(frame):
        raise FrameError("reply length does not match its header", seq)
    return Reply(seq, ret, errno, tuple(copies), bytes(frame[at:]))


def encode_batch(frames: list[bytes]) -> bytes:
    """Frames one behind the other, each behind its length: the payload of BATCH, the extra of its reply."""
    pack = _LENGTH.pack
    return b"".join([part for frame in frames for part in (pack(len(frame)), frame)])


def decode_batch(data: bytes, most: int) -> list[bytes]:
    """The frames, which are not looked at yet. FrameError: lengths that do not add up, or more than `most`."""
    frames: list[bytes] = []
    at, size, unpack = 0, len(data), _LENGTH.unpack_from
    while at < size:
        if len(frames) == most or size - at < 4:
            raise FrameError(f"not a batch of at most {most} frames")
        at += 4
        end = at + unpack(data, at - 4)[0]
        if end > size:
            raise FrameError("a frame of the batch is cut off")
        frames.append(data[at:end])
        at = end
    return frames


def _checked(frame: bytes) -> bytes:
    if len(frame) > MAX_FRAME:
        raise FrameError(f"frame of {len(frame)} bytes; the limit is {MAX_FRAME}")
    return frame
