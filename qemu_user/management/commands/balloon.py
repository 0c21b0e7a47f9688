"""balloon: how much memory the guest should have; it gives the rest back as it can."""

from __future__ import annotations

from qemu_user.devices.virtio.balloon import PAGE, VirtioBalloon
from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


class BalloonValue(Arguments, frozen=True, kw_only=True):
    """QMP's argument: bytes of memory that the guest keeps."""

    value: int


def device(machine: Machine) -> VirtioBalloon:
    """The balloon. CommandError."""
    if machine.parts.balloon is None:
        raise CommandError("No balloon device has been activated (--balloon, -device virtio-balloon-pci)", "DeviceNotActive")
    return machine.parts.balloon


def run(machine: Machine, arguments: BalloonValue) -> Result:
    """Returns at once; query-balloon tells how far the guest is."""
    balloon, memory = device(machine), machine.config.memory
    if arguments.value <= 0:
        raise CommandError(f"a target of {arguments.value} bytes: has to be more than 0")
    balloon.set_target((memory - min(arguments.value, memory)) // PAGE)
    return Result()


COMMAND = Command("balloon", run, "set how much memory the guest has", BalloonValue)
