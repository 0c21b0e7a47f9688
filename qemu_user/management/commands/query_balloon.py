"""query-balloon: how much memory the guest has."""

from __future__ import annotations

from qemu_user.devices.virtio.balloon import PAGE
from qemu_user.machine.machine import Machine
from qemu_user.management.commands.balloon import device
from qemu_user.management.commands.command import Arguments, Command, Result


class BalloonInfo(Result, frozen=True, kw_only=True):
    """QMP's BalloonInfo: bytes, without what is in the balloon."""

    actual: int


def run(machine: Machine, arguments: Arguments) -> BalloonInfo:
    """What the guest's driver said last."""
    return BalloonInfo(actual=machine.config.memory - device(machine).actual * PAGE)


COMMAND = Command("query-balloon", run, "the guest's memory without the balloon")
