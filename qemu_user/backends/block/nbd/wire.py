"""The NBD protocol's bytes: newstyle negotiation and the two kinds of replies. Talks over a socket that is given to it.

What comes from a server is believed only within bounds; ProtocolError is the end of a connection.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from qemu_user.backends.block.views import Cutter, fill_zero

_HELLO, _OPTION, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_STARTTLS, _GO, _STRUCTURED, _SET_META = 5, 7, 8, 10
_ACK, _INFO, _META, _ERROR = 1, 3, 4, 1 << 31
_ALLOCATION = b"base:allocation"
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3
_REFUSALS = {
    1: "does not know an option that is needed (too old)", 2: "does not allow it", 3: "finds the request invalid",
    5: "wants TLS (nbds://)", 6: "has no such export", 7: "is shutting down", 8: "wants other block sizes",
}  # fmt: skip
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1, 2, 4, 8, 32, 64
"""Transmission flags."""
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
FUA, NO_HOLE = 1, 2
REQUEST = struct.Struct(">IHHQQI")
REQUEST_MAGIC, _SIMPLE, _CHUNK = 0x25609513, 0x67446698, 0x668E33EF
_DONE = 1
_NONE, _DATA, _HOLE, _STATUS = 0, 1, 2, 5
READS_ZERO = 2
"""Flag of an extent of base:allocation."""
_MOST_STATUS = 8 << 20
_KNOWN_ERRORS = {
    1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP, 108: errno.ESHUTDOWN,
}  # fmt: skip
_MOST_NEGOTIATED = 64 << 10


class ProtocolError(Exception):
    """The server does not speak NBD as it should, or refuses; the text completes "the NBD server ..."."""


class Export(NamedTuple):
    """What the server says of the disk."""

    size: int
    flags: int
    block: int
    """Bytes of which offsets and lengths have to be multiples."""
    most: int
    """Bytes of data in one request."""
    status: bool
    """Whether it can say what is allocated (BLOCK_STATUS, base:allocation)."""


Secure = Callable[[socket.socket], Any]
"""Makes of a socket one that speaks TLS. OSError."""


def receive(sock: Any, length: int) -> bytes:
    """Exactly `length` bytes. OSError, ConnectionError at the end of the stream."""
    data = bytearray(length)
    receive_into(sock, [memoryview(data)])
    return bytes(data)


def receive_into(sock: Any, views: list[memoryview]) -> None:
    """Fill `views`."""
    cutter, left = Cutter(views), sum(map(len, views))
    pieces = cutter.next(left)
    while left:
        done = sock.recvmsg_into(pieces[:1024])[0]
        if not done:
            raise ConnectionError("the NBD server has closed the connection")
        left -= done
        cutter = Cutter(pieces)
        cutter.next(done)
        pieces = cutter.next(left)


def send(sock: Any, views: list[memoryview]) -> None:
    """Send all of it."""
    left = sum(map(len, views))
    while left:
        done = sock.sendmsg(views[:1024])
        left -= done
        cutter = Cutter(views)
        cutter.next(done)
        views = cutter.next(left)


def negotiate(sock: Any, export: str, secure: Secure | None = None) -> tuple[Any, Export]:
    """Choose an export; structured replies where the server has them. Returns what the connection goes on over: `sock`, or what
    `secure` has made of it. ProtocolError, OSError.
    """
    magic, kind, flags = struct.unpack(">QQH", receive(sock, 18))
    if magic != _HELLO or kind != _OPTION:
        raise ProtocolError("does not speak NBD's newstyle negotiation")
    if not flags & _FIXED_NEWSTYLE:
        raise ProtocolError("is too old (no fixed newstyle)")
    sock.sendall(struct.pack(">I", _FIXED_NEWSTYLE | flags & _NO_ZEROES))
    if secure is not None:
        _ask(sock, _STARTTLS, b"")
        if _answer(sock, _STARTTLS)[0] != _ACK:
            raise ProtocolError("does not offer TLS")
        sock = secure(sock)
    _ask(sock, _STRUCTURED, b"")
    reply, _ = _answer(sock, _STRUCTURED)
    name = export.encode()
    status = reply == _ACK and _says_what_is_allocated(sock, name)
    _ask(sock, _GO, struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, _INFO_BLOCK_SIZE))
    size = transmission = -1
    block, most = 1, 32 << 20
    while True:
        reply, data = _answer(sock, _GO)
        if reply == _ACK:
            break
        if reply & _ERROR:
            said = data[:200].decode("utf-8", "replace").strip()
            why = _REFUSALS.get(reply & ~_ERROR, f"answers with error {reply & ~_ERROR}")
            raise ProtocolError(f"{why} (export {export!r}){': ' + repr(said) if said else ''}")
        if reply != _INFO or len(data) < 2:
            raise ProtocolError(f"answers with {reply}")
        (what,) = struct.unpack_from(">H", data)
        if what == _INFO_EXPORT and len(data) == 12:
            size, transmission = struct.unpack_from(">QH", data, 2)
        elif what == _INFO_BLOCK_SIZE and len(data) == 14:
            block, _, most = struct.unpack_from(">III", data, 2)
    if not 0 < size < 1 << 62:
        raise ProtocolError(f"has a disk of {max(size, 0)} bytes")
    if block > 512 or most < 64 << 10:
        raise ProtocolError(f"wants requests in blocks of {block} bytes, of at most {most}: not supported")
    return sock, Export(size, transmission if transmission & HAS_FLAGS else HAS_FLAGS, block, min(most, 32 << 20), status)


def _says_what_is_allocated(sock: Any, name: bytes) -> bool:
    _ask(sock, _SET_META, struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(_ALLOCATION)) + _ALLOCATION)
    known = False
    while True:
        reply, data = _answer(sock, _SET_META)
        if reply == _ACK:
            return known
        if reply & _ERROR:
            return False
        if reply != _META:
            raise ProtocolError(f"answers with {reply}")
        known |= data[4:] == _ALLOCATION  # the only context asked for, so its number need not be looked at


def _ask(sock: Any, option: int, data: bytes) -> None:
    sock.sendall(struct.pack(">QII", _OPTION, option, len(data)) + data)


def _answer(sock: Any, option: int) -> tuple[int, bytes]:
    magic, about, reply, length = struct.unpack(">QIII", receive(sock, 20))
    if magic != _REPLY or about != option or length > _MOST_NEGOTIATED:
        raise ProtocolError("answers with nonsense")
    return reply, receive(sock, length)


class Request:
    """One that waits for its reply. `error`: an errno once it is there, 0 for success."""

    __slots__ = ("error", "extents", "into", "length", "offset", "structured_left")

    def __init__(self, offset: int, length: int, into: list[memoryview] | None) -> None:
        self.offset, self.length, self.into = offset, length, into
        self.error = 0
        self.structured_left = length
        """Bytes of a read that have not come yet, as structured replies say."""
        self.extents: list[tuple[int, int]] | None = None
        """Of BLOCK_STATUS: (length, flags) of what follows one another from `offset` on."""


def read_reply(sock: Any, waiting: dict[int, Request]) -> int | None:
    """Take one message; the handle of the request that it completes, if it does. ProtocolError, OSError."""
    (magic,) = struct.unpack(">I", receive(sock, 4))
    if magic == _SIMPLE:
        error, handle = struct.unpack(">IQ", receive(sock, 12))
        request = _known(waiting, handle)
        request.error = _errno(error)
        if request.into is not None and not error:
            receive_into(sock, request.into)
        return int(handle)
    if magic != _CHUNK:
        raise ProtocolError("answers with nonsense")
    flags, kind, handle, length = struct.unpack(">HHQI", receive(sock, 16))
    request = _known(waiting, handle)
    _take_chunk(sock, request, kind, length)
    if not flags & _DONE:
        return None
    if request.into is not None and request.structured_left and not request.error:
        raise ProtocolError("has left out a part of what was read")
    return int(handle)


def _known(waiting: dict[int, Request], handle: int) -> Request:
    if handle not in waiting:
        raise ProtocolError("answers to what was not asked")
    return waiting[handle]


def _take_chunk(sock: Any, request: Request, kind: int, length: int) -> None:
    if kind == _NONE and not length:
        return
    if kind & 1 << 15:
        if not 6 <= length <= _MOST_NEGOTIATED:
            raise ProtocolError("answers with nonsense")
        request.error = request.error or _errno(struct.unpack_from(">I", receive(sock, length))[0]) or errno.EIO
        return
    if kind == _STATUS and request.extents is not None and 12 <= length <= _MOST_STATUS and length % 8 == 4:
        request.extents += struct.iter_unpack(">II", receive(sock, length)[4:])
        return
    if request.into is None or kind not in (_DATA, _HOLE) or length < (9 if kind == _DATA else 12):
        raise ProtocolError("answers with nonsense")
    (offset,) = struct.unpack(">Q", receive(sock, 8))
    count = length - 8 if kind == _DATA else struct.unpack(">I", receive(sock, 4))[0]
    start = offset - request.offset
    if not (start >= 0 and start + count <= request.length and count <= request.structured_left):
        raise ProtocolError("sends data beyond what was read")
    if kind == _HOLE and length != 12:
        raise ProtocolError("answers with nonsense")
    request.structured_left -= count
    cutter = Cutter(request.into)
    cutter.next(start)
    views = cutter.next(count)
    if kind == _DATA:
        receive_into(sock, views)
    else:
        fill_zero(views)


def _errno(error: int) -> int:
    return _KNOWN_ERRORS.get(error, errno.EIO) if error else 0


def text(error: int) -> str:
    """What an errno means."""
    return os.strerror(error)
