"""What a VM process and the translator say to each other: packets over a Unix SOCK_SEQPACKET socket.

Both sides import this; it knows no LLVM. Pages are 4096 bytes of guest code; a page's *identity* is a keyed digest
of them, the key being the host's secret (code_cache.py), so that no guest can make a page that passes for another one.
"""

from __future__ import annotations

import hashlib
import socket

import msgspec

from protocol.channel import fd_passing

PAGE = 4096
#: Pages that one request may hold: what fits a packet.
MAX_PAGES = 8
_MAX_PACKET = 128 << 10


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """Translator to VM, with the arena's descriptor: at the connection's start, and when it begins a new arena."""

    secret: bytes
    arena: int
    """Number of the arena; what was placed in an older one is void."""


class Known(msgspec.Struct, tag="known", array_like=True):
    """VM to translator: which regions of this page are there already? Answered by Regions."""

    page: int
    identity: bytes


class Translate(msgspec.Struct, tag="translate", array_like=True):
    """VM to translator: the code at `offset` of the first page is hot. Answered by Regions or Wanted.

    pages: (number relative to the first page, content); the first one has number 0.
    final: do with these pages, even if others are wanted.
    """

    page: int
    offset: int
    pages: list[tuple[int, bytes]]
    final: bool = False


class Regions(msgspec.Struct, tag="regions", array_like=True):
    """Translator to VM: regions of a page, as (offset of the head in the page, offset of the code in the arena).

    offset: what Translate asked for (it is done, even if there is no region), -1 after Known.
    """

    page: int
    identity: bytes
    arena: int
    offset: int
    regions: list[tuple[int, int]]


class Wanted(msgspec.Struct, tag="wanted", array_like=True):
    """Translator to VM: the region would go on in these pages: send them as well, as many as are mapped."""

    page: int
    offset: int
    numbers: list[int]


Message = Hello | Known | Translate | Regions | Wanted
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class BadMessage(Exception):
    """Not one of our packets."""


def identity_of(secret: bytes, content: bytes) -> bytes:
    """A page's identity, 16 bytes; the first 8 are what regions compare (machine_state.PAGE_IDENTITY)."""
    return hashlib.blake2b(content, digest_size=16, key=secret).digest()


def mark_of(identity: bytes) -> int:
    """The word of an identity that a decoded page carries; never 0."""
    return int.from_bytes(identity[:8], "little") or 1


def send(sock: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """One packet; never blocks. BlockingIOError when the other side does not read."""
    fd_passing.send(sock, _encoder.encode(message), fds, block=False)


def receive(sock: socket.socket) -> tuple[Message | None, list[int]]:
    """One packet, without waiting: None at the end of the stream. BlockingIOError: nothing there. BadMessage."""
    data, fds = fd_passing.receive(sock, _MAX_PACKET, block=False)
    if not data:
        return None, fds
    try:
        return _decoder.decode(data), fds
    except msgspec.DecodeError as error:
        fd_passing.close_all(fds)
        raise BadMessage(str(error)) from error


