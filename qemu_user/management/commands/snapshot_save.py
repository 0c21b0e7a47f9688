"""softkvm-snapshot-save: keep the VM's memory, state and disks under a tag, while it runs on. Ends by query-migrate."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from qemu_user.machine.machine import PAUSED, RUNNING, Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result
from qemu_user.migration import job as jobs
from qemu_user.migration import places, snapshot


class SaveArguments(Arguments, frozen=True, kw_only=True):
    """`folder`: where to put it instead of among the VM's snapshots (templates, clones). `full`: store what earlier ones have
    once more."""

    tag: str
    folder: str = ""
    full: bool = False


def run(machine: Machine, arguments: SaveArguments) -> Result:
    """Returns when it has begun."""
    if not places.is_name(arguments.tag):
        raise CommandError(f"tag {arguments.tag!r}: letters, digits, '.', '_' and '-', the first a letter or digit")
    root = Path(arguments.folder) if arguments.folder else places.snapshots(machine.config.name)
    incremental = not arguments.folder and not arguments.full
    job = jobs.Job("snapshot", arguments.tag)
    try:
        jobs.start(machine, job, partial(snapshot.save, machine, root, arguments.tag, incremental=incremental))
    except jobs.JobError as error:
        raise CommandError(str(error)) from error
    return Result()


COMMAND = Command("softkvm-snapshot-save", run, "keep the VM as it is now", SaveArguments, (RUNNING, PAUSED))
