"""Which VLAN a frame belongs to, and what it looks like where it leaves (802.1Q, 6.9 and 8.8). Pure.

Frames are handled as a virtio-net header (or none) and the frame; a tag that comes or goes moves what the header says about
checksums.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qemu_user.devices.virtio.net_offload import (
    GSO_TCPV4,
    GSO_TCPV6,
    HEADER,
    NEEDS_CSUM,
    SIZE,
    BadHeader,
    Header,
    plain_frames,
)
from qemu_user.switch.settings import PortSettings

TPID = b"\x81\x00"
NO_HEADER = bytes(SIZE)
MAX_SEGMENTS = 512
"""Of one large frame; Linux's least segment of 48 bytes would make 1,366, and nobody uses it."""
_LENGTH = struct.Struct(">I")


class Class(NamedTuple):
    """What a port makes of a frame that comes in."""

    vlan: int
    priority: int
    """PCP and DEI, where they stand in the tag."""
    tagged: bool
    """Whether there is a tag in the frame."""


def classify(head: bytes, settings: PortSettings) -> Class | None:
    """The VLAN of a frame that begins with `head` (18 bytes, 14 of one without a tag); None: the port does not take it."""
    if head[12:14] != TPID:
        return Class(settings.vlan, 0, False) if settings.vlan else None
    tag = int.from_bytes(head[14:16], "big")
    vlan, priority = tag & 0xFFF, tag & 0xF000
    if not vlan:  # a priority tag: the VLAN is that of untagged frames (6.9.1)
        return Class(settings.vlan, priority, True) if settings.vlan else None
    # An access port takes no tags, not even its own: what is inside could be another one (VLAN hopping).
    return Class(vlan, priority, True) if settings.tags(vlan) else None


def sane(header: memoryview, frame_length: int) -> bool:
    """Whether a virtio-net header fits its frame (virtio 1.2, 5.1.6.2)."""
    flags, kind, length, size, start, offset, _ = HEADER.unpack(header)
    if flags & NEEDS_CSUM and start + offset + 2 > frame_length:
        return False
    if not kind:
        return True
    segments = frame_length <= size * MAX_SEGMENTS
    return kind & 0x7F in (GSO_TCPV4, GSO_TCPV6) and bool(flags & NEEDS_CSUM) and segments and length <= frame_length


def rewritten(
    header: memoryview | None, frame: memoryview, tagged: bool, tag: int | None, with_header: bool
) -> list[list[bytes | memoryview]]:
    """A frame as it leaves: length word, header if wanted, frame, in pieces; several where a port without headers gets a
    large segment. `tagged`: it carries a tag, which goes; `tag`: the one that it gets. BadHeader.
    """
    body: list[bytes | memoryview] = [frame[:12]]
    if tag is not None:
        body.append(TPID + tag.to_bytes(2, "big"))
    body.append(frame[16:] if tagged else frame[12:])
    moved = 4 * ((tag is not None) - tagged)
    length = len(frame) + moved
    if with_header:
        shifted = NO_HEADER if header is None else _shifted(header, moved)
        return [[_LENGTH.pack(length + SIZE) + shifted, *body]]
    if header is None or not (header[0] or header[1]):
        return [[_LENGTH.pack(length), *body]]
    wanted = Header(*HEADER.unpack(_shifted(header, moved)))
    return [[_LENGTH.pack(len(plain)), plain] for plain in map(bytes, plain_frames(wanted, bytearray().join(body)))]


def _shifted(header: memoryview, moved: int) -> bytes:
    values = Header(*HEADER.unpack(header))
    if moved and (values.flags & NEEDS_CSUM or values.gso_type):
        if values.start < 14 + max(0, -moved):
            raise BadHeader("a checksum over the Ethernet header")
        length = max(0, values.length + moved) if values.length else 0
        values = values._replace(start=values.start + moved, length=length)
    return values.pack(values.buffers)
