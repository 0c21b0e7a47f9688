"""A frame that says where an Ethernet address is, whatever the guest does: RARP, as QEMU's self-announcement."""

from __future__ import annotations

import struct

ETHER_RARP, RARP_REQUEST = 0x8035, 3


def rarp(mac: bytes) -> bytes:
    """A RARP request by and for `mac` (RFC 903), padded to the shortest Ethernet frame."""
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, RARP_REQUEST) + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + struct.pack(">H", ETHER_RARP) + arp).ljust(60, b"\0")
