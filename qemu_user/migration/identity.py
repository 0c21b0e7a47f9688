"""What tells a clone from the VM that it was made of: uuid, network addresses, disks."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import msgspec

from qemu_user.backends.block.opening import format_by_name, is_nbd
from qemu_user.config.machine_config import Drive, MachineConfig
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.machine.build import default_mac
from qemu_user.migration import places

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine


def renewed(config: MachineConfig) -> MachineConfig:
    """The configuration (already under its new name) of another VM of the same kind. Writable disks and banks of the flash
    are files of its own; addresses follow from its name.
    """
    folder = places.disks() / config.name
    drives = tuple(
        drive if drive.readonly else placed(drive, str(folder / f"disk{index}")) for index, drive in enumerate(config.drives)
    )
    flash = tuple(
        bank if bank.readonly else msgspec.structs.replace(bank, file=str(folder / f"flash{index}.raw"), format="raw")
        for index, bank in enumerate(config.flash)
    )
    nets = tuple(msgspec.structs.replace(net, mac="") for net in config.nets)
    return msgspec.structs.replace(config, uuid=str(uuid.uuid4()), drives=drives, flash=flash, nets=nets)


def placed(drive: Drive, path: str) -> Drive:
    """The same drive with another file, whose name tells its format."""
    format = "raw" if drive.layout or is_nbd(drive.file) else format_by_name(drive.file, drive.format)
    return msgspec.structs.replace(drive, file=f"{path}.{format}", format=format, layout="", members=(), degraded=False)


def tell_generation(machine: Machine) -> None:
    """A VM that was saved goes on, perhaps not for the first time: its random numbers must not come twice."""
    if machine.parts.vmgenid is not None:
        machine.parts.vmgenid.renew(uuid.uuid4().bytes_le)


def tell(machine: Machine) -> None:
    """The restored devices have the addresses of the VM that was saved: give them their own. The image's agent, if the guest
    has one that listens, hears of them, of the name and of the uuid: `identity UUID NAME MAC...`.
    """
    devices = [transport.virtio for transport in machine.parts.transports]
    for number, device in enumerate(device for device in devices if isinstance(device, VirtioNet)):
        device.change_mac(default_mac(machine.config.name, number))
    macs = [device.mac.hex(":") for device in devices if isinstance(device, VirtioNet)]
    machine.tell_agent(" ".join(("identity", machine.config.uuid.replace("-", ""), machine.config.name, *macs)))
