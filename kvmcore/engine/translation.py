"""What a VM process and the translator say to each other: packets over a Unix SOCK_SEQPACKET socket.

Both sides import this; it knows no LLVM. Pages are 4096 bytes of guest code; a page's *identity* is a keyed digest
of them, the key being the host's secret (code_cache.py), so that no guest can make a page that passes for another one.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct

import msgspec

from protocol.channel import fd_passing

PAGE = 4096
#: Of the index that comes with Hello: identity of the page, offset of the head in it, offset of the code in the arena.
ENTRY = struct.Struct("<16sHxxI")
#: Instead of the offset of a head: template code of the page, at its list of heads in that memory.
TEMPLATES = 0xFFFF
#: Bytes of Wishes at most, and heads in them.
MAX_WISHES, MAX_LATER = 16 << 20, 1024
#: Wishes of all VMs that may wait.
MAX_WAITING = 4096
MAX_PAGES_ELSEWHERE = 4096
#: Pages that one request may hold: what fits a packet.
MAX_PAGES = 8
MAX_ASSEMBLED = 24
#: Pages of one Known.
MAX_KNOWN = 1024
WANTED = PAGE // 16
_MAX_PACKET = 128 << 10


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """Translator to VM, at the connection's start, and when it begins a new arena. With three descriptors: of the memory for
    template code, of the arena for regions, and of a memfd with what is in them already (ENTRY, one after the other)."""

    secret: bytes
    arena: int
    """Number of the arena; what was placed in an older one is void."""
    templates: int
    """The same of the memory for template code."""


class Known(msgspec.Struct, tag="known", array_like=True):
    """VM to translator: which regions of these pages, (page, identity), are there already? Answered by Regions for each that
    has some, then by Answered."""

    pages: list[tuple[int, bytes]]


class Translate(msgspec.Struct, tag="translate", array_like=True):
    """VM to translator: the code at `offset` of the first page is hot. Answered by Regions or Wanted.

    pages: (number relative to the first page, content); the first one has number 0.
    final: do with these pages, even if others are wanted.
    """

    page: int
    offset: int
    pages: list[tuple[int, bytes]]
    final: bool = False


class Used(msgspec.Struct, tag="used", array_like=True):
    """VM to translator: it has installed regions of these pages. The cache keeps what is used."""

    identities: list[bytes]


class Later(msgspec.Struct, tag="later", array_like=True):
    """VM to translator, with the descriptor of a memfd that holds Wishes: what was seen, but not hot enough to ask for.
    Translated when nothing else is to do, for VMs to come. Not answered."""


class Wishes(msgspec.Struct, array_like=True):
    """Of a Later. Pages that may go on in one another have one space and numbers that count pages.

    pages: (space, number, content); heads: (index of its page, offset), the hottest first.
    """

    pages: list[tuple[int, int, bytes]]
    heads: list[tuple[int, int]]


class Elsewhere(msgspec.Struct, array_like=True):
    """What the VM process of another host is told about code of a VM that moves there. `pages`: guest-physical addresses of
    those in use; `wishes`: encoded Wishes, or nothing."""

    pages: list[int]
    wishes: bytes


class Totals(msgspec.Struct, array_like=True, frozen=True):
    """What the host's translator has done for all VMs since it was started, and has to do."""

    regions: int = 0
    nanoseconds: int = 0
    """Of compiling them."""
    waiting: int = 0
    """Regions that somebody has asked for or wished for."""
    arena: int = 0
    """Bytes of the arena that are taken."""
    templates: int = 0
    """Bytes of template code."""


class Assemble(msgspec.Struct, tag="assemble", array_like=True):
    """VM to translator: code of these pages was seen in the interpreter. Answered by Assembled.

    pages: (page, content, which of its halfwords begin instructions that have been executed: WANTED bytes, a bit each).
    """

    pages: list[tuple[int, bytes, bytes]]


class Assembled(msgspec.Struct, tag="assembled", array_like=True):
    """Translator to VM: template code of pages, as (page, identity, place of its list of heads)."""

    templates: int
    pages: list[tuple[int, bytes, int]]
    host: Totals = Totals()


class Regions(msgspec.Struct, tag="regions", array_like=True):
    """Translator to VM: regions of a page, as (offset of the head in the page, offset of the code in the arena).

    offset: what Translate asked for (it is done, even if there is no region), -1 after Known (if there are any). took:
    nanoseconds of CPU time for it; 0: it was there.
    """

    page: int
    identity: bytes
    arena: int
    offset: int
    regions: list[tuple[int, int]]
    took: int = 0
    host: Totals = Totals()


class Answered(msgspec.Struct, tag="answered", array_like=True):
    """Translator to VM: all that there is to say to a Known."""

    host: Totals = Totals()


class Wanted(msgspec.Struct, tag="wanted", array_like=True):
    """Translator to VM: the region would go on in these pages: send them as well, as many as are mapped."""

    page: int
    offset: int
    numbers: list[int]


Message = Hello | Known | Translate | Assemble | Assembled | Used | Later | Regions | Answered | Wanted
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class BadMessage(ValueError):
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


def in_memory(name: str, content: bytes) -> int:
    """A memfd with this content; the caller closes it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    return fd


def encode_wishes(wishes: Wishes) -> bytes:
    """What the memfd of a Later holds."""
    return _encoder.encode(wishes)


def encode_elsewhere(elsewhere: Elsewhere) -> bytes:
    """What travels with the VM."""
    return _encoder.encode(elsewhere)


def decode_elsewhere(data: bytes) -> Elsewhere:
    """The other way. BadMessage."""
    try:
        elsewhere = msgspec.msgpack.decode(data, type=Elsewhere)
    except msgspec.DecodeError as error:
        raise BadMessage(str(error)) from error
    if len(elsewhere.pages) > MAX_PAGES_ELSEWHERE or any(not 0 <= gpa < 1 << 64 for gpa in elsewhere.pages):
        raise BadMessage("pages that there cannot be")
    return elsewhere


def decode_wishes(fd: int) -> Wishes:
    """The other way. BadMessage."""
    try:
        if os.fstat(fd).st_size > MAX_WISHES:
            raise BadMessage("too many wishes")
        wishes = msgspec.msgpack.decode(os.pread(fd, MAX_WISHES, 0), type=Wishes)
    except (OSError, msgspec.DecodeError) as error:
        raise BadMessage(str(error)) from error
    sound = (
        len(wishes.heads) <= MAX_LATER
        and all(len(content) == PAGE for _, _, content in wishes.pages)
        and all(0 <= page < len(wishes.pages) and 0 <= at < PAGE and at % 2 == 0 for page, at in wishes.heads)
    )
    if not sound:
        raise BadMessage("wishes that cannot be")
    return wishes
