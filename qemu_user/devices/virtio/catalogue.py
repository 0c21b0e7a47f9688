"""The virtio devices, by the name that `-device virtio-NAME-pci` (or -device) uses. The list is explicit: a new one
adds a line.
"""

from __future__ import annotations

from qemu_user.devices.virtio.balloon import VirtioBalloon
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.p9 import VirtioP9
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.vsock import VirtioVsock

DEVICES: dict[str, type[VirtioDevice]] = {
    "blk": VirtioBlk,
    "net": VirtioNet,
    "serial": VirtioConsole,
    "rng": VirtioRng,
    "9p": VirtioP9,
    "vsock": VirtioVsock,
    "balloon": VirtioBalloon,
}
