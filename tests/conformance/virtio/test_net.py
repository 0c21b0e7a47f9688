"""Virtio 1.2, section 5.1: the network device. Test names begin with the section of the requirement."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest

from qemu_user.backends.net.backend import NetBackend
from qemu_user.config.machine_config import NET_FEATURES
from qemu_user.devices.virtio import mmio, net, net_control, net_offload
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.transport import ACKNOWLEDGE, DRIVER, FEATURES_OK
from tests.framework.devices import Bench
from tests.framework.virtio_driver import Driver

MAC = b"\x52\x54\0\x12\x34\x56"
OTHER = b"\x52\x54\0\xaa\xbb\xcc"


class Wire(NetBackend):
    """Keeps what is sent; can be full."""

    is_up = True

    def __init__(self, virtio_header: bool = False, mtu: int = 1500, trusted: bool = False) -> None:
        super().__init__("wire")
        self.virtio_header, self.mtu, self.trusted = virtio_header, mtu, trusted
        self.frames: list[bytes] = []
        self.room = 1 << 20
        self.offloads: list[int] = []
        self.resumed = 0

    def send(self, frame: list[memoryview]) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(b"".join(frame))
        return True

    def set_offloads(self, features: int) -> None:
        self.offloads.append(features)

    def resume(self) -> None:
        self.resumed += 1


class Card:
    """A device on a wire with a driver that has started it."""

    def __init__(self, bench: Bench, wire: Wire, features: int | None = None, **options: Any) -> None:
        self.wire = wire
        self.device = VirtioNet("net", wire, MAC, **options)
        self.driver: Driver = bench.driver(bench.virtio(self.device))
        self.driver.start(features, size=32)
        self.control = self.driver.queues[2 * options.get("pairs", 1) if features is None else 2]

    def send(self, frame: bytes, header: net_offload.Header | None = None, queue: int = 1) -> None:
        ring = self.driver.queues[queue]
        ring.add([(header or net_offload.Header()).pack(0), frame], [])
        ring.kick()

    def offer(self, count: int, size: int = 2048, queue: int = 0) -> list[int]:
        ring = self.driver.queues[queue]
        places = [ring.add([], [size])[1][0] for _ in range(count)]
        ring.kick()
        return places

    def command(self, kind: int, number: int, data: bytes = b"") -> int:
        _, where = self.control.add([bytes((kind, number)), *([data] if data else [])], [1])
        self.control.kick()
        assert len(self.control.returned()) == 1
        return self.driver.get(where[0], 1)[0]

    def counter(self, name: str) -> int:
        return self.device.counters.get(name, 0)


def tcp_packet(size: int, v6: bool = False, flags: int = 0x18, vlan: bool = False) -> tuple[bytes, int]:
    """(frame as a driver with offloads gives it: checksum of the pseudo header only, where TCP begins)."""
    ether = OTHER + MAC + (b"\x81\0\0\7" if vlan else b"")
    payload = random.Random(size).randbytes(size)
    if v6:
        addresses = bytes(range(32))
        ip = struct.pack(">IHBB", 0x6000_0000, (20 + size) & 0xFFFF, 6, 64) + addresses
        ether += b"\x86\xdd"
    else:
        addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
        ip = struct.pack(">BBHHHBBH", 0x45, 0, (40 + size) & 0xFFFF, 0xFFFE, 0x4000, 64, 6, 0) + addresses
        ether += b"\x08\0"
    pseudo = addresses + struct.pack(">II", 20 + size, 6)
    tcp = struct.pack(">HHIIBBHHH", 1000, 80, 0xFFFF_FF00, 7, 0x50, flags, 512, net_offload.ones_complement(pseudo), 0)
    return ether + ip + tcp + payload, len(ether) + len(ip)


def good_checksums(frame: bytes, v6: bool = False, at: int = 14) -> bool:
    """By the definition, word for word (RFC 1071), not by the device's arithmetic."""

    def total(data: bytes) -> int:
        data += bytes(len(data) % 2)
        value = sum(struct.unpack(f">{len(data) // 2}H", data))
        while value >> 16:
            value = (value & 0xFFFF) + (value >> 16)
        return value

    addresses = frame[at + 8 : at + 40] if v6 else frame[at + 12 : at + 20]
    tcp = at + (40 if v6 else 20)
    good = total(addresses + struct.pack(">II", len(frame) - tcp, 6) + frame[tcp:]) == 0xFFFF
    return good and (v6 or total(frame[at : at + 20]) == 0xFFFF)


