"""Virtio 1.2, section 5.10: the socket device, with real Unix sockets. Test names begin with the section."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.vsock import unix as vsock_host
from qemu_user.backends.vsock.unix import UnixVsock
from qemu_user.devices.virtio import mmio, vsock
from qemu_user.devices.virtio.vsock import HEADER_SIZE, HOST_CID, Header, VirtioVsock
from tests.framework.devices import Bench

CID = 5
FORMAT = struct.Struct("<QQIIIHHIII")


def _raise(error: BaseException) -> None:
    raise error


class Guest:
    """A driver, the host's sockets, and the loop that serves them, turned by hand."""

    def __init__(self, bench: Bench, path: Path) -> None:
        self.path = path
        self.loop = IoLoop(_raise)
        self.host = UnixVsock(str(path))
        self.device = VirtioVsock("vsock", CID, self.host)
        self.driver = bench.driver(bench.virtio(self.device)).start()
        self.host.start(self.loop)
        self.places: dict[int, int] = {}
        self.offer(16)

    def offer(self, count: int, size: int = 4096) -> None:
        for _ in range(count):
            head, where = self.driver.queues[vsock.RX].add([], [size])
            self.places[head] = where[0]
        self.driver.queues[vsock.RX].kick()

    def send(self, op: int, data: bytes = b"", **fields: int) -> None:
        header = Header(CID, HOST_CID, 1000, 80, len(data), 1, op, 0, 65536, 0)._replace(**fields)
        queue = self.driver.queues[vsock.TX]
        queue.add([FORMAT.pack(*header), *([data] if data else [])], [])
        queue.kick()
        queue.returned()

    def turn(self) -> None:
        for _ in range(6):
            self.loop.turn(0)

    def packets(self) -> list[tuple[Header, bytes]]:
        self.turn()
        found = []
        for head, written in self.driver.queues[vsock.RX].returned():
            raw = self.driver.get(self.places[head], written)
            found.append((Header(*FORMAT.unpack(raw[:HEADER_SIZE])), raw[HEADER_SIZE:]))
        return found

    def ops(self) -> list[int]:
        return [header.op for header, _ in self.packets()]

    def listener(self, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(f"{self.path}_{port}")
        sock.listen()
        sock.settimeout(60)
        return sock

    def connected(self) -> socket.socket:
        """A connection that the guest has opened to port 80."""
        with self.listener(80) as listener:
            self.send(vsock.REQUEST)
            sock, _ = listener.accept()
        assert self.ops() == [vsock.RESPONSE]
        sock.settimeout(60)
        return sock

    def close(self) -> None:
        self.device.reset()
        self.host.close()
        self.loop.close()


@pytest.fixture
def guest(bench: Bench, tmp_path: Path) -> Iterator[Guest]:
    made = Guest(bench, tmp_path / "v")
    yield made
    made.close()


def test_5_10_4_configuration(guest: Guest) -> None:
    assert guest.driver.read(mmio.CONFIG, 4) == CID
    assert guest.driver.read(mmio.CONFIG + 4, 4) == 0


def test_5_10_6_a_connection_of_the_guest(guest: Guest) -> None:
    with guest.connected() as sock:
        guest.send(vsock.RW, b"hello")
        assert sock.recv(100) == b"hello"
        sock.sendall(b"back")
        ((header, data),) = guest.packets()
        assert (header.op, header.length, data) == (vsock.RW, 4, b"back")
        assert (header.src_cid, header.dst_cid, header.src_port, header.dst_port) == (HOST_CID, CID, 80, 1000)
        assert header.buf_alloc == vsock.BUFFER
        assert header.fwd_cnt == 5, "what the host has taken of the guest's"


def test_5_10_6_a_connection_of_the_host(guest: Guest) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(guest.path))
        sock.sendall(b"CONNECT 70")
        assert guest.ops() == []
        sock.sendall(b"00\nearly")
        ((header, _),) = guest.packets()
        assert (header.op, header.dst_port) == (vsock.REQUEST, 7000)
        guest.send(vsock.RESPONSE, src_port=7000, dst_port=header.src_port)
        assert sock.recv(100) == b"OK %d\n" % header.src_port
        ((_, data),) = guest.packets()
        assert data == b"early"
        guest.send(vsock.RW, b"reply", src_port=7000, dst_port=header.src_port)
        assert sock.recv(100) == b"reply"


