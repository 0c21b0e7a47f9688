"""The management commands, one file each. The list is explicit: a new one adds a line."""

from __future__ import annotations

from qemu_user.management.commands import (
    balloon,
    block_resize,
    cont,
    migrate,
    migrate_cancel,
    query_balloon,
    query_chardev,
    query_counters,
    query_cpus_fast,
    query_migrate,
    query_name,
    query_status,
    query_version,
    quit,
    set_link,
    snapshot_save,
    stop,
    system_powerdown,
    system_reset,
)
from qemu_user.management.commands.command import Command

COMMANDS: dict[str, Command] = {
    module.COMMAND.name: module.COMMAND
    for module in (
        balloon,
        block_resize,
        cont,
        migrate,
        migrate_cancel,
        query_balloon,
        query_chardev,
        query_counters,
        query_cpus_fast,
        query_migrate,
        query_name,
        query_status,
        query_version,
        quit,
        set_link,
        snapshot_save,
        stop,
        system_powerdown,
        system_reset,
    )
}
