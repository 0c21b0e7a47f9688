"""The socket device (virtio 1.2, section 5.10): stream connections between the guest and Unix sockets of the host.

Each connection has credit in both directions (5.10.6.3): the guest may send what our buffer takes, we read of a socket
only what the guest's takes, and only when it has given receive buffers. Answers that find no receive buffer wait; while
many do, the transmit queue rests.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque
from typing import Any, Literal, NamedTuple

from qemu_user.backends.vsock.unix import UnixVsock
from qemu_user.devices.device import require
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import Chain, QueueError, split

F_STREAM = 1
RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE, EVENT_QUEUE_SIZE = 128, 16
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
"""Operations (5.10.6)."""
STREAM = 1
NO_RECEIVE, NO_SEND = 1, 2
"""Flags of SHUTDOWN: what its sender will not do any more."""
TRANSPORT_RESET = 0
HOST_CID = 2
BUFFER = 256 * 1024
"""Bytes of a connection that wait for the host's socket: our credit for the guest."""
PACKETS_PER_TURN = 32
MAX_CONNECTIONS = 512
MAX_ANSWERS = 256
FIRST_HOST_PORT = 1 << 30


class Header(NamedTuple):
    """struct virtio_vsock_hdr."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    kind: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = _HEADER.size


class VsockState(VirtioState, frozen=True, tag="vsock", kw_only=True):
    """Connections do not move: the driver is told (5.10.6.7)."""

    version: Literal[1] = 1
    cid: int


class _Connection:
    """Ports, the host's socket, credit both ways."""

    def __init__(self, guest_port: int, host_port: int, sock: socket.socket) -> None:
        self.guest_port, self.host_port, self.sock = guest_port, host_port, sock
        self.established = False
        self.greet = False
        """Whether the host's client waits for "OK port"."""
        self.outbox: deque[bytes] = deque()
        self.waiting = 0
        """Bytes in the outbox."""
        self.forwarded = self.told = 0
        """Bytes that the host has taken, and as many as the guest knows of."""
        self.sent = self.peer_alloc = self.peer_forwarded = 0
        self.guest_done = 0
        """SHUTDOWN flags of the guest."""
        self.host_ended = False

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for."""
        return max(0, self.peer_alloc - (self.sent - self.peer_forwarded & 0xFFFFFFFF))


class VirtioVsock(VirtioDevice):
    """`cid`: the guest's address, from 3 on."""

    device_id = 19
    pci_class = 0x078000
    State = VsockState

    def __init__(self, name: str, cid: int, host: UnixVsock) -> None:
        super().__init__(name, F_STREAM, [QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE])
        self._cid, self._host = cid, host
        self._connections: dict[tuple[int, int], _Connection] = {}
        self._by_socket: dict[socket.socket, _Connection] = {}
        self._answers: deque[bytes] = deque()
        self._hungry: deque[_Connection] = deque()
        """Connections with something to read, while the guest has no receive buffers."""
        self._next_port = FIRST_HOST_PORT
        self._moved = False
        host.frontend = self

    def config(self) -> bytes:
        return self._cid.to_bytes(8, "little")

    def on_queue(self, index: int) -> None:
        if index == TX:
            self._transmit()
        elif index == RX:
            self._receive()
            self._transmit()
        elif index == EVENT:
            self._tell_moved()

    # -- from the guest ----------------------------------------------------------------------------

    def _transmit(self) -> None:
        queue = self.queues[TX]
        queue.suppress_kicks()
        for _ in range(queue.size):
            if len(self._answers) >= MAX_ANSWERS:
                break  # 5.10.6.1: go on when the driver has taken some
            chain = queue.pop()
            if chain is None:
                break
            self._packet(chain)
            queue.push(chain, 0)
        if queue.allow_kicks() and len(self._answers) < MAX_ANSWERS:
            self.transport.serve_later(TX)
        self.transport.notify_used(queue)
        self._flush_answers()

    def _packet(self, chain: Chain) -> None:
        if chain.readable_bytes < HEADER_SIZE:
            raise QueueError("virtio-vsock: a packet shorter than its header")
        raw, rest = split(chain.readable, HEADER_SIZE)
        header = Header(*_HEADER.unpack(b"".join(raw)))
        if header.length > sum(map(len, rest)):
            raise QueueError("virtio-vsock: a packet shorter than its header says")
        if header.src_cid != self._cid:
            self.counters.count("bad_packets")  # 5.10.6.4.2: from somebody else's address
            return
        connection = self._connections.get((header.src_port, header.dst_port))
        if header.dst_cid != HOST_CID or header.kind != STREAM:
            self._refuse(header)
        elif connection is None:
            if header.op == REQUEST:
                self._open(header)
            else:
                self._refuse(header)
        else:
            connection.peer_alloc, connection.peer_forwarded = header.buf_alloc, header.fwd_cnt
            self._operation(connection, header, rest)

    def _operation(self, connection: _Connection, header: Header, rest: list[memoryview]) -> None:
        if header.op == RW and connection.established:
            self._data(connection, b"".join(split(rest, header.length)[0]))
        elif header.op == RESPONSE and connection.greet:
            self._accepted(connection)
        elif header.op == SHUTDOWN and connection.established:
            connection.guest_done |= header.flags & (NO_RECEIVE | NO_SEND)
            self._settle(connection)
        elif header.op == CREDIT_REQUEST:
            self._answer(connection, CREDIT_UPDATE)
        elif header.op == CREDIT_UPDATE:
            pass
        else:  # RST, or what does not belong here
            if header.op != RST:
                self._answer(connection, RST)
            self._drop(connection)
            return
        if connection.established and not connection.host_ended and connection.credit:
            self._host.watch(connection.sock, True)

    def _open(self, header: Header) -> None:
        try:
            if len(self._connections) >= MAX_CONNECTIONS:
                raise OSError("too many connections")
            sock = self._host.connect(header.dst_port)
        except OSError:
            self._refuse(header)
            return
        connection = self._add(_Connection(header.src_port, header.dst_port, sock))
        connection.peer_alloc, connection.peer_forwarded = header.buf_alloc, header.fwd_cnt
        connection.established = True
        self._answer(connection, RESPONSE)
        self._host.watch(sock, True)

    def _accepted(self, connection: _Connection) -> None:
        connection.greet, connection.established = False, True
        self._data(connection, b"OK %d\n" % connection.host_port, ours=True)
        self._host.watch(connection.sock, True)

    def _data(self, connection: _Connection, data: bytes, ours: bool = False) -> None:
        if connection.guest_done & NO_SEND or (connection.waiting + len(data) > BUFFER and not ours):
            self._answer(connection, RST)  # it said that it would not, or has no credit for so much
            self._drop(connection)
            return
        if ours:  # not the guest's bytes: they are outside the credit
            connection.forwarded -= len(data)
            connection.told -= len(data)
        connection.outbox.append(data)
        connection.waiting += len(data)
        self._forward(connection)

    def _forward(self, connection: _Connection) -> None:
        """Write to the host's socket what it takes."""
        try:
            while connection.outbox:
                count = connection.sock.send(connection.outbox[0])
                connection.forwarded += count
                connection.waiting -= count
                if count < len(connection.outbox[0]):
                    connection.outbox[0] = connection.outbox[0][count:]
                else:
                    connection.outbox.popleft()
        except BlockingIOError:
            self._host.await_room(connection.sock, True)
        except OSError:
            self._answer(connection, RST)
            self._drop(connection)
            return
        else:
            self._host.await_room(connection.sock, False)
        if connection.forwarded - connection.told >= BUFFER // 4:
            self._answer(connection, CREDIT_UPDATE)
        self._settle(connection)

    def _settle(self, connection: _Connection) -> None:
        """What a half-closed connection comes to, once the host has everything."""
        done = connection.guest_done
        if done & NO_RECEIVE:
            self._host.watch(connection.sock, False)
        if connection.outbox or not done & NO_SEND:
            return
        if done & NO_RECEIVE or connection.host_ended:
            self._answer(connection, RST)  # 5.10.6.6: the orderly end
            self._drop(connection)
        else:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)

    # -- to the guest ------------------------------------------------------------------------------

    def _header(self, connection: _Connection, op: int, length: int = 0, flags: int = 0) -> bytes:
        connection.told = connection.forwarded
        ports = connection.host_port, connection.guest_port
        credit = BUFFER, connection.forwarded & 0xFFFFFFFF
        return _HEADER.pack(HOST_CID, self._cid, *ports, length, STREAM, op, flags, *credit)

    def _answer(self, connection: _Connection, op: int, flags: int = 0) -> None:
        self._answers.append(self._header(connection, op, flags=flags))
        self._flush_answers()

    def _refuse(self, header: Header) -> None:
        if header.op != RST:
            back = header.dst_cid, self._cid, header.dst_port, header.src_port
            self._answers.append(_HEADER.pack(*back, 0, header.kind, RST, 0, 0, 0))
            self.counters.count("refused")

    def _flush_answers(self) -> None:
        queue = self.queues[RX]
        pushed = False
        while self._answers:
            chain = queue.pop()
            if chain is None:
                if queue.allow_kicks():
                    continue
                break
            if chain.writable_bytes < HEADER_SIZE:
                raise QueueError("virtio-vsock: a receive buffer shorter than a header")
            queue.push(chain, chain.fill(self._answers.popleft()))
            pushed = True
        if pushed:
            self.transport.notify_used(queue)

    def _receive(self) -> None:
        """The guest has given receive buffers."""
        self._flush_answers()
        for _ in range(len(self._hungry)):
            connection = self._hungry.popleft()
            if connection.sock in self._by_socket:
                self._host.watch(connection.sock, True)

    def readable(self, sock: socket.socket) -> None:
        connection = self._by_socket.get(sock)
        if connection is not None:
            self.transport.run(lambda: self._read(connection))

    def _read(self, connection: _Connection) -> None:
        for _ in range(PACKETS_PER_TURN):
            if not self._read_packet(connection):
                break
        self.transport.notify_used(self.queues[RX])

    def _read_packet(self, connection: _Connection) -> bool:
        """One packet from the host's socket to the guest; False: not now."""
        queue = self.queues[RX]
        if not connection.credit or connection.host_ended or self._answers:
            self._host.watch(connection.sock, False)
            if self._answers:
                self._hungry.append(connection)
            elif not connection.host_ended:
                self._answer(connection, CREDIT_REQUEST)
            return False
        chain = queue.pop()
        while chain is None and queue.allow_kicks():
            chain = queue.pop()
        if chain is None:
            self._host.watch(connection.sock, False)
            self._hungry.append(connection)
            return False
        if chain.writable_bytes <= HEADER_SIZE:
            raise QueueError("virtio-vsock: a receive buffer without room for data")
        _, room = split(chain.writable, HEADER_SIZE)
        room = split(room, min(connection.credit, sum(map(len, room))))[0]
        try:
            count = connection.sock.recvmsg_into(room)[0]
        except BlockingIOError:
            queue.unpop(chain)
            return False
        except OSError:
            count = 0
        if count == 0:
            queue.unpop(chain)
            self._host_ended(connection)
            return False
        connection.sent = connection.sent + count & 0xFFFFFFFF
        chain.fill(self._header(connection, RW, count))
        queue.push(chain, HEADER_SIZE + count)
        self.counters.count("rx_bytes", count)
        return True

    def _host_ended(self, connection: _Connection) -> None:
        connection.host_ended = True
        self._host.watch(connection.sock, False)
        # A Unix socket that was closed reads its end like one that was half closed: writing tells.
        self._answer(connection, SHUTDOWN, NO_SEND)
        self._settle(connection)

    def writable(self, sock: socket.socket) -> None:
        connection = self._by_socket.get(sock)
        if connection is not None:
            self.transport.run(lambda: self._forward(connection))

    def incoming(self, sock: socket.socket, port: int) -> None:
        with self.transport.lock:
            if not self.live or len(self._connections) >= MAX_CONNECTIONS:
                sock.close()
                return
            while (port, self._next_port) in self._connections:
                self._next_port += 1
            connection = self._add(_Connection(port, self._next_port, sock))
            self._next_port = FIRST_HOST_PORT + (self._next_port + 1 - FIRST_HOST_PORT) % (1 << 30)
            connection.greet = True
        self.transport.run(lambda: self._answer(connection, REQUEST))

    # -- life --------------------------------------------------------------------------------------

    def _add(self, connection: _Connection) -> _Connection:
        self._connections[connection.guest_port, connection.host_port] = connection
        self._by_socket[connection.sock] = connection
        self.counters.count("connections")
        return connection

    def _drop(self, connection: _Connection) -> None:
        self._connections.pop((connection.guest_port, connection.host_port), None)
        if self._by_socket.pop(connection.sock, None) is not None:
            self._host.drop(connection.sock)

    def _tell_moved(self) -> None:
        queue = self.queues[EVENT]
        if not self._moved or not queue.ready:
            return
        chain = queue.pop()
        if chain is None:
            queue.allow_kicks()
            return
        self._moved = False
        queue.push(chain, chain.fill(TRANSPORT_RESET.to_bytes(4, "little")))
        self.transport.notify_used(queue)

    def resumed(self) -> None:
        self.transport.run(self._tell_moved)

    def save(self) -> Any:
        return VsockState(cid=self._cid)

    def check(self, state: Any) -> None:
        require(state.cid == self._cid, f"{self.name}: saved with the CID {state.cid}")

    def restore(self, state: Any) -> None:
        self._forget()
        self._moved = True

    def _forget(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._answers.clear()
        self._hungry.clear()

    def reset(self) -> None:
        self._forget()
        self._moved = False
