"""query-chardev: the character devices, among them the names of pseudo-terminals."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result


class ChardevInfo(Result, frozen=True, kw_only=True):
    """QMP's ChardevInfo."""

    label: str
    filename: str
    frontend_open: bool


def run(machine: Machine, arguments: Arguments) -> list[ChardevInfo]:
    """One entry per chardev."""
    found = []
    for config in machine.config.chardevs:
        chardev = machine.parts.chardevs[config.id]
        path = getattr(chardev, "path", "") or config.path
        name = f"{config.kind}:{path}" if path else config.kind
        found.append(ChardevInfo(label=config.id, filename=name, frontend_open=chardev.is_open))
    return found


COMMAND = Command("query-chardev", run, "the VM's character devices")
