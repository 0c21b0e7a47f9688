"""Telling the network where a VM is now: switches learn its address from frames that come from there.

Each network device says it (VirtioNet.announce) five times with growing distance, on the I/O loop.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from qemu_user.devices.virtio.net import VirtioNet

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

_DELAYS = (0.0, 0.05, 0.2, 0.45, 0.8)


def announce(machine: Machine) -> None:
    """Any thread."""
    for transport in machine.parts.transports:
        device = transport.virtio
        if isinstance(device, VirtioNet):
            for delay in _DELAYS:
                # on the device's own I/O thread: its back end is used by nobody else
                machine.parts.loop.call_later(delay, partial(transport.defer, device.announce))
