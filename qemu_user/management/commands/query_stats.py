"""query-stats: the VM's counters in kvmcore, as QEMU's command of that name gives KVM's (qapi/stats.json)."""

from __future__ import annotations

from typing import Any

from protocol.abi.errors import KvmError
from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError


class StatsArguments(Arguments, frozen=True, kw_only=True):
    """`target`: only "vm": a vCPU's ioctls wait until its KVM_RUN returns."""

    target: str


def run(machine: Machine, arguments: StatsArguments) -> list[dict[str, Any]]:
    """One provider, kvm, with its statistics by name."""
    if arguments.target != "vm":
        raise CommandError(f"target {arguments.target!r}: there are statistics of the vm, with the sums over its vCPUs")
    if machine.vm is None:
        raise CommandError("the VM is not there yet")
    try:
        values = machine.vm.statistics()
    except (KvmError, OSError) as error:
        raise CommandError(f"kvmcore: {error}") from error
    return [{"provider": "kvm", "stats": [{"name": name, "value": value} for name, value in values.items()]}]


COMMAND = Command("query-stats", run, "counters of the VM", StatsArguments)
