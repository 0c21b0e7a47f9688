"""stop: halt the vCPUs where they are; cont goes on."""

from __future__ import annotations

from qemu_user.machine.machine import INMIGRATE, POSTMIGRATE, Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """Returns when all vCPUs stand. Without effect on a VM that stands."""
    if machine.status in (INMIGRATE, POSTMIGRATE):
        raise CommandError("the VM is being handed over; its source decides where it runs")
    machine.pause()
    return Result()


COMMAND = Command("stop", run, "pause the VM")
