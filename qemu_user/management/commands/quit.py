"""quit: end the VM now, without asking the guest."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """The process ends soon after the answer."""
    machine.quit()
    return Result()


COMMAND = Command("quit", run, "end the VM without asking the guest")