@pytest.mark.parametrize("line", [b"CONNECT\n", b"CONNECT x\n", b"CONNECT 9999999999\n", b"HI 1\n", b"x" * 40, b"CONNECT -1\n"])
def test_bad_calls_of_the_host_are_hung_up(guest: Guest, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(60)
        sock.connect(str(guest.path))
        sock.sendall(line)
        assert guest.ops() == []
        try:
            assert sock.recv(10) == b""
        except ConnectionResetError:
            assert len(line) > vsock_host.LONGEST_REQUEST, "only what was not read ends with a reset"


def test_5_10_6_4_1_what_nobody_listens_to_is_reset(guest: Guest) -> None:
    guest.send(vsock.REQUEST, dst_port=12345)
    guest.send(vsock.RW, b"x", dst_port=4)
    ((first, _), (second, _)) = guest.packets()
    assert (first.op, first.src_port, first.dst_port) == (vsock.RST, 12345, 1000)
    assert (second.op, second.src_port) == (vsock.RST, 4)
    guest.send(vsock.RST, dst_port=4)
    assert guest.ops() == [], "a reset is not answered"


def test_5_10_6_4_1_unknown_types_and_addresses_are_reset(guest: Guest) -> None:
    with guest.listener(80):
        guest.send(vsock.REQUEST, kind=9)
        guest.send(vsock.REQUEST, dst_cid=77)
        packets = guest.packets()
    assert [header.op for header, _ in packets] == [vsock.RST] * 2
    assert [header.src_cid for header, _ in packets] == [HOST_CID, 77]


def test_5_10_6_4_2_foreign_sources_are_ignored(guest: Guest) -> None:
    with guest.listener(80):
        guest.send(vsock.REQUEST, src_cid=CID + 1)
        assert guest.ops() == []
    assert guest.device.counters["bad_packets"] == 1


def test_5_10_6_3_the_guests_credit_is_kept(guest: Guest) -> None:
    with guest.connected() as sock:
        guest.send(vsock.CREDIT_UPDATE, buf_alloc=10, fwd_cnt=0)
        sock.sendall(b"0123456789abcdef")
        packets = guest.packets()
        assert b"".join(data for _, data in packets) == b"0123456789"
        assert packets[-1][0].op == vsock.CREDIT_REQUEST
        guest.send(vsock.CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4)
        assert b"".join(data for _, data in guest.packets()) == b"abcd"


def test_5_10_6_3_our_credit_is_told_as_the_host_reads(guest: Guest) -> None:
    with guest.connected() as sock:
        sent = 0
        while sent < vsock.BUFFER:
            guest.send(vsock.RW, bytes(16384))
            sent += 16384
        taken, told = 0, 0
        while taken < sent:
            taken += len(sock.recv(65536))
            for header, _ in guest.packets():
                assert header.op == vsock.CREDIT_UPDATE
                assert header.fwd_cnt >= told
                told = header.fwd_cnt
            guest.offer(2)
        assert told > sent // 2


def test_5_10_6_3_more_than_our_credit_ends_the_connection(guest: Guest) -> None:
    with guest.connected():
        for _ in range(200):
            guest.send(vsock.RW, bytes(16384))
        assert vsock.RST in guest.ops()
    assert not guest.driver.needs_reset
    assert not guest.device._connections


def test_5_10_6_3_credit_requests_are_answered(guest: Guest) -> None:
    with guest.connected():
        guest.send(vsock.CREDIT_REQUEST)
        assert guest.ops() == [vsock.CREDIT_UPDATE]


def test_5_10_6_6_half_closed_connections_go_on(guest: Guest) -> None:
    with guest.connected() as sock:
        guest.send(vsock.RW, b"question")
        guest.send(vsock.SHUTDOWN, flags=vsock.NO_SEND)
        assert sock.makefile("rb").read() == b"question"
        sock.sendall(b"answer")
        sock.shutdown(socket.SHUT_WR)
        packets = guest.packets()
        assert packets[0][1] == b"answer"
        assert [header.op for header, _ in packets[1:]] == [vsock.SHUTDOWN, vsock.RST]


def test_5_10_6_6_shutdown_of_both_directions_is_answered_by_a_reset(guest: Guest) -> None:
    with guest.connected() as sock:
        guest.send(vsock.RW, b"last words")
        guest.send(vsock.SHUTDOWN, flags=vsock.NO_SEND | vsock.NO_RECEIVE)
        assert guest.ops() == [vsock.RST]
        assert sock.makefile("rb").read() == b"last words"


def test_5_10_6_1_answers_wait_for_buffers_and_hold_up_requests(guest: Guest) -> None:
    count = 16 + vsock.MAX_ANSWERS + 40
    for _ in range(count):
        guest.send(vsock.REQUEST, dst_port=9)
    assert len(guest.device._answers) <= vsock.MAX_ANSWERS
    seen = 0
    for _ in range(count // 8 + 1):
        seen += len(guest.packets())
        guest.offer(8)
    assert seen == count
    assert not guest.driver.needs_reset


def test_5_10_6_7_a_move_is_an_event(guest: Guest) -> None:
    with guest.connected() as sock:
        guest.device.restore(guest.device.save())
        _, where = guest.driver.queues[vsock.EVENT].add([], [4])
        guest.device.resumed()
        assert guest.driver.queues[vsock.EVENT].returned() == [(0, 4)]
        assert guest.driver.get(where[0], 4) == bytes(4)
        assert sock.recv(10) == b""


def test_packets_that_lie_about_their_length_break_the_device(guest: Guest) -> None:
    guest.send(vsock.RW, b"short", length=100)
    assert guest.driver.needs_reset


@pytest.mark.parametrize("seed", range(3))
def test_random_packets_never_raise(guest: Guest, seed: int) -> None:
    choice = random.Random(seed)
    with guest.listener(80) as listener:
        for _ in range(300):
            data = bytes(choice.choice((0, 1, 100)))
            guest.send(choice.randrange(10), data, flags=choice.getrandbits(3), buf_alloc=choice.getrandbits(32),
                       fwd_cnt=choice.getrandbits(32), src_port=choice.randrange(1000, 1004))  # fmt: skip
            guest.offer(1)
            if choice.random() < 0.2:
                guest.packets()
        listener.setblocking(False)
    assert not guest.driver.needs_reset
