"""block_resize: a disk grows or shrinks while the guest runs; the guest is told by a configuration interrupt."""

from __future__ import annotations

import msgspec

from qemu_user.config.machine_config import Drive
from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result

SECTOR = 512


class BlockResize(Arguments, frozen=True, kw_only=True):
    """QMP's arguments: one of `device` and `node_name`, and the new size in bytes."""

    device: str = ""
    node_name: str = msgspec.field(name="node-name", default="")
    size: int


def run(machine: Machine, arguments: BlockResize) -> Result:
    """Returns when the image has its size."""
    name = arguments.device or arguments.node_name
    if not 0 < arguments.size < 1 << 63 or arguments.size % SECTOR:
        raise CommandError(f"a size of {arguments.size} bytes: has to be a positive multiple of {SECTOR}")
    for drive, block in zip(machine.config.drives, machine.parts.blocks, strict=True):
        if name and name in _names(drive, block.name):
            try:
                block.resize(arguments.size)
            except OSError as error:
                raise CommandError(f"{name}: cannot be resized: {error.strerror}") from error
            return Result()
    raise CommandError(f"Cannot find device='{name}' nor node-name='{name}'", "DeviceNotFound")


def _names(drive: Drive, label: str) -> tuple[str, ...]:
    return (label, drive.id, drive.device)


COMMAND = Command("block_resize", run, "give a disk another size", BlockResize)
