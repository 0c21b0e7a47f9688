"""x-mirror-resync: members of a mirrored disk that had failed are brought up to date, while the guest runs."""

from __future__ import annotations

from qemu_user.backends.errors import BackendError
from qemu_user.machine.drives import mirror_of
from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, CommandError, Result


class MirrorResync(Arguments, frozen=True, kw_only=True):
    """`device`: the drive's id."""

    device: str


class MirrorState(Result, frozen=True, kw_only=True):
    """Member -> "in sync", "being copied" or "out". A BLOCK_MIRROR_SYNCED event says when copying has ended."""

    members: dict[str, str]


def run(machine: Machine, arguments: MirrorResync) -> MirrorState:
    """Returns when copying has begun."""
    for drive, block, disk in zip(machine.config.drives, machine.parts.blocks, machine.parts.disks, strict=True):
        if arguments.device in (block.name, drive.id, drive.device):
            mirror = mirror_of(disk)
            if mirror is None:
                raise CommandError(f"{arguments.device} is no mirror")
            try:
                mirror.resync()
            except (BackendError, OSError) as error:
                raise CommandError(str(error)) from error
            return MirrorState(members=dict(mirror.status()))
    raise CommandError(f"Cannot find device='{arguments.device}'", "DeviceNotFound")


COMMAND = Command("x-mirror-resync", run, "bring members of a mirrored disk up to date", MirrorResync)
