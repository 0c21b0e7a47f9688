"""system_powerdown: ask the guest to shut down.

The machine has no power button that Linux knows; the way is the control port of our own images' init.
"""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """Answers when the guest has been asked, not when it is down."""
    if not machine.request_powerdown():
        raise CommandError(
            "the guest has nobody who listens on the control port; shut it down from its console, or use quit"
        )
    return Result()


COMMAND = Command("system_powerdown", run, "ask the guest to shut down")