# -- features and configuration --------------------------------------------------------------------


@pytest.mark.parametrize("feature", net.REQUIRES)
def test_5_1_3_1_features_need_those_they_build_on(bench: Bench, feature: int) -> None:
    driver = bench.driver(bench.virtio(VirtioNet("net", Wire(virtio_header=True), MAC, pairs=2)))
    assert driver.features() & feature
    wanted = feature | 1 << 32
    driver.write(mmio.STATUS, ACKNOWLEDGE | DRIVER)
    for select in (0, 1):
        driver.write(mmio.DRIVER_FEATURES_SEL, select)
        driver.write(mmio.DRIVER_FEATURES, wanted >> 32 * select & 0xFFFFFFFF)
    driver.write(mmio.STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert not driver.read(mmio.STATUS) & FEATURES_OK


@pytest.mark.parametrize("name", net.BY_NAME)
def test_5_1_3_1_what_is_offered_goes_together_whatever_is_left_out(bench: Bench, name: str) -> None:
    device = VirtioNet("net", Wire(virtio_header=True), MAC, pairs=2, without=[name])
    assert not device.features & net.BY_NAME[name]
    assert device.features_good(device.features)
    bench.driver(bench.virtio(device)).start()


def test_names_of_features_are_those_of_the_configuration() -> None:
    assert set(net.BY_NAME) == set(NET_FEATURES)


def test_5_1_4_configuration(bench: Bench) -> None:
    card = Card(bench, Wire(), pairs=3, mtu=1400)
    assert bytes(card.driver.read(mmio.CONFIG + i, 1) for i in range(6)) == MAC
    assert card.driver.read(mmio.CONFIG + 6, 2) == net.LINK_UP
    assert card.driver.read(mmio.CONFIG + 8, 2) == 3
    assert card.driver.read(mmio.CONFIG + 10, 2) == 1400
    assert len(card.driver.queues) == 7


def test_5_1_4_2_link_status_changes_are_told(bench: Bench) -> None:
    card = Card(bench, Wire())
    before = bench.interrupts
    card.device.plug(False)
    assert bench.interrupts == before + 1
    assert card.driver.read(mmio.CONFIG + 6, 2) == 0
    card.send(bytes(60))
    card.offer(1)
    assert card.wire.frames == []
    assert card.wire.frontend.receive(memoryview(bytes(60)))
    assert card.driver.queues[0].returned() == []
    card.device.plug(True)
    card.send(bytes(60))
    assert len(card.wire.frames) == 1


def test_who_comes_back_is_told_the_address(bench: Bench) -> None:
    """RARP with the guest's address when the other end has come anew, but not through a cable that is pulled out."""
    card = Card(bench, Wire())
    card.wire.frontend.link(False)
    assert card.wire.frames == []
    card.wire.frontend.link(True)
    (frame,) = card.wire.frames
    assert (bytes(frame[:6]), bytes(frame[6:12]), bytes(frame[12:14])) == (b"\xff" * 6, MAC, b"\x80\x35")
    card.device.plug(False)
    card.wire.frontend.link(True)
    assert len(card.wire.frames) == 1


def test_5_1_2_without_mq_the_control_queue_is_the_third(bench: Bench) -> None:
    card = Card(bench, Wire(), features=net.F_CTRL_VQ | net.F_CTRL_RX, pairs=4)
    assert card.command(net_control.RX, net_control.RX_PROMISC, b"\1") == net_control.OK


# -- transmission ----------------------------------------------------------------------------------


def test_5_1_6_2_partial_checksums_are_completed(bench: Bench) -> None:
    card = Card(bench, Wire())
    for size in (1, 2, 3, 1000, 1001):
        frame, tcp = tcp_packet(size)
        card.send(frame, net_offload.Header(flags=net_offload.NEEDS_CSUM, start=tcp, offset=16))
        sent = bytearray(card.wire.frames[-1])
        sent[24:26] = (~net_offload.ones_complement(sent[14:34]) & 0xFFFF).to_bytes(2, "big")  # IP's is the driver's
        assert good_checksums(bytes(sent))


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize(("size", "mss"), [(4000, 1448), (65000, 1448), (1448, 1448), (1449, 1448), (3001, 1000)])
def test_5_1_6_2_large_segments_are_cut(bench: Bench, v6: bool, size: int, mss: int) -> None:
    card = Card(bench, Wire())
    frame, tcp = tcp_packet(size, v6, flags=0x99)  # CWR, ACK, PSH, FIN
    kind = net_offload.GSO_TCPV6 if v6 else net_offload.GSO_TCPV4
    card.send(frame, net_offload.Header(net_offload.NEEDS_CSUM, kind, tcp + 20, mss, tcp, 16))
    frames = card.wire.frames
    assert len(frames) == -(-size // mss)
    assert b"".join(part[tcp + 20 :] for part in frames) == frame[tcp + 20 :]
    assert all(good_checksums(part, v6) for part in frames)
    sequences = [int.from_bytes(part[tcp + 4 : tcp + 8], "big") for part in frames]
    assert sequences == [(0xFFFF_FF00 + mss * index) & 0xFFFF_FFFF for index in range(len(frames))]
    flags = [part[tcp + 13] for part in frames]
    middle = [0x10] * (len(frames) - 2)
    assert flags == ([0x99] if len(frames) == 1 else [0x90, *middle, 0x19])
    if not v6:
        assert [int.from_bytes(part[18:20], "big") for part in frames] == [(0xFFFE + i) & 0xFFFF for i in range(len(frames))]


def test_large_segments_behind_a_vlan_tag(bench: Bench) -> None:
    card = Card(bench, Wire())
    frame, tcp = tcp_packet(3000, vlan=True)
    card.send(frame, net_offload.Header(1, net_offload.GSO_TCPV4, tcp + 20, 1400, tcp, 16))
    assert [good_checksums(part, at=18) for part in card.wire.frames] == [True] * 3


@pytest.mark.parametrize(
    "header",
    [
        net_offload.Header(flags=1, start=5000, offset=16),
        net_offload.Header(flags=1, start=0xFFFF, offset=0xFFFF),
        net_offload.Header(gso_type=1, gso_size=1000, start=34, offset=16),
        net_offload.Header(flags=1, gso_type=1, gso_size=0, start=34, offset=16),
        net_offload.Header(flags=1, gso_type=1, gso_size=1000, start=33, offset=16),
        net_offload.Header(flags=1, gso_type=1, gso_size=1000, start=2000, offset=16),
        net_offload.Header(flags=1, gso_type=4, gso_size=1000, start=34, offset=16),
        net_offload.Header(flags=1, gso_type=3, gso_size=1000, start=34, offset=6),
        net_offload.Header(flags=1, gso_type=0x7F, gso_size=1000, start=34, offset=16),
    ],
)
def test_headers_that_do_not_fit_cost_the_packet_only(bench: Bench, header: net_offload.Header) -> None:
    card = Card(bench, Wire())
    card.send(tcp_packet(1500)[0], header)
    assert card.wire.frames == []
    assert card.counter("tx_dropped") == 1
    assert not card.driver.needs_reset
    card.send(bytes(60))
    assert len(card.wire.frames) == 1


@pytest.mark.parametrize("seed", range(3))
def test_random_headers_never_raise(bench: Bench, seed: int) -> None:
    choice = random.Random(seed)
    card = Card(bench, Wire())
    for _ in range(400):
        frame = bytearray(tcp_packet(choice.choice((0, 1, 100, 2000)), choice.random() < 0.5)[0])
        for _ in range(choice.randrange(4)):
            frame[choice.randrange(len(frame))] = choice.randrange(256)
        frame = frame[: choice.randrange(14, len(frame) + 1)]
        fields = (choice.choice((0, 1, 3)), choice.choice((0, 1, 4, 0x81, 3)), 0, choice.choice((0, 1, 536, 65535)))
        start, offset = choice.choice((34, 54, choice.getrandbits(16))), choice.choice((16, 6))
        card.send(bytes(frame), net_offload.Header(*fields, start, offset))
    assert not card.driver.needs_reset


def test_segments_wait_for_a_full_wire_in_order(bench: Bench) -> None:
    card = Card(bench, Wire())
    card.wire.room = 2
    frame, tcp = tcp_packet(5000)
    card.send(frame, net_offload.Header(1, net_offload.GSO_TCPV4, tcp + 20, 1000, tcp, 16))
    card.send(b"second" + bytes(54))
    assert len(card.wire.frames) == 2
    card.wire.room = 1 << 20
    card.wire.frontend.sent()
    assert len(card.wire.frames) == 6
    assert b"".join(part[54:] for part in card.wire.frames[:5]) == frame[54:]
    assert card.wire.frames[5].startswith(b"second")


def test_headers_cross_where_the_back_end_carries_them(bench: Bench) -> None:
    card = Card(bench, Wire(virtio_header=True))
    frame, tcp = tcp_packet(5000)
    header = net_offload.Header(1, net_offload.GSO_TCPV4, tcp + 20, 1000, tcp, 16)
    card.send(frame, header)
    assert card.wire.frames == [header.pack(0) + frame]
    (place,) = card.offer(1, 8192)
    assert card.wire.frontend.receive(memoryview(header.pack(0) + frame))
    assert card.driver.get(place, 12 + len(frame)) == header.pack(1) + frame


# -- reception -------------------------------------------------------------------------------------


def test_5_1_6_4_1_num_buffers_without_mergeable_buffers(bench: Bench) -> None:
    card = Card(bench, Wire(), features=net.F_MAC)
    (place,) = card.offer(1)
    assert card.wire.frontend.receive(memoryview(bytes(60)))
    assert card.driver.get(place, 12) == bytes(10) + b"\1\0"


def test_5_1_6_4_data_valid_only_where_nothing_can_be_damaged_and_it_was_negotiated(bench: Bench) -> None:
    for trusted, features, expected in ((True, None, 2), (False, None, 0), (True, net.F_MAC, 0)):
        card = Card(bench, Wire(trusted=trusted, mtu=65520), features=features)
        (place,) = card.offer(1)
        assert card.wire.frontend.receive(memoryview(bytes(60)))
        assert card.driver.get(place, 1)[0] == expected


def test_5_1_6_4_1_what_the_driver_did_not_take_is_undone(bench: Bench) -> None:
    card = Card(bench, Wire(virtio_header=True), features=net.F_MAC)
    frame, tcp = tcp_packet(3000)
    places = card.offer(2)
    header = net_offload.Header(1, net_offload.GSO_TCPV4, tcp + 20, 1000, tcp, 16).pack(0)
    assert card.wire.frontend.receive(memoryview(header + frame))
    assert not card.wire.frontend.receive(memoryview(bytes(12) + frame)), "a segment still waits for a buffer"
    places += card.offer(1)
    assert card.wire.resumed > 0
    used = card.driver.queues[0].returned()
    frames = [card.driver.get(at, length)[12:] for at, (_, length) in zip(places, used, strict=True)]
    assert all(good_checksums(part) for part in frames)
    assert b"".join(part[54:] for part in frames) == frame[54:]
    assert all(card.driver.get(at, 2) == b"\0\0" for at in places)


def test_frames_shorter_than_their_header_are_dropped(bench: Bench) -> None:
    card = Card(bench, Wire(virtio_header=True))
    card.offer(2)
    for length in (0, 5, 12, 20):
        assert card.wire.frontend.receive(memoryview(bytes(length)))
    assert card.driver.queues[0].returned() == []


# -- the control queue -----------------------------------------------------------------------------


def _arrives(card: Card, target: bytes, rest: bytes = bytes(54)) -> bool:
    card.offer(1)
    assert card.wire.frontend.receive(memoryview(target + rest))
    return bool(card.driver.queues[0].returned())


MULTICAST, BROADCAST = b"\x01\0\x5e\0\0\1", b"\xff" * 6


def test_5_1_6_5_1_receive_modes(bench: Bench) -> None:
    card = Card(bench, Wire())
    assert _arrives(card, OTHER), "promiscuous until the driver says otherwise"
    assert card.command(net_control.RX, net_control.RX_PROMISC, b"\0") == net_control.OK
    seen = {name: _arrives(card, target) for name, target in
            {"own": MAC, "other": OTHER, "multi": MULTICAST, "broad": BROADCAST}.items()}  # fmt: skip
    assert seen == {"own": True, "other": False, "multi": False, "broad": True}
    for number, target, expected in (
        (net_control.RX_ALLMULTI, MULTICAST, True),
        (net_control.RX_ALLUNI, OTHER, True),
        (net_control.RX_NOMULTI, MULTICAST, False),
        (net_control.RX_NOUNI, MAC, False),
        (net_control.RX_NOBCAST, BROADCAST, False),
    ):
        assert card.command(net_control.RX, number, b"\1") == net_control.OK
        assert _arrives(card, target) is expected


def test_5_1_6_5_2_address_filtering(bench: Bench) -> None:
    card = Card(bench, Wire())
    card.command(net_control.RX, net_control.RX_PROMISC, b"\0")
    table = struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + MULTICAST
    assert card.command(net_control.MAC, net_control.MAC_TABLE_SET, table) == net_control.OK
    assert _arrives(card, OTHER)
    assert _arrives(card, MULTICAST)
    assert not _arrives(card, b"\x52\0\0\0\0\1")
    assert card.command(net_control.MAC, net_control.MAC_TABLE_SET, table + b"\0") == net_control.ERR
    assert card.command(net_control.MAC, net_control.MAC_TABLE_SET, struct.pack("<I", 9) + OTHER) == net_control.ERR
    assert _arrives(card, OTHER), "a refused table changes nothing"
    assert card.command(net_control.MAC, net_control.MAC_ADDR_SET, b"\x52\0\0\0\0\1") == net_control.OK
    assert _arrives(card, b"\x52\0\0\0\0\1")
    assert bytes(card.driver.read(mmio.CONFIG + i, 1) for i in range(6)) == b"\x52\0\0\0\0\1"
    card.driver.write(mmio.STATUS, 0)
    assert card.driver.read(mmio.CONFIG + 5, 1) == MAC[5], "a reset gives the first address back"


def test_5_1_6_5_3_vlan_filtering(bench: Bench) -> None:
    card = Card(bench, Wire())
    tagged = OTHER + b"\x81\0\x20\7" + bytes(50)
    assert not _arrives(card, MAC, tagged)
    assert card.command(net_control.VLAN, net_control.VLAN_ADD, struct.pack("<H", 7)) == net_control.OK
    assert _arrives(card, MAC, tagged)
    assert card.command(net_control.VLAN, net_control.VLAN_DEL, struct.pack("<H", 7)) == net_control.OK
    assert not _arrives(card, MAC, tagged)
    assert card.command(net_control.VLAN, net_control.VLAN_ADD, struct.pack("<H", 5000)) == net_control.ERR


def test_5_1_6_5_4_announcement(bench: Bench) -> None:
    card = Card(bench, Wire())
    card.device.restore(card.device.save())
    card.device.resumed()
    assert card.driver.read(mmio.CONFIG + 6, 2) == net.LINK_UP | net.ANNOUNCE
    assert card.command(net_control.ANNOUNCE, net_control.ANNOUNCE_ACK) == net_control.OK
    assert card.driver.read(mmio.CONFIG + 6, 2) == net.LINK_UP


def test_5_1_6_5_5_queue_pairs(bench: Bench) -> None:
    card = Card(bench, Wire(), pairs=4)
    for pairs, expected in ((0, 1), (5, 1), (3, 0)):
        assert card.command(net_control.MQ, net_control.MQ_VQ_PAIRS_SET, struct.pack("<H", pairs)) == expected
    for pair in range(3):
        card.send(bytes(60), queue=2 * pair + 1)
    assert len(card.wire.frames) == 3


def test_5_1_6_5_6_flows_come_back_on_their_pair(bench: Bench) -> None:
    card = Card(bench, Wire(), pairs=3)
    card.command(net_control.MQ, net_control.MQ_VQ_PAIRS_SET, struct.pack("<H", 3))
    for queue in (0, 2, 4):
        card.offer(4, queue=queue)
    sent, _ = tcp_packet(10)
    card.send(sent, queue=5)
    back = sent[:26] + sent[30:34] + sent[26:30] + sent[36:38] + sent[34:36] + sent[38:]
    assert card.wire.frontend.receive(memoryview(back))
    assert [len(card.driver.queues[queue].returned()) for queue in (0, 2, 4)] == [0, 0, 1]
    assert card.wire.frontend.receive(memoryview(bytes(60)))
    assert len(card.driver.queues[0].returned()) == 1, "others go to the first"


def test_5_1_6_5_8_guest_offloads(bench: Bench) -> None:
    card = Card(bench, Wire(virtio_header=True))
    everything = net.GUEST_OFFLOAD_BITS
    assert card.wire.offloads == [everything]
    assert card.command(net_control.GUEST_OFFLOADS, 0, struct.pack("<Q", net.F_GUEST_CSUM)) == net_control.OK
    assert card.wire.offloads == [everything, net.F_GUEST_CSUM]
    assert card.command(net_control.GUEST_OFFLOADS, 0, struct.pack("<Q", net.F_GUEST_UFO)) == net_control.ERR
    assert card.command(net_control.GUEST_OFFLOADS, 0, b"\1") == net_control.ERR


def test_bad_commands_are_answered(bench: Bench) -> None:
    card = Card(bench, Wire())
    for kind, number, data in ((9, 0, b""), (0, 7, b"\1"), (0, 0, b""), (0, 0, b"\2"), (1, 5, b""), (3, 1, b""), (4, 0, b"")):
        assert card.command(kind, number, data) == net_control.ERR
    choice = random.Random(2)
    for _ in range(300):
        card.command(choice.randrange(7), choice.randrange(7), os.urandom(choice.randrange(1, 40)))
    assert not card.driver.needs_reset
    card.control.add([b"\0\0\1"], [])
    card.control.kick()
    assert card.driver.needs_reset, "no room for the answer"


# -- buffers ---------------------------------------------------------------------------------------


def test_5_1_6_packets_go_both_ways(bench: Bench) -> None:
    wire = Wire()
    device = VirtioNet("net", wire, b"\x52\x54\0\x12\x34\x56")
    driver = bench.driver(bench.virtio(device)).start()
    frame = os.urandom(60)
    driver.queues[1].add([bytes(12), frame], [])
    driver.queues[1].kick()
    assert wire.frames == [frame]
    assert not wire.frontend.receive(memoryview(frame)), "no buffers yet"
    before = wire.resumed
    head, where = driver.queues[0].add([], [2048])
    driver.queues[0].kick()
    assert wire.resumed == before + 1
    assert wire.frontend.receive(memoryview(frame))
    assert driver.queues[0].returned() == [(head, 72)]
    assert driver.get(where[0], 72) == bytes(10) + b"\1\0" + frame


def test_5_1_6_3_1_packets_spread_over_merged_buffers(bench: Bench) -> None:
    wire = Wire()
    driver = bench.driver(bench.virtio(VirtioNet("net", wire, bytes(6)))).start()
    frame = os.urandom(5000)
    places = [driver.queues[0].add([], [2048])[1][0] for _ in range(3)]
    assert wire.frontend.receive(memoryview(frame))
    used = driver.queues[0].returned()
    assert [written for _, written in used] == [2048, 2048, 5012 - 4096]
    data = b"".join(driver.get(at, written) for at, (_, written) in zip(places, used, strict=True))
    assert data[10:12] == b"\3\0"
    assert data[12:] == frame


def test_5_1_6_4_1_buffers_of_a_packet_become_used_together(bench: Bench) -> None:
    """A driver that polls must not see the first one before the last one is there: Linux drops the packet then."""
    wire = Wire()
    device = VirtioNet("net", wire, bytes(6))
    driver = bench.driver(bench.virtio(device)).start()
    for _ in range(4):
        driver.queues[0].add([], [2048])
    seen: list[int] = []

    class Watched(list[int]):
        """The used ring's head: whoever writes the index is seen."""

        def __setitem__(self, at: Any, value: Any) -> None:
            seen.append(value)
            head[at] = value

    queue = device.queues[0]
    head = queue._used_head
    queue._used_head = Watched()  # type: ignore[assignment]
    assert wire.frontend.receive(memoryview(os.urandom(5000)))
    assert wire.frontend.receive(memoryview(os.urandom(500)))
    assert [index for index in seen if index] == [3, 4]
    assert len(driver.queues[0].returned()) == 4


def test_5_1_6_3_1_without_merging_what_does_not_fit_is_dropped(bench: Bench) -> None:
    wire = Wire()
    device = VirtioNet("net", wire, bytes(6))
    driver = bench.driver(bench.virtio(device)).start(0)
    driver.queues[0].add([], [100])
    assert wire.frontend.receive(memoryview(bytes(1000)))
    assert device.counters["rx_too_long"] == 1
    assert wire.frontend.receive(memoryview(bytes(60)))
    assert driver.queues[0].returned() == [(0, 72)]


def test_packets_wait_for_a_full_wire(bench: Bench) -> None:
    wire = Wire()
    driver = bench.driver(bench.virtio(VirtioNet("net", wire, bytes(6)))).start()
    wire.room = 0
    for number in range(3):
        driver.queues[1].add([bytes(12) + bytes([number]) * 20], [])
    driver.queues[1].kick()
    assert driver.queues[1].returned() == []
    wire.room = 100
    wire.frontend.sent()
    assert [frame[0] for frame in wire.frames] == [0, 1, 2]
    assert len(driver.queues[1].returned()) == 3


def test_5_1_6_2_where_nothing_can_be_damaged_checksums_are_left_open(bench: Bench) -> None:
    card = Card(bench, Wire(trusted=True, mtu=65520))
    assert card.device.features & net.F_CSUM
    assert not card.device.features & net.F_HOST_TSO4  # the far end takes frames as long as TCP makes them
    frame, tcp = tcp_packet(30000)
    card.send(frame, net_offload.Header(flags=net_offload.NEEDS_CSUM, start=tcp, offset=16))
    assert card.wire.frames == [frame]
