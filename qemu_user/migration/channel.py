"""Frames between the two ends of a migration: over a Unix stream socket on one machine, over ZeroMQ with CURVE keys between
machines. Both carry the same frames; who uses one does not know which it is.

    frame   magic "SKVM", u8 kind, u8 0, u16 0, u32 length of payload, u32 sequence number, u64 a, u64 b,
            u32 CRC-32 of the header before it; payload

The sequence number shows what a reconnect of ZeroMQ would hide: a frame lost or repeated ends the channel. What a and b
mean is the kind's business (messages.py). Everything that comes in is hostile: ChannelError, and nothing else.
"""

from __future__ import annotations

import math
import os
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.channel import zmq_socket

MAGIC = b"SKVM"
HEADER = struct.Struct("<4sBBHIIQQI")
MAX_PAYLOAD = 64 << 20
CHUNK = 512 << 10
"""Bytes of payload that fit one ZeroMQ message with its header (zmq_socket.MAX_MESSAGE)."""
_BLOCK = 256 << 10
"""Bytes that go to a file at once: few enough to stay in a processor's cache."""
_LOOK_SECONDS = 0.2
_MOST_FDS = 16
"""That come with a frame: a guest's memory, other connections."""
STALL_SECONDS = 20.0
"""A peer that takes nothing for so long is given up."""


Payload = bytes | memoryview | list[bytes | memoryview]
"""A list: its parts, one behind the other."""
_MOST_PARTS = 512
"""Of one system call (IOV_MAX is 1024)."""


class ChannelError(Exception):
    """The connection is gone, or the other end does not speak this protocol."""


class Frame(NamedTuple):
    """A frame's header. Its payload is to be taken with read() or read_into() before the next receive()."""

    kind: int
    a: int
    b: int
    length: int


class Channel(Protocol):
    """`look` is called every now and then while it waits, and may raise."""

    look: Callable[[], None]
    fds: list[int]
    """Descriptors that came with frames, ours to close."""

    def send(self, kind: int, a: int = 0, b: int = 0, payload: Payload = b"", fds: list[int] | None = None) -> int:
        """Send a frame; bytes sent. ChannelError."""

    def receive(self, seconds: float | None) -> Frame | None:
        """The next frame; None when none came in time. ChannelError."""

    def read(self) -> bytes:
        """The payload of the frame just received. ChannelError."""

    def read_part(self, size: int) -> bytes:
        """The next `size` bytes of it. ChannelError: it has not so many."""

    def read_into(self, *views: memoryview) -> None:
        """The rest of it, into memory of just that length."""

    def read_to(self, fd: int, spans: list[tuple[int, int]]) -> None:
        """The rest of it, to (offset, length) of a file: for memory that is not there yet, which is not zeroed and mapped first
        then. ChannelError, OSError."""

    def cut(self) -> None:
        """End the connection as if the network had."""

    def close(self) -> None:
        """Idempotent."""


def _size(payload: Payload) -> int:
    return sum(map(len, payload)) if isinstance(payload, list) else len(payload)


def _pack(kind: int, sequence: int, a: int, b: int, length: int) -> bytes:
    head = HEADER.pack(MAGIC, kind, 0, 0, length, sequence & 0xFFFFFFFF, a, b, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head))


def _unpack(data: bytes | memoryview, sequence: int) -> Frame:
    magic, kind, reserved, more, length, number, a, b, crc = HEADER.unpack(data)
    if magic != MAGIC or reserved or more or zlib.crc32(bytes(data[:-4])) != crc:
        raise ChannelError("the other end does not speak softkvm's migration protocol")
    if number != sequence & 0xFFFFFFFF:
        raise ChannelError(f"frame {number} where {sequence} was due: some were lost")
    if length > MAX_PAYLOAD:
        raise ChannelError(f"a frame of {length} bytes")
    return Frame(kind, a, b, length)


def _check_spans(size: int, spans: list[tuple[int, int]]) -> None:
    due = sum(length for _, length in spans)
    if due != size:
        raise ChannelError(f"a payload of {size} bytes where {due} were due")


