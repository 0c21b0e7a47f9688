"""query-status: what the VM is doing."""

from __future__ import annotations

from qemu_user.machine.machine import RUNNING, Machine
from qemu_user.management.commands.command import Arguments, Command, Result


class StatusInfo(Result, frozen=True, kw_only=True):
    """QMP's StatusInfo."""

    status: str
    running: bool
    singlestep: bool = False


def run(machine: Machine, arguments: Arguments) -> StatusInfo:
    """The run state."""
    return StatusInfo(status=machine.status, running=machine.status == RUNNING)


COMMAND = Command("query-status", run, "the VM's run state")
