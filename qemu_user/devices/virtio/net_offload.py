"""What the header of a virtio-net packet asks for, done in software: checksums completed, large TCP segments cut.

Used by net.py for back ends that carry plain frames only (virtio 1.2, 5.1.6.2 and 5.1.6.4). The header is the guest's
or a peer's: whatever does not fit the frame is a BadHeader.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_ECN = 0, 1, 4, 0x80
HEADER = struct.Struct("<BBHHHHH")
SIZE = HEADER.size
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
_TCP = 6
_VLAN_TYPES = (0x8100, 0x88A8)
_IPV4, _IPV6 = 0x0800, 0x86DD


class BadHeader(ValueError):
    """The header does not fit the frame."""


class Header(NamedTuple):
    """struct virtio_net_hdr (5.1.6); `buffers` is num_buffers."""

    flags: int = 0
    gso_type: int = GSO_NONE
    length: int = 0
    gso_size: int = 0
    start: int = 0
    offset: int = 0
    buffers: int = 1

    def pack(self, buffers: int) -> bytes:
        return HEADER.pack(*self[:6], buffers)


def ones_complement(data: bytes | bytearray | memoryview) -> int:
    """The 16-bit one's complement sum of big-endian words (RFC 1071): the number modulo 2^16 - 1, with 0xffff for 0."""
    number = int.from_bytes(data, "big") << (8 if len(data) & 1 else 0)
    return number % 0xFFFF or (0xFFFF if number else 0)


def _fold(*parts: int) -> int:
    return sum(parts) % 0xFFFF


def complete_checksum(frame: bytearray, start: int, offset: int) -> None:
    """Put the checksum of frame[start:] where the driver left the pseudo header's sum (5.1.6.2)."""
    if start + offset + 2 > len(frame):
        raise BadHeader("a checksum outside the frame")
    # 0xffff stands for 0: UDP reads 0 as "no checksum", and to TCP both are the same.
    struct.pack_into(">H", frame, start + offset, ~_fold(ones_complement(memoryview(frame)[start:])) & 0xFFFF or 0xFFFF)


def plain_frames(header: Header, frame: bytearray) -> list[bytes | bytearray]:
    """The frames that a wire without offloads would have carried. BadHeader."""
    kind = header.gso_type & ~GSO_ECN
    if kind == GSO_NONE:
        if header.flags & NEEDS_CSUM:
            complete_checksum(frame, header.start, header.offset)
        return [frame]
    if kind not in (GSO_TCPV4, GSO_TCPV6) or not header.flags & NEEDS_CSUM:
        raise BadHeader("segmentation of a kind that was not offered")
    return _segments(header, kind, frame)


def _network_offset(frame: bytearray) -> tuple[int, int]:
    """(offset of the IP header, its EtherType), past any VLAN tags."""
    at = 12
    while at + 2 <= len(frame):
        kind = int.from_bytes(frame[at : at + 2], "big")
        if kind not in _VLAN_TYPES:
            return at + 2, kind
        at += 4
    raise BadHeader("a frame without a type")


def _segments(header: Header, kind: int, frame: bytearray) -> list[bytes | bytearray]:
    network, ether_type = _network_offset(frame)
    tcp = header.start
    is_v4 = kind == GSO_TCPV4
    shortest = network + (20 if is_v4 else 40)
    if ether_type != (_IPV4 if is_v4 else _IPV6) or tcp < shortest or tcp + 20 > len(frame) or header.offset != 16:
        raise BadHeader("segmentation of something else than TCP")
    if is_v4 and (tcp != network + 4 * (frame[network] & 15) or frame[network + 9] != _TCP):
        raise BadHeader("segmentation of something else than TCP")
    payload = tcp + 4 * (frame[tcp + 12] >> 4)
    size = header.gso_size
    if not size or payload < tcp + 20 or payload > len(frame):
        raise BadHeader("a segment size or TCP header that cannot be")
    sequence = int.from_bytes(frame[tcp + 4 : tcp + 8], "big")
    identity = int.from_bytes(frame[network + 4 : network + 6], "big")
    addresses = frame[network + 12 : network + 20] if is_v4 else frame[network + 8 : network + 40]
    pseudo = _fold(ones_complement(addresses), _TCP)
    found: list[bytes | bytearray] = []
    starts = range(payload, max(len(frame), payload + 1), size)
    for index, at in enumerate(starts):
        data = frame[at : at + size]
        head = frame[:payload]
        last = index == len(starts) - 1
        if is_v4:
            struct.pack_into(">HH", head, network + 2, payload - network + len(data), (identity + index) & 0xFFFF)
            struct.pack_into(">H", head, network + 10, 0)
            struct.pack_into(">H", head, network + 10, ~_fold(ones_complement(head[network:tcp])) & 0xFFFF)
        else:
            struct.pack_into(">H", head, network + 4, payload - network - 40 + len(data))
        struct.pack_into(">I", head, tcp + 4, (sequence + at - payload) & 0xFFFFFFFF)
        head[tcp + 13] &= ~((0 if last else _FIN | _PSH) | (_CWR if index else 0)) & 0xFF
        struct.pack_into(">H", head, tcp + 16, 0)
        odd_safe = ones_complement(head[tcp:payload]), ones_complement(data)
        checksum = ~_fold(pseudo, payload - tcp + len(data), *odd_safe) & 0xFFFF
        struct.pack_into(">H", head, tcp + 16, checksum)
        found.append(bytes(head) + data)
    return found
