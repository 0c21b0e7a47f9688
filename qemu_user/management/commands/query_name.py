"""query-name: what the VM is called."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


class NameInfo(Result, frozen=True, kw_only=True):
    """QMP's NameInfo."""

    name: str


def run(machine: Machine, arguments: Arguments) -> NameInfo:
    """The name of -name."""
    return NameInfo(name=machine.config.name)


COMMAND = Command("query-name", run, "the VM's name")
