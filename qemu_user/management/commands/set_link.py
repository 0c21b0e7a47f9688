"""set_link: pull a network cable out, or plug it in again."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


class SetLink(Arguments, frozen=True, kw_only=True):
    """QMP's arguments: the netdev's or the device's id."""

    name: str
    up: bool


def run(machine: Machine, arguments: SetLink) -> Result:
    """The guest is told by a configuration interrupt."""
    for net, card in zip(machine.config.nets, machine.parts.cards, strict=True):
        if arguments.name and arguments.name in (net.id, net.device):
            card.plug(arguments.up)
            return Result()
    raise CommandError(f"Device '{arguments.name}' not found", "DeviceNotFound")


COMMAND = Command("set_link", run, "pull or plug a network cable", SetLink)
