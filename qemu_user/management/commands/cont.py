"""cont: let the vCPUs run on."""

from __future__ import annotations

from qemu_user.machine.machine import INMIGRATE, INTERNAL_ERROR, POSTMIGRATE, SHUTDOWN, Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """Without effect on a VM that runs."""
    if machine.status in (INMIGRATE, POSTMIGRATE):
        raise CommandError("the VM is being handed over; its source decides where it runs")
    if machine.status in (SHUTDOWN, INTERNAL_ERROR):
        raise CommandError("the guest has shut down; use system_reset to start it again, or quit")
    machine.resume()
    return Result()


COMMAND = Command("cont", run, "let the VM go on")
