"""The switch's core without sockets: learning, VLANs, isolation, links, limits, broken frames, large segments."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec.ethernet_stream import StreamError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.config.errors import ConfigError
from qemu_user.devices.virtio.net_offload import GSO_TCPV4, NEEDS_CSUM, Header, complete_checksum, ones_complement
from qemu_user.switch.forwarding import Forwarding
from qemu_user.switch.mac_table import MacTable
from qemu_user.switch.port import QUEUE_BYTES, Piece, Port, split
from qemu_user.switch.settings import PortSettings, parse_rate, settings_from
from qemu_user.switch.token_bucket import TokenBucket
from qemu_user.switch.vlan import sane

BROADCAST = b"\xff" * 6
HEADER = 12


def mac(number: int) -> bytes:
    return b"\x52\x54\0\0\0" + bytes((number,))


def frame(to: bytes, source: bytes, tag: int | None = None, payload: bytes = b"p" * 46) -> bytes:
    middle = b"" if tag is None else b"\x81\0" + struct.pack(">H", tag)
    return to + source + middle + b"\x08\0" + payload


class Memory(Port):
    """A port whose other side is a list."""

    def __init__(self, switch: Forwarding, settings: str = "", header: bool = False, link: bool = False) -> None:
        super().__init__("m", settings_from(settings), IoLoop(lambda error: None))
        self.header, self.is_link = header, link
        self.out: list[bytes] = []
        self.room = True
        switch.add(self)
        self.is_up = True

    def _emit(self, pieces: list[Piece]) -> bytes:
        if not self.room:
            return b"".join(pieces)
        self.out += [b"".join(each) for each in split(pieces)]
        return b""

    def send(self, *frames: bytes) -> None:
        data = b"".join(struct.pack(">I", len(each)) + each for each in frames)
        assert self.forward(self, memoryview(bytearray(data)), 0, len(data)) == len(data)

    def got(self) -> list[bytes]:
        out, self.out = self.out, []
        return out


def test_learns_and_moves() -> None:
    switch = Forwarding(MacTable())
    a, b, c = (Memory(switch) for _ in range(3))
    hello = frame(mac(2), mac(1))
    a.send(hello)
    assert (b.got(), c.got(), a.got()) == ([hello], [hello], [])  # unknown: everywhere but back
    b.send(frame(mac(1), mac(2)))
    assert (len(a.got()), len(c.got())) == (1, 0)
    a.send(hello, hello, frame(mac(9), mac(1)), hello)
    assert (len(b.got()), len(c.got())) == (4, 1)
    c.send(frame(BROADCAST, mac(2)))  # 2 has moved, as after a migration
    a.got(), b.got()
    a.send(hello)
    assert (b.got(), c.got()) == ([], [hello])
    assert switch.table.moves == 1
    switch.remove(c)
    a.send(hello)
    assert b.got() == [hello]
    a.send(frame(mac(1), mac(1)))
    assert not a.got()  # to where it came from: nowhere
    assert (a.rx_frames, b.tx_frames, a.rx_bytes) == (8, 7, 8 * 60)


def test_addresses_age_and_are_bounded() -> None:
    table = MacTable(limit=8, ageing=10)
    table.learn(1, mac(200), 2, 0.0)
    for number in range(20):
        table.learn(1, mac(number), 1, float(number))
    assert len(table) == 8
    assert table.find(1, mac(200)) == 2, "who floods loses its own"
    assert table.evicted == 13
    version = table.version
    table.age(25.0)
    assert {entry.mac[5] for entry in table} == {15, 16, 17, 18, 19}
    assert table.version > version
    assert (table.count(1), table.count(2)) == (5, 0)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 12), st.integers(1, 4)), max_size=60))
def test_the_table_agrees_with_a_plain_one(steps: list[tuple[int, int, int]]) -> None:
    table, model = MacTable(limit=1000), dict[tuple[int, int], int]()
    for now, (vlan, number, port) in enumerate(steps):
        table.learn(vlan, mac(number), port, float(now))
        model[vlan, number] = port
        if now % 7 == 6:
            table.forget_port(port)
            model = {key: value for key, value in model.items() if value != port}
    assert {(entry.vlan, entry.mac[5]): entry.port for entry in table} == model
    assert sum(map(table.count, range(1, 5))) == len(model)


def test_vlans() -> None:
    switch = Forwarding(MacTable())
    ten, twenty, other_ten = Memory(switch, "vlan=10"), Memory(switch, "vlan=20"), Memory(switch, "vlan=10")
    trunk, native = Memory(switch, "trunk=10:20-30"), Memory(switch, "trunk=all,native=10")
    plain = frame(BROADCAST, mac(1))
    ten.send(plain)
    assert other_ten.got() == [plain]
    assert twenty.got() == []
    assert trunk.got() == [frame(BROADCAST, mac(1), 10)]
    assert native.got() == [plain]
    trunk.send(frame(BROADCAST, mac(2), 0x6014))  # priority 3, VLAN 20
    assert (ten.got(), other_ten.got()) == ([], [])
    assert twenty.got() == [frame(BROADCAST, mac(2))]
    assert native.got() == [frame(BROADCAST, mac(2), 0x6014)]
    native.send(frame(BROADCAST, mac(3)))
    assert trunk.got() == [frame(BROADCAST, mac(3), 10)]
    ten.got(), other_ten.got()
    ten.send(frame(BROADCAST, mac(4), 10))
    trunk.send(frame(BROADCAST, mac(4)), frame(BROADCAST, mac(4), 40))
    assert (ten.rx_refused, trunk.rx_refused) == (1, 2)
    assert not any(port.got() for port in (ten, twenty, other_ten, trunk, native))
    ten.send(frame(BROADCAST, mac(5), 0xA000))  # a priority tag
    assert trunk.got() == [frame(BROADCAST, mac(5), 0xA00A)]
    assert other_ten.got() == [frame(BROADCAST, mac(5))]
    assert switch.table.find(20, mac(2)) == trunk.number
    assert switch.table.find(10, mac(2)) is None, "each VLAN has its own addresses"


def test_isolated_ports_and_links() -> None:
    switch = Forwarding(MacTable())
    one, two, uplink = Memory(switch, "isolated=on"), Memory(switch, "isolated=on"), Memory(switch)
    first, second = (Memory(switch, "trunk=all,native=1", link=True) for _ in range(2))
    one.send(frame(BROADCAST, mac(1)))
    assert [len(port.got()) for port in (one, two, uplink, first, second)] == [0, 0, 1, 1, 1]
    uplink.send(frame(BROADCAST, mac(2)))
    assert [len(port.got()) for port in (one, two, uplink, first, second)] == [1, 1, 0, 1, 1]
    first.send(frame(BROADCAST, mac(3)))
    assert [len(port.got()) for port in (one, two, uplink, first, second)] == [1, 1, 1, 0, 0], "no loops over links"
    switch.transit = True
    switch.table.version += 1
    first.send(frame(BROADCAST, mac(3)))
    assert len(second.got()) == 1


@pytest.mark.parametrize("bad", [b"short", frame(mac(1), BROADCAST), frame(mac(1), bytes(6)), mac(1) + mac(2) + b"\x81\0"])
def test_broken_frames_are_dropped(bad: bytes) -> None:
    switch = Forwarding(MacTable())
    a, b = Memory(switch), Memory(switch)
    good = frame(BROADCAST, mac(1))
    a.send(good, bad, good)
    assert b.got() == [good, good]
    assert (a.rx_broken, a.rx_frames) == (1, 2)
    for length in (0, 1 << 20):
        with pytest.raises(StreamError):
            a.forward(a, memoryview(struct.pack(">I", length) + bytes(100)), 0, 104)


def test_a_stopped_client_loses_its_own_frames_only() -> None:
    switch = Forwarding(MacTable())
    a, stopped, b = (Memory(switch) for _ in range(3))
    stopped.room = False
    big = frame(BROADCAST, mac(1), payload=bytes(9000))
    for _ in range(400):
        a.send(big)
    assert len(b.got()) == 400
    assert stopped.queued_bytes <= QUEUE_BYTES + 2 * len(big)
    assert stopped.tx_dropped + stopped.tx_frames == 400
    stopped.room = True
    stopped.drain()
    assert len(stopped.got()) == stopped.tx_frames
    a.send(big)
    assert len(stopped.got()) == 1


def segment(payload: int) -> bytes:
    """A large TCP segment in IPv4, its checksum the pseudo header's sum (as a driver leaves it)."""
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + payload, 7, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    pseudo = ones_complement(ip[12:20] + struct.pack(">BBH", 0, 6, 20 + payload))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 1000, 0, 0x50, 0x10, 0xFFFF, pseudo, 0)
    return mac(2) + mac(1) + b"\x08\0" + ip + tcp + bytes(range(256)) * (payload // 256)


def test_large_segments_cross_whole_or_cut() -> None:
    switch = Forwarding(MacTable())
    a, whole, plain = Memory(switch, header=True), Memory(switch, header=True), Memory(switch)
    trunk = Memory(switch, "trunk=all", header=True)
    header = Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    packet = header.pack(0) + segment(32768)
    a.send(packet)
    assert whole.got() == [packet]
    (tagged,) = trunk.got()
    moved = Header(*struct.unpack("<BBHHHHH", tagged[:HEADER]))
    assert (moved.start, moved.length, moved.gso_size) == (38, 58, 1448)
    assert tagged[HEADER + 12 : HEADER + 16] == b"\x81\0\0\1"
    cut = plain.got()
    assert len(cut) == -(-32768 // 1448)
    assert b"".join(each[54:] for each in cut) == bytes(range(256)) * 128
    for each in cut:
        pseudo = each[26:34] + struct.pack(">BBH", 0, 6, len(each) - 34)
        assert ones_complement(pseudo + each[34:]) % 0xFFFF == 0, "its checksum is wrong"
    trunk.send(tagged)
    assert whole.got() == [header.pack(0) + segment(32768)]
    plain.send(frame(mac(9), mac(8)))
    assert whole.got() == [bytes(HEADER) + frame(mac(9), mac(8))]
    simple = bytearray(frame(mac(9), mac(1)))
    a.send(Header(NEEDS_CSUM, 0, 0, 0, 34, 6).pack(0) + simple)
    complete_checksum(simple, 34, 6)
    assert bytes(simple) in plain.got()


@pytest.mark.parametrize(
    "header",
    [
        Header(1, 0, 0, 0, 60, 16),
        Header(1, 1, 54, 0, 34, 16),
        Header(1, 1, 54, 1, 34, 16),
        Header(0, 1, 54, 1448, 34, 16),
        Header(1, 3, 54, 1448, 34, 16),
    ],
)
def test_headers_that_do_not_fit(header: Header) -> None:
    switch = Forwarding(MacTable())
    a, b = Memory(switch, header=True), Memory(switch, header=True)
    length = 1300 if header.gso_type else 60
    a.send(header.pack(0) + frame(BROADCAST, mac(1), payload=bytes(length - 14)))
    assert not b.got()
    assert a.rx_broken == 1
    assert not sane(memoryview(header.pack(0)), length)


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_whatever_comes_in(data: bytes, header: bool, other: bool) -> None:
    """Any bytes as one frame: dropped or handed on, never an exception."""
    switch = Forwarding(MacTable())
    a, b, c = Memory(switch, header=header), Memory(switch, header=other), Memory(switch, "trunk=all,native=1")
    a.send(*([data] if data else []), frame(BROADCAST, mac(1)) if not header else bytes(12) + frame(BROADCAST, mac(1)))
    assert b.got()
    assert c.got()
    assert a.rx_frames + a.rx_broken == (2 if data else 1)


def test_rates() -> None:
    bucket = TokenBucket(1000, 500, 0.0)
    assert bucket.take(500, 0.0) == 0
    assert bucket.take(1000, 0.0) == 1.0
    assert bucket.wait(0.5) == 0.5
    assert bucket.wait(1.0) == 0
    assert bucket.take(500, 100.0) == 0, "no more than the burst is saved up"
    assert bucket.take(1, 100.0) > 0
    assert [parse_rate(text, "") for text in ("8mbit", "1gbit", "1mbps", "8000")] == [10**6, 125 * 10**6, 10**6, 1000]
    for bad in ("fast", "-1", "1", "1xbit"):
        with pytest.raises(ConfigError):
            parse_rate(bad, "")


def test_settings() -> None:
    assert settings_from("") == PortSettings()
    assert settings_from("trunk=10:20-30,native=5").describe() == "trunk=10:20-30,native=5"
    assert settings_from("trunk=all").describe() == "trunk=all,native=none"
    assert settings_from("vlan=7,isolated=on,rate-in=8mbit").describe() == "vlan=7,isolated,rate-in=1000000bps"
    base = settings_from("trunk=10,native=5,isolated=on")
    assert settings_from("vlan=3", base) == settings_from("vlan=3,isolated=on")
    assert settings_from("rate-out=80kbit", base) == settings_from("trunk=10,native=5,isolated=on,rate-out=80kbit")
    for bad in ("vlan=0", "vlan=4095", "vlan=x", "trunk=20-10", "vlan=1,trunk=2", "native=1", "mtu=9000", "isolated=maybe"):
        with pytest.raises(ConfigError):
            settings_from(bad)
