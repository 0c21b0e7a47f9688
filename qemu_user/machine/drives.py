"""Disks from their configuration: images, mirrors and stripes of them, and what limits or changes requests to them."""

from __future__ import annotations

from functools import partial

from qemu_user.backends.block.detect_zeroes import DetectZeroes
from qemu_user.backends.block.filter import Filter
from qemu_user.backends.block.logged import LoggedDisk
from qemu_user.backends.block.mirror import Member, MirrorDisk
from qemu_user.backends.block.opening import is_nbd, open_disk
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.block.stripe import StripeDisk
from qemu_user.backends.block.throttle import Throttled
from qemu_user.config.machine_config import Drive


def open_drive(drive: Drive, locked: bool = True) -> BlockBackend:
    """The disk, as its device sees it. Not `locked`: somebody else still has it. BackendError."""
    disk = _image(drive, locked)
    if drive.detect_zeroes != "off" and not drive.readonly:
        disk = DetectZeroes(disk, unmap=drive.detect_zeroes == "unmap")
    if any(drive.limits.values()):
        disk = Throttled(disk, drive.limits)
    return disk


def _image(drive: Drive, locked: bool) -> BlockBackend:
    def open_one(file: str, locked: bool) -> BlockBackend:
        return open_disk(file, drive.format, drive.readonly, drive.discard, locked, drive.cache, drive.reconnect)

    if drive.layout == "mirror":
        members = [Member(file, partial(open_one, file), not is_nbd(file)) for file in drive.members]
        return MirrorDisk(members, drive.readonly, drive.degraded, locked)
    if drive.layout == "stripe":
        opened: list[BlockBackend] = []
        try:
            for file in drive.members:
                opened.append(open_one(file, locked))
            return StripeDisk(opened, drive.chunk)
        except BaseException:
            for disk in opened:
                disk.close()
            raise
    return open_one(drive.file, locked)


def mirror_of(disk: LoggedDisk) -> MirrorDisk | None:
    """The mirror that a VM's disk is, if it is one."""
    image = disk.image
    while isinstance(image, Filter):
        image = image.image
    return image if isinstance(image, MirrorDisk) else None
