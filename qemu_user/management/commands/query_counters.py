"""x-query-counters: what happened to each device since the start. Ours, hence the x-; names may change."""

from __future__ import annotations

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command


def run(machine: Machine, arguments: Arguments) -> dict[str, dict[str, int]]:
    """device -> counter -> value."""
    found: dict[str, dict[str, int]] = {
        "exits": dict(machine.counters),
        "bus": dict(machine.parts.bus.counters),
    }
    for device in machine.parts.devices:
        virtio = getattr(device, "virtio", None)
        found[device.name] = {**device.counters, **(virtio.counters if virtio is not None else {})}
    return found


COMMAND = Command("x-query-counters", run, "counters of every device")
