"""system_reset: the reset button."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """The guest is not asked."""
    machine.reset()
    return Result()


COMMAND = Command("system_reset", run, "reset the VM")