def _write(fd: int, data: memoryview, offset: int) -> None:
    """All of it."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


class Patience:
    """What is left of so many seconds (None: no limit) of waiting; they count while we run: who was frozen, by a control group
    or SIGSTOP, perhaps together with the other end, has not waited meanwhile. To be asked every _LOOK_SECONDS."""

    def __init__(self, seconds: float | None) -> None:
        self._left = math.inf if seconds is None else seconds
        self._asked = time.monotonic()

    def left(self) -> float:
        """0: it is over."""
        now = time.monotonic()
        self._left = max(0.0, self._left - min(now - self._asked, 2 * _LOOK_SECONDS))
        self._asked = now
        return self._left


class StreamChannel:
    """Over a connected Unix stream socket, which it owns."""

    def __init__(self, sock: socket.socket) -> None:
        self.fds: list[int] = []
        self.look: Callable[[], None] = lambda: None
        self._block = memoryview(b"")
        self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        self._socket = sock
        self._sent = self._received = 0
        self._unread = 0
        self._broken = False

    def renew(self, sock: socket.socket) -> None:
        """The same channel over another connection, from its first frame on."""
        self._socket.close()
        self._take(sock)

    def send(self, kind: int, a: int = 0, b: int = 0, payload: Payload = b"", fds: list[int] | None = None) -> int:
        size = _size(payload)
        parts: list[bytes | memoryview] = [_pack(kind, self._sent, a, b, size)]
        if isinstance(payload, list):
            parts += payload
        elif payload:
            parts.append(payload)
        self._sent += 1
        try:
            if fds:
                self._wait(select.POLLOUT, STALL_SECONDS)
                done = socket.send_fds(self._socket, [bytes(parts[0])], fds)
                parts[0] = bytes(parts[0])[done:]
            self._write(parts)
        except OSError as error:
            raise ChannelError(f"the connection is gone: {error.strerror or error}") from error
        return HEADER.size + size

    def _write(self, parts: list[bytes | memoryview]) -> None:
        at = 0
        while at < len(parts):
            try:
                done = self._socket.sendmsg(parts[at : at + _MOST_PARTS], [], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, STALL_SECONDS):
                    raise ChannelError(f"the other end takes nothing for {STALL_SECONDS:g} s") from None
                continue
            while at < len(parts) and done >= len(parts[at]):
                done -= len(parts[at])
                at += 1
            if done:
                parts[at] = memoryview(parts[at])[done:]

    def receive(self, seconds: float | None) -> Frame | None:
        if self._unread:
            raise ChannelError("a payload was left unread")
        if not self._wait(select.POLLIN, seconds):
            return None
        if self._broken:  # what has arrived before the cut would still be read
            raise ChannelError("the connection is gone: it was cut here")
        data = b""
        while len(data) < HEADER.size:
            try:
                part, fds, flags, _ = socket.recv_fds(self._socket, HEADER.size - len(data), _MOST_FDS)
            except BlockingIOError:
                self._wait(select.POLLIN, None)
                continue
            except OSError as error:
                raise ChannelError(f"the connection is gone: {error.strerror}") from error
            self.fds += fds
            if not part or flags & socket.MSG_CTRUNC:
                raise ChannelError("the other end has hung up")
            data += part
        frame = _unpack(data, self._received)
        self._received += 1
        self._unread = frame.length
        return frame

    def read(self) -> bytes:
        return self.read_part(self._unread)

    def read_part(self, size: int) -> bytes:
        if size > self._unread:
            raise ChannelError(f"a payload of {self._unread} bytes where {size} were due")
        data = bytearray(size)
        if size:
            self._fill([memoryview(data)])
        return bytes(data)

    def read_into(self, *views: memoryview) -> None:
        if sum(map(len, views)) != self._unread:
            raise ChannelError(f"a payload of {self._unread} bytes where {sum(map(len, views))} were due")
        self._fill([view for view in views if view])

    def read_to(self, fd: int, spans: list[tuple[int, int]]) -> None:
        _check_spans(self._unread, spans)
        if not self._block:
            self._block = memoryview(bytearray(_BLOCK))
        for offset, length in spans:
            while length:
                part = self._block[: min(length, _BLOCK)]
                self._fill([part])
                _write(fd, part, offset)
                offset, length = offset + len(part), length - len(part)

    def _fill(self, views: list[memoryview]) -> None:
        at = 0
        while at < len(views):
            try:
                done = self._socket.recvmsg_into(views[at : at + _MOST_PARTS])[0]
            except BlockingIOError:
                self._wait(select.POLLIN, None)
                continue
            except OSError as error:
                raise ChannelError(f"the connection is gone: {error.strerror}") from error
            if not done:
                raise ChannelError("the other end has hung up")
            self._unread -= done
            while at < len(views) and done >= len(views[at]):
                done -= len(views[at])
                at += 1
            if done:
                views[at] = views[at][done:]

    def _wait(self, events: int, seconds: float | None) -> bool:
        """Until the socket is ready; False when it is not in time."""
        poll = select.poll()
        poll.register(self._socket, events)
        patience = Patience(seconds)
        while True:
            left = min(_LOOK_SECONDS, patience.left())
            if poll.poll(left * 1000):
                return True
            self.look()
            if not patience.left():
                return False

    def cut(self) -> None:
        self._broken = True
        self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class ZmqChannel:
    """Over a DEALER (who calls) or a ROUTER (who is called), which it owns. One peer: for a ROUTER the one that speaks
    first, by its CURVE key."""

    def __init__(self, sock: zmq.Socket[bytes], is_router: bool) -> None:
        self._socket, self._is_router = sock, is_router
        self._monitor = sock.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._identity = b""
        self._key = ""
        self._sent = self._received = 0
        self._payload: memoryview = memoryview(b"")
        self._broken = False
        self.fds: list[int] = []
        self.look: Callable[[], None] = lambda: None
        self.redial: Callable[[], Channel] | None = None
        """Makes another connection to the same process, for who has called it."""
        self.beside: Callable[[int], Channel] | None = None
        """Makes one to another port of it."""
        self.called_at: tuple[str, str, str] = ("", "", "")
        """A ROUTER's address, its public key, its peer's: for who listens there when we have died."""
        self.called: tuple[str, str, str] = ("", "", "")
        """A DEALER's peer's address, our public key, his: for who goes on when we have died."""
        self.held: object = None
        """What has to live as long as the channel: the authenticator of a ROUTER."""

    def renew(self) -> None:
        """A ROUTER hears the next one who speaks, from his first frame on."""
        if not self._is_router or self._socket.closed:
            raise ChannelError("the connection is gone")
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
        self._identity, self._sent, self._received = b"", 0, 0
        self._payload = memoryview(b"")
        self._broken = False

    def send(self, kind: int, a: int = 0, b: int = 0, payload: Payload = b"", fds: list[int] | None = None) -> int:
        if fds:
            raise ChannelError("descriptors do not travel between machines")
        if isinstance(payload, list):
            payload = b"".join(payload)
        head = _pack(kind, self._sent, a, b, len(payload))
        self._sent += 1
        total = HEADER.size + len(payload)
        if total <= zmq_socket.MAX_MESSAGE:
            self._put(b"".join((head, payload)))
        else:  # states of many CPUs: a frame may spread over messages
            self._put(head)
            for at in range(0, len(payload), CHUNK):
                self._put(bytes(payload[at : at + CHUNK]))
        return total

    def _put(self, message: bytes) -> None:
        patience = Patience(STALL_SECONDS)
        while True:
            if self._has_ended():
                raise ChannelError("the connection is gone")
            try:
                if self._is_router:
                    self._socket.send_multipart((self._identity, message), zmq.NOBLOCK)
                else:
                    self._socket.send(message, zmq.NOBLOCK)
                return
            except zmq.Again:
                if not patience.left():
                    raise ChannelError(f"the other end takes nothing for {STALL_SECONDS:g} s") from None
                self._socket.poll(int(_LOOK_SECONDS * 1000), zmq.POLLOUT)
                self.look()
            except zmq.ZMQError as error:
                raise ChannelError(f"the connection is gone: {error}") from error

    def receive(self, seconds: float | None) -> Frame | None:
        if self._payload:
            raise ChannelError("a payload was left unread")
        message = self._get(seconds)
        if message is None:
            return None
        if len(message) < HEADER.size:
            raise ChannelError("the other end does not speak softkvm's migration protocol")
        frame = _unpack(message[: HEADER.size], self._received)
        self._received += 1
        rest = message[HEADER.size :]
        if not rest and frame.length:
            parts = bytearray()
            while len(parts) < frame.length:
                part = self._get(STALL_SECONDS)
                if part is None:
                    raise ChannelError("half a frame")
                parts += part
            rest = memoryview(parts)
        if len(rest) != frame.length:
            raise ChannelError(f"a payload of {len(rest)} bytes where {frame.length} were announced")
        self._payload = rest
        return frame

    def _get(self, seconds: float | None) -> memoryview | None:
        patience = Patience(seconds)
        while True:
            ended = self._has_ended()  # asked first: what came before its end is read
            try:
                if not self._is_router:
                    return memoryview(self._socket.recv(zmq.NOBLOCK, copy=False).buffer)
                received = zmq_socket.receive_from(self._socket)
                if received is not None and self._is_ours(*received):
                    return memoryview(received[1].buffer)
                continue
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                raise ChannelError(f"the connection is gone: {error}") from error
            if ended:
                raise ChannelError("the connection is gone")
            left = min(_LOOK_SECONDS, patience.left())
            if not self._socket.poll(int(left * 1000)):
                self.look()
                if not patience.left():
                    return None

    def _is_ours(self, identity: zmq.Frame, frame: zmq.Frame) -> bool:
        """The first who speaks is the peer; others are not heard. After renew() he has the same key."""
        if not self._identity:
            key = zmq_socket.peer_key(frame)
            if self._key not in ("", key):
                return False
            self._identity, self._key = identity.bytes, key
        return identity.bytes == self._identity

    def _has_ended(self) -> bool:
        while not self._broken and self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            self._broken = True
        return self._broken

    def read(self) -> bytes:
        return self.read_part(len(self._payload))

    def read_part(self, size: int) -> bytes:
        if size > len(self._payload):
            raise ChannelError(f"a payload of {len(self._payload)} bytes where {size} were due")
        part, self._payload = self._payload[:size], self._payload[size:]
        return bytes(part)

    def read_into(self, *views: memoryview) -> None:
        if sum(map(len, views)) != len(self._payload):
            raise ChannelError(f"a payload of {len(self._payload)} bytes where {sum(map(len, views))} were due")
        for view in views:
            view[:] = self._payload[: len(view)]
            self._payload = self._payload[len(view) :]

    def read_to(self, fd: int, spans: list[tuple[int, int]]) -> None:
        _check_spans(len(self._payload), spans)
        for offset, length in spans:
            _write(fd, self._payload[:length], offset)
            self._payload = self._payload[length:]

    def cut(self) -> None:
        self._broken = True
        self.close()

    def close(self) -> None:
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._socket.close(linger=1000)
