"""Other switches, on other hosts: trunks over ZeroMQ, with CURVE keys on tcp (protocol/channel/keys.py).

    message   u8 kind, payload
    HELLO     JSON, every HELLO_SECONDS from both ends: who is there; a link that hears none for long is down
    FRAMES    framed frames (port.py) with virtio-net headers, tagged as the link's settings say

What does not fit ZeroMQ's bounded queues is dropped and counted. A switch that is reached already is not linked a second
time: there is no spanning tree.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import msgspec
import zmq

from protocol.channel import zmq_socket
from protocol.channel.zmq_socket import Curve
from protocol.codec.ethernet_stream import StreamError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.switch.port import LENGTH, Piece, Port, split
from qemu_user.switch.settings import PortSettings

HELLO, FRAMES = b"\0", b"\1"
HELLO_SECONDS = 2.0
DEAD_SECONDS = 7.0
_DIAL_SECONDS, _DIAL_AGAIN_SECONDS = 0.25, 3.0
_MESSAGE = 512 << 10
"""Bytes of frames in a message; zmq_socket.MAX_MESSAGE is twice that."""
_TURN = 32
"""Messages that are read before others have their turn."""
Known = Callable[[str, Port], bool]
"""Whether a switch (its id) is reached by another port already, or is ourselves."""


class LinkHello(msgspec.Struct, frozen=True, kw_only=True):
    """`switch`: an id that no two running switches share."""

    version: int = 1
    switch: str
    name: str


class LinkPort(Port):
    """One other switch. `send`: hands a message over, False when it cannot be sent now."""

    kind = "link"
    header = True
    is_link = True

    def __init__(
        self, name: str, settings: PortSettings, loop: IoLoop, peer: str, known: Known, send: Callable[[bytes], bool]
    ) -> None:
        super().__init__(name, settings, loop)
        self._peer, self._known, self._send = peer, known, send
        self.switch = ""
        """Id of the switch at the other end."""
        self.heard = 0.0
        self.refused = ""
        """Why the link stays down."""

    @property
    def peer(self) -> str:
        return f"{self._peer} ({self.refused})" if self.refused else self._peer

    def message(self, data: memoryview) -> None:
        """From the other end."""
        kind = bytes(data[:1])
        if kind == HELLO:
            self._hello(bytes(data[1:]))
        elif kind == FRAMES and self._paused:
            self.rx_refused += 1  # nobody there can be made to wait: a message that is too much is lost
        elif kind == FRAMES and self.is_up:
            try:
                done = self.forward(self, data, 1, len(data))
            except StreamError:
                done = -1
            if done != len(data):
                self.rx_broken += 1
            self.came(len(data))

    def _hello(self, data: bytes) -> None:
        try:
            hello = msgspec.json.decode(data, type=LinkHello)
        except msgspec.MsgspecError:
            self.rx_broken += 1
            return
        self.heard = time.monotonic()
        if hello.version != 1:
            self.refused = f"it speaks version {hello.version}"
        elif not self.is_up and self._known(hello.switch, self):
            self.refused = "reached already, or this switch itself"
        else:
            self.refused, self.switch = "", hello.switch
            if not self.is_up:
                self.is_up = True
                self.changed(self)

    def check(self) -> bool:
        """Whether it is alive; takes it down when nothing was heard for long."""
        alive = time.monotonic() - self.heard < DEAD_SECONDS
        if self.is_up and not alive:
            self.lost()
        return alive

    def lost(self) -> None:
        """The other end is gone, for now."""
        if self.is_up:
            self.is_up = False
            self.changed(self)

    def _emit(self, pieces: Sequence[Piece]) -> bytes:
        if sum(map(len, pieces)) <= _MESSAGE:
            self._hand_over(pieces)
            return b""
        part: list[Piece] = []
        length = 0
        for frame in split(pieces):
            size = sum(map(len, frame))
            if length + size > _MESSAGE:
                self._hand_over(part)
                part, length = [], 0
            part += [LENGTH.pack(size), *frame]
            length += 4 + size
        self._hand_over(part)
        return b""

    def _hand_over(self, pieces: Sequence[Piece]) -> None:
        if pieces and not self._send(b"".join((FRAMES, *pieces))):
            for frame in split(pieces):
                self.tx_dropped += 1
                self.tx_dropped_bytes += sum(map(len, frame))


class _Socket:
    """A ZeroMQ socket on the I/O loop: its descriptor tells only that something may have changed."""

    def __init__(self, sock: zmq.Socket[bytes], loop: IoLoop) -> None:
        self.socket, self._loop = sock, loop
        self._fd = int(sock.getsockopt(zmq.FD))
        loop.add_reader(self._fd, self._events)
        loop.call_soon(self._events)

    def receive(self) -> None:
        """One message; zmq.Again when there is none."""
        raise NotImplementedError

    def _events(self) -> None:
        if self.socket.closed:
            return
        try:
            for _ in range(_TURN):
                if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                    return
                self.receive()
        except zmq.Again:
            return
        self._loop.call_soon(self._events)

    def sent(self) -> None:
        """After a send: it may have swallowed the news of something to read."""
        if int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._events)

    def close(self) -> None:
        if not self.socket.closed:
            self._loop.remove(self._fd)
            self.socket.close()


class Dialled(_Socket):
    """A switch that we call. `key`: ours, with the other's public one; None on ipc."""

    def __init__(
        self, uri: str, key: Curve | None, name: str, settings: PortSettings, loop: IoLoop, known: Known, hello: bytes
    ) -> None:
        self._context = zmq_socket.context()
        self._hello, self._uri, self._key = hello, uri, key
        self._dialled = time.monotonic()
        super().__init__(zmq_socket.dealer(self._context, uri, key), loop)
        self.port = LinkPort(name, settings, loop, uri, known, self._send)
        self._tick()

    def _tick(self) -> None:
        if self.socket.closed:
            return
        alive = self.port.check()
        now = time.monotonic()
        if not alive and not zmq_socket.is_tcp(self._uri) and now - self._dialled > _DIAL_AGAIN_SECONDS:
            # On ipc a socket does not connect again by itself.
            super().close()
            _Socket.__init__(self, zmq_socket.dealer(self._context, self._uri, self._key), self._loop)
            self._dialled = now
        self._send(HELLO + self._hello)
        self._loop.call_later(HELLO_SECONDS if alive else _DIAL_SECONDS, self._tick)

    def _send(self, message: bytes) -> bool:
        try:
            self.socket.send(message, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        self.sent()
        return True

    def receive(self) -> None:
        self.port.message(memoryview(self.socket.recv(zmq.NOBLOCK, copy=False).buffer))

    def close(self) -> None:
        self.port.close()
        super().close()
        self._context.term()


class Callers(_Socket):
    """Switches that call us. `names`: CURVE keys to what their links are called; `added`, `removed`: ports come and go."""

    def __init__(
        self,
        sock: zmq.Socket[bytes],
        names: dict[str, str],
        settings: PortSettings,
        loop: IoLoop,
        known: Known,
        hello: bytes,
        added: Callable[[Port], None],
        removed: Callable[[Port], None],
    ) -> None:
        self._names, self._settings, self._known, self._hello = names, settings, known, hello
        self._added, self._removed = added, removed
        self._ports: dict[bytes, LinkPort] = {}
        super().__init__(sock, loop)
        self.listen = zmq_socket.bound_to(sock)
        self._tick()

    def _tick(self) -> None:
        if self.socket.closed:
            return
        for identity, port in tuple(self._ports.items()):
            if port.check():
                self._send(identity, HELLO + self._hello)
            else:
                self._forget(identity)
        self._loop.call_later(HELLO_SECONDS, self._tick)

    def _forget(self, identity: bytes) -> None:
        port = self._ports.pop(identity, None)
        if port is not None:
            port.close()
            self._removed(port)

    def _send(self, identity: bytes, message: bytes) -> bool:
        sent = zmq_socket.send_to(self.socket, identity, message)
        self.sent()
        return sent

    def receive(self) -> None:
        received = zmq_socket.receive_from(self.socket)
        if received is None:
            return
        frame, payload = received
        identity, data = frame.bytes, memoryview(payload.buffer)
        port = self._ports.get(identity)
        if port is None:
            if bytes(data[:1]) != HELLO or len(self._ports) >= 256:
                return
            name = self._names.get(zmq_socket.peer_key(payload), "switch")
            port = LinkPort(
                f"link-{name}", self._settings, self._loop, name, self._replacing, lambda message: self._send(identity, message)
            )
            self._ports[identity] = port
            self._added(port)
        before = port.switch
        port.message(data)
        if port.switch != before:
            self._send(identity, HELLO + self._hello)

    def _replacing(self, switch: str, port: Port) -> bool:
        """Whether a switch is known by another port; one of ours that has gone quiet makes way: it calls again."""
        for identity, other in tuple(self._ports.items()):
            if other is not port and other.switch == switch and time.monotonic() - other.heard > 1.5 * HELLO_SECONDS:
                self._forget(identity)
        return self._known(switch, port)

    def close(self) -> None:
        for identity in tuple(self._ports):
            with contextlib.suppress(zmq.ZMQError):
                self._forget(identity)
        super().close()
