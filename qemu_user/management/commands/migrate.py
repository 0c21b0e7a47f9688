"""migrate: hand the VM over to another host, while it runs. Ends by query-migrate; migrate_cancel calls it off."""

from __future__ import annotations

from pathlib import Path

from protocol.channel import keys
from protocol.channel.zmq_socket import Curve
from qemu_user.machine.machine import PAUSED, RUNNING, Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result
from qemu_user.migration import job as jobs
from qemu_user.migration.connect import connect
from qemu_user.migration.source import Options, Outgoing
from qemu_user.migration.spread import MOST


class MigrateArguments(Arguments, frozen=True, kw_only=True, rename="kebab"):
    """`max_downtime` in milliseconds, `bandwidth` in bytes per second (0: no limit). `key`, `peer_key`: files with our
    secret and the host's public key, for tcp. `copy`: copy memory even where it could be given as it is. `postcopy`: switch
    over early, memory follows. `channels`: connections that memory goes over (QEMU's multifd-channels)."""

    uri: str
    max_downtime: float = 30.0
    bandwidth: int = 0
    with_disks: bool = False
    copy: bool = False
    postcopy: bool = False
    channels: int = 1
    key: str = ""
    peer_key: str = ""


def run(machine: Machine, arguments: MigrateArguments) -> Result:
    """Returns when it has begun."""
    if not 1 <= arguments.max_downtime <= 60_000 or arguments.bandwidth < 0:
        raise CommandError("max-downtime: 1 to 60000 ms; bandwidth: bytes per second")
    if not 1 <= arguments.channels <= MOST:
        raise CommandError(f"channels: 1 to {MOST}")
    curve = _curve(arguments) if arguments.uri.startswith("tcp://") else None
    given = arguments.uri.startswith("ipc://") and not (arguments.copy or arguments.postcopy)
    options = Options(
        arguments.max_downtime / 1000, arguments.bandwidth, arguments.with_disks, given, arguments.postcopy, arguments.channels
    )

    def work(job: jobs.Job) -> None:
        # Memory that has yet to come to us cannot go on from here. Before the call: who answers it waits for our announcement.
        if not machine.complete_memory(job.called_off):
            raise jobs.Cancelled
        Outgoing(machine, connect(arguments.uri, curve), options, job).run()
        job.result = f"VM {machine.config.name} runs on {arguments.uri}"

    try:
        jobs.start(machine, jobs.Job("migration", arguments.uri), work)
    except jobs.JobError as error:
        raise CommandError(str(error)) from error
    return Result()


def _curve(arguments: MigrateArguments) -> Curve:
    try:
        own = keys.own(Path(arguments.key) if arguments.key else None)
        return Curve(own.public, own.secret, keys.public(Path(arguments.peer_key)))
    except keys.KeyFileError as error:
        raise CommandError(str(error)) from error


COMMAND = Command("migrate", run, "hand the VM over to another host", MigrateArguments, (RUNNING, PAUSED))
