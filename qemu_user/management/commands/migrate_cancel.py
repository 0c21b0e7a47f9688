"""migrate_cancel: call off the migration or snapshot that is under way; the VM goes on here."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


def run(machine: Machine, arguments: Arguments) -> Result:
    """Without effect when there is none, or when the VM has been handed over already."""
    if machine.job is not None:
        machine.job.cancel()
    return Result()


COMMAND = Command("migrate_cancel", run, "call off a migration or snapshot")
