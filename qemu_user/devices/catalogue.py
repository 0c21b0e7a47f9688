"""The devices of the machine, by name. The list is explicit: a new one adds a line (and a row in
machine/virt.py).
"""

from __future__ import annotations

from qemu_user.devices.device import Device
from qemu_user.devices.goldfish_rtc import GoldfishRtc
from qemu_user.devices.ns16550a import Ns16550a
from qemu_user.devices.pci.host import PciHost
from qemu_user.devices.pflash import Pflash
from qemu_user.devices.plic import Plic
from qemu_user.devices.syscon import Syscon
from qemu_user.devices.virtio.mmio import VirtioMmio
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.devices.vmgenid import VmGenId

DEVICES: dict[str, type[Device]] = {
    "ns16550a": Ns16550a,
    "goldfish_rtc": GoldfishRtc,
    "syscon": Syscon,
    "plic": Plic,
    "pflash": Pflash,
    "virtio_mmio": VirtioMmio,
    "pci_host": PciHost,
    "virtio_pci": VirtioPci,
    "vmgenid": VmGenId,
}
