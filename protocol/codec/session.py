"""Messages on a session's Unix SOCK_SEQPACKET socket: hello, and whatever needs SCM_RIGHTS.

Each packet is one message, and each message of the client gets one answer with the same seq. Used by protocol.client and
kvmcore/server (acceptor). Pure: descriptors travel beside the bytes, protocol.channel.fd_passing moves them.

    magic "SKVS" u32, version u16, op u16, seq u32, errno u32, a u64, b u64, c u64, d u64, nbody u32, reserved u32; body (JSON)
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum, unique
from typing import Any, NamedTuple

from protocol.codec.envelope import VERSION, FrameError

MAGIC = 0x53564B53
MAX_MESSAGE = 8192
_HEADER = struct.Struct("<IHHIIQQQQII")


@unique
class Op(IntEnum):
    """What a message asks for. Answers carry the same op."""

    HELLO = 1
    """body {name, compat, session?}: open a session, or attach to a VM's. With attach: true, take over a VM that has outlived
    its client. With retire: true, a daemon listens no more, and ends with its last VM. Answer: body, with the server's version
    (protocol/version.py)."""
    MAP = 2
    """a = va, b = size, c = offset, d = prot, one descriptor: put a segment into the session's address space."""
    UNMAP = 3
    """a = va, b = size of a segment."""
    PASS_FILE = 4
    """a = the client's number for the one descriptor, for structs that carry fds (irqfd, ioeventfd)."""
    CLOSE_FILE = 5
    """a = number."""
    SHARE = 6
    """a = handle. The answer carries the descriptors that the client may map (mmap of the Linux fd)."""
    OUTLIVE = 7
    """a = 1: the VM goes on when its client dies, until another one of the same user attaches; 0: it ends then, as always.
    With a descriptor of a regular file and body {"while": [word, ...]}: it goes on if the file begins with one of them then."""
    KEEP = 8
    """a = key, one descriptor: hold it for who attaches, in place of an earlier one; without a descriptor: let go of it."""
    KEPT = 9
    """a = key. The answer carries the descriptor that KEEP left, if there is one."""
    VDSO = 10
    """The answer carries a file of machine code: the client's half of the doorbell (protocol/channel/vdso.py)."""
    HOT = 11
    """a = a VM's handle. Without a descriptor: the answer carries a memfd that says what code is hot, if any is. With one: what
    was hot on the host that ran the VM before; b = 1: the VM's memory is there now, and it is about to run."""


class Message(NamedTuple):
    """One packet. `errno` is 0 in requests and in answers that report success."""

    op: int
    seq: int
    errno: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    d: int = 0
    body: dict[str, Any] = {}


def encode(message: Message) -> bytes:
    """The packet. FrameError if the body is too long."""
    body = json.dumps(message.body).encode() if message.body else b""
    if _HEADER.size + len(body) > MAX_MESSAGE:
        raise FrameError("message too long")
    return (
        _HEADER.pack(
            MAGIC,
            VERSION,
            message.op,
            message.seq,
            message.errno,
            message.a & 0xFFFFFFFFFFFFFFFF,
            message.b & 0xFFFFFFFFFFFFFFFF,
            message.c & 0xFFFFFFFFFFFFFFFF,
            message.d & 0xFFFFFFFFFFFFFFFF,
            len(body),
            0,
        )
        + body
    )


def decode(packet: bytes) -> Message:
    """The record. FrameError says what does not fit."""
    if not _HEADER.size <= len(packet) <= MAX_MESSAGE:
        raise FrameError("packet too short or too long")
    magic, version, op, seq, errno, a, b, c, d, nbody, reserved = _HEADER.unpack_from(packet)
    if magic != MAGIC:
        raise FrameError("not a session message")
    if version != VERSION:
        raise FrameError(f"protocol version {version}, this side speaks {VERSION}", seq)
    if reserved or _HEADER.size + nbody != len(packet):
        raise FrameError("packet length does not match its header", seq)
    body: Any = {}
    if nbody:
        try:
            body = json.loads(packet[_HEADER.size :])
        except (ValueError, RecursionError) as error:
            raise FrameError("body is not JSON", seq) from error
        if not isinstance(body, dict):
            raise FrameError("body is not an object", seq)
    return Message(op, seq, errno, a, b, c, d, body)
