"""Telling the network where a VM is now: switches learn its address from frames that come from there.

A RARP request from each network device (as QEMU's self-announcement), five times with growing distance, on the I/O loop.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING

from qemu_user.devices.virtio.net import VirtioNet

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

ETHER_RARP, RARP_REQUEST = 0x8035, 3
_DELAYS = (0.0, 0.05, 0.2, 0.45, 0.8)


def rarp(mac: bytes) -> bytes:
    """A RARP request by and for `mac` (RFC 903), padded to the shortest Ethernet frame."""
    arp = struct.pack(">HHBBH", 1, 0x0800, 6, 4, RARP_REQUEST) + mac + bytes(4) + mac + bytes(4)
    return (b"\xff" * 6 + mac + struct.pack(">H", ETHER_RARP) + arp).ljust(60, b"\0")


def announce(machine: Machine) -> None:
    """Any thread."""
    for transport in machine.parts.transports:
        device = transport.virtio
        if isinstance(device, VirtioNet):
            frame = rarp(device.mac)
            for delay in _DELAYS:
                # on the device's own I/O thread: its back end is used by nobody else
                machine.parts.loop.call_later(delay, partial(transport.defer, partial(device.announce, frame)))
