"""query-migrate: how the migration or snapshot that is under way, or was the last one, stands."""

from __future__ import annotations

from typing import Any

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command


def run(machine: Machine, arguments: Arguments) -> dict[str, Any]:
    """QMP's MigrationInfo, as far as it fits; empty when there was none."""
    return machine.job.numbers() if machine.job is not None else {}


COMMAND = Command("query-migrate", run, "progress of a migration or snapshot")
