"""The management commands, one file each. The list is explicit: a new one adds a line.

Loaded with the first connection: most VMs end without one, and migration alone takes a tenth of a second to import.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from qemu_user.management.commands.command import Command

MODULES = (
    "balloon",
    "block_resize",
    "cont",
    "migrate",
    "migrate_cancel",
    "mirror_resync",
    "query_balloon",
    "query_chardev",
    "query_counters",
    "query_cpus_fast",
    "query_migrate",
    "query_name",
    "query_stats",
    "query_status",
    "query_version",
    "quit",
    "set_link",
    "snapshot_save",
    "stop",
    "system_powerdown",
    "system_reset",
)


@cache
def commands() -> dict[str, Command]:
    """All of them, by QMP's name."""
    found: list[Command] = [import_module(f"{__name__}.{module}").COMMAND for module in MODULES]
    return {command.name: command for command in found}
