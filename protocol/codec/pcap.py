"""Capture files: pcap (as QEMU's filter-dump writes it) and pcapng (draft-ietf-opsawg-pcapng), Ethernet frames only.

Pure: values in, bytes out. Called by qemu_user/backends/net/capture.py. pcapng names the port and the direction of every
frame; pcap knows neither.
"""

from __future__ import annotations

import struct

ETHERNET = 1
"""LINKTYPE_ETHERNET."""
INBOUND, OUTBOUND = 1, 2
"""epb_flags: into, or out of, the interface that is captured on."""
_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_NAME, _RESOLUTION, _FLAGS = 2, 9, 2
_NANOSECONDS = 9


def pcap_header(longest: int) -> bytes:
    """The file's header; `longest`: bytes kept of a frame."""
    return struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, longest, ETHERNET)


def pcap_packet(time_ns: int, kept: bytes | memoryview, length: int) -> bytes:
    """A record: `kept` of a frame of `length` bytes, at `time_ns` since the epoch (written as microseconds)."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return struct.pack("<IIII", seconds, rest // 1000, len(kept), length) + kept


def _block(kind: int, body: bytes) -> bytes:
    total = 12 + len(body)
    return struct.pack("<II", kind, total) + body + struct.pack("<I", total)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def pcapng_section() -> bytes:
    """The section header block that a file begins with."""
    return _block(_SECTION, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))


def pcapng_interface(name: str, longest: int) -> bytes:
    """Describes the next interface; the first is number 0."""
    options = _option(_NAME, name.encode()) + _option(_RESOLUTION, bytes((_NANOSECONDS,))) + _option(0, b"")
    return _block(_INTERFACE, struct.pack("<HHI", ETHERNET, 0, longest) + options)


def pcapng_packet(interface: int, time_ns: int, kept: bytes | memoryview, length: int, direction: int) -> bytes:
    """An enhanced packet block: `kept` of a frame of `length` bytes, going INBOUND or OUTBOUND."""
    head = struct.pack("<IIIII", interface, time_ns >> 32, time_ns & 0xFFFFFFFF, len(kept), length)
    options = _option(_FLAGS, struct.pack("<I", direction)) + _option(0, b"")
    return _block(_PACKET, head + kept + bytes(-len(kept) % 4) + options)
