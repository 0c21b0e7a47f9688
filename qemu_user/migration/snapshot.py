"""Snapshots: a VM's memory, state and disks at one instant, as a folder; made while the VM runs on.

The folder: `state` (sections.py, with a section "contents" of checksums), `memory` (RAM byte for byte, sparse), `disk0`...
(writable disks: raw and sparse, or qcow2 over the same backing file if they are qcow2), `meta.json` (what lists show). It is
built under another name and renamed when everything is on the disk, so a snapshot is there whole or not at all.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from qemu_user.backends.block.opening import backing_path, open_disk, qcow2_of
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.qcow2.image import Qcow2Image
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.devices.device import State, StateError, decode_state, encode_state, require
from qemu_user.holes import with_data
from qemu_user.migration import machine_state, pages, sections
from qemu_user.migration.job import DEVICE, Job, JobError
from qemu_user.migration.precopy import Precopy
from qemu_user.migration.sections import Section, SectionError
from qemu_user.migration.volumes import Disk, Ram, writable_disks

if TYPE_CHECKING:
    from qemu_user.config.machine_config import MachineConfig
    from qemu_user.machine.machine import Machine

CLUSTER = 64 << 10
"""Bytes of one checksum, and of one read when memory is loaded on demand."""
MAX_DOWNTIME = 0.02
_NEW = ".new-"
_FICLONE = 0x40049409


class SnapshotError(Exception):
    """A snapshot that is not there, not whole, or cannot be used; the text is for the user."""


class Contents(State, frozen=True, tag="contents", kw_only=True):
    """Sizes and CRC-32 of every 64 KiB cluster of `memory` and the disks, u32 each; 0 where there is a hole."""

    version: Literal[1] = 1
    files: dict[str, tuple[int, bytes]]


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What `softkvm snapshots` shows."""

    name: str
    tag: str
    created: float
    memory: int
    cpus: int
    stored: int
    """Bytes on the disk."""
    downtime: float
    """Seconds that the guest stood."""


class _Files:
    """A Sink that writes volumes into files, byte for byte."""

    def __init__(self, folder: Path, volumes: list[Ram | Disk]) -> None:
        self.fds: dict[int, int] = {}
        self.images: dict[int, Qcow2Image] = {}
        for volume in volumes:
            if isinstance(volume, Disk) and (image := qcow2_of(volume.disk)) is not None:
                self.images[volume.number] = _same_kind(image, folder / volume.name)
                volume.chain = False
                continue
            self.fds[volume.number] = os.open(folder / volume.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.ftruncate(self.fds[volume.number], volume.size)

    def data(self, volume: Ram | Disk, first: int, count: int, content: memoryview) -> int:
        offset, left = first * volume.unit, content
        image = self.images.get(volume.number)
        if image is not None and pages.is_zero(content):
            image.zero(offset, len(content), unmap=True)
        elif image is not None:
            image.write(offset, [content])
        while left and image is None:
            done = os.pwrite(self.fds[volume.number], left, offset)
            offset, left = offset + done, left[done:]
        return len(content)

    def zeroes(self, volume: Ram | Disk, first: int, count: int, fresh: bool) -> int:
        return 0 if fresh else self.data(volume, first, count, memoryview(bytes(count * volume.unit)))

    def end_of_round(self) -> None:
        pass

    def complete(self) -> None:
        """Everything has been given: it reaches the disk."""
        for image in self.images.values():
            image.flush()
            image.close()
        for fd in self.fds.values():
            os.fdatasync(fd)

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        for image in self.images.values():
            image.close()
        self.fds, self.images = {}, {}


def _same_kind(image: Qcow2Image, path: Path) -> Qcow2Image:
    """A new image with the same backing file as another."""
    header = image.header
    backing = backing_path(image.path, header.backing_file) if header.backing_file else ""
    backing_format = header.backing_format or ("qcow2" if isinstance(image.backing, Qcow2Image) else "raw" if backing else "")
    create_qcow2(path, image.size, backing, backing_format, header.cluster_bits)
    made = open_disk(str(path), "qcow2")
    assert isinstance(made, Qcow2Image)
    return made


def save(machine: Machine, root: Path, tag: str, job: Job) -> None:
    """Make the snapshot root/tag. JobError, Cancelled; the VM goes on in any case."""
    if (root / tag).exists():
        raise JobError(f"VM {machine.config.name} has a snapshot {tag}; delete it first, or choose another name")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _clear_leftovers(root)
    folder = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
    try:
        _save_into(machine, folder, tag, job)
        os.rename(folder, root / tag)
        _sync_directory(root)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    job.result = f"{tag}: {job.downtime * 1000:.1f} ms pause"


def _save_into(machine: Machine, folder: Path, tag: str, job: Job) -> None:
    disks = writable_disks(machine)
    copied = [disk for disk in disks if not _can_clone(disk, folder)]
    volumes: list[Ram | Disk] = [Ram(machine), *copied]
    sink = _Files(folder, volumes)
    copy = Precopy(machine, volumes, sink, job, MAX_DOWNTIME, keep_promise=False)
    try:
        copy.rounds()
        job.status = DEVICE
        stopped = time.monotonic()
        with machine.standing():
            copy.finish()
            for disk in disks:
                if disk not in copied:
                    _clone(disk, folder)
            parts = machine_state.capture(machine)
        job.downtime = time.monotonic() - stopped
        copy.close()
        sink.complete()
        files = {name: os.stat(folder / name).st_size for name in ["memory", *(disk.name for disk in disks)]}
        contents = Contents(files={name: (size, _checksums(folder / name, size)) for name, size in files.items()})
        parts.append(Section("contents", contents.version, encode_state(contents)))
        _write(folder / "state", sections.encode(parts))
        stored = sum(512 * path.stat().st_blocks for path in folder.iterdir())
        meta = Meta(
            name=machine.config.name, tag=tag, created=time.time(), memory=machine.config.memory,
            cpus=machine.config.cpus, stored=stored, downtime=job.downtime,
        )  # fmt: skip
        _write(folder / "meta.json", msgspec.json.encode(meta))
        _sync_directory(folder)
    finally:
        copy.close()
        sink.close()


def _can_clone(disk: Disk, folder: Path) -> bool:
    """Whether the file system makes copies of the disk's file in no time (btrfs, XFS)."""
    source = disk.disk.descriptor
    if source is None:
        return False  # a qcow2 image: what is above its backing file is copied
    target = os.open(folder / disk.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError:
        os.unlink(folder / disk.name)
        return False
    finally:
        os.close(target)


def _clone(disk: Disk, folder: Path) -> None:
    target = os.open(folder / disk.name, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(target, _FICLONE, disk.disk.descriptor or -1)
    finally:
        os.close(target)


def _checksums(path: Path, size: int) -> bytes:
    """CRC-32 of each cluster, 0 for holes."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        result = (ctypes.c_uint32 * (-(-size // CLUSTER)))()
        for index, there in enumerate(with_data(fd, size, CLUSTER)):
            if there:
                result[index] = zlib.crc32(os.pread(fd, min(CLUSTER, size - index * CLUSTER), index * CLUSTER)) or 1
        return bytes(result)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _clear_leftovers(root: Path) -> None:
    """What a killed process left half made, an hour later."""
    for left in root.glob(f"{_NEW}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)


# -- what is there ---------------------------------------------------------------------------------


def listed(root: Path) -> list[Meta]:
    """The snapshots in a folder, oldest first; what is no snapshot is passed over."""
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        if not folder.name.startswith("."):
            try:
                found.append(msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta))
            except (OSError, msgspec.MsgspecError):
                continue
    return sorted(found, key=lambda meta: meta.created)


def delete(folder: Path) -> None:
    """Remove a snapshot. SnapshotError if it is not there."""
    if not (folder / "meta.json").is_file():
        raise SnapshotError(f"there is no {folder.name} in {folder.parent}")
    aside = Path(tempfile.mkdtemp(prefix=_NEW, dir=folder.parent))
    os.rename(folder, aside / "old")  # gone at once, whole
    shutil.rmtree(aside, ignore_errors=True)


class Snapshot:
    """One that is there, opened for reading. SnapshotError when it is not, or its state is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.sections = sections.decode((folder / "state").read_bytes())
            self.config: MachineConfig = machine_state.read_config(self.sections)
            self.contents = decode_state(Contents, machine_state.find(self.sections, "contents").payload)
            self._check()
        except FileNotFoundError as error:
            raise SnapshotError(f"there is no snapshot in {folder}") from error
        except (OSError, SectionError, StateError) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {error}") from error

    def _check(self) -> None:
        require("memory" in self.contents.files, "it has no memory")
        for name, (size, sums) in self.contents.files.items():
            require(name == "memory" or (name.startswith("disk") and name[4:].isdigit()), f"a file called {name!r}")
            require(len(sums) == 4 * -(-size // CLUSTER), f"{name}: wrong number of checksums")
            there = os.stat(self.folder / name).st_size
            require(there == size, f"{name}: {there} bytes instead of {size}")
        require(self.contents.files["memory"][0] == self.config.memory, "memory of another size than the machine's")

    def read(self, name: str, into: memoryview) -> None:
        """Put a file's clusters where they belong in `into`, which is zero. SnapshotError when one is damaged."""
        size, _ = self.contents.files[name]
        with self.opened(name) as clusters:
            for offset in clusters.offsets():
                clusters.read(offset, into[offset : min(offset + CLUSTER, size)])

    def write_disk(self, name: str, path: str) -> None:
        """Make `path` the disk that was saved as `name`: a file is replaced as a whole, at once; a block device is
        written over. SnapshotError, OSError.
        """
        size, _ = self.contents.files[name]
        target = os.path.realpath(path)
        device = os.path.exists(target) and stat.S_ISBLK(os.stat(target).st_mode)
        if device:
            fd, partial = os.open(target, os.O_RDWR | os.O_CLOEXEC), ""
        else:
            fd, partial = tempfile.mkstemp(prefix=_NEW, dir=os.path.dirname(target))
        try:
            self._copy_disk(name, fd, size, device)
            os.fsync(fd)
            if partial:
                if os.path.exists(target):
                    shutil.copymode(target, partial)
                os.rename(partial, target)
        except BaseException:
            if partial:
                os.unlink(partial)
            raise
        finally:
            os.close(fd)

    def write_over(self, name: str, disk: BlockBackend) -> None:
        """Make an open disk what was saved as `name`. SnapshotError, OSError."""
        size, _ = self.contents.files[name]
        buffer = memoryview(bytearray(CLUSTER))
        with self.opened(name) as clusters:
            if disk.size != size:
                raise SnapshotError(f"the disk has {disk.size} bytes now, the one that was saved {size}")
            disk.zero(0, size, unmap=True)
            for offset in clusters.offsets():
                part = buffer[: min(CLUSTER, size - offset)]
                clusters.read(offset, part)
                disk.write(offset, [part])
            disk.flush()

    def _copy_disk(self, name: str, fd: int, size: int, device: bool) -> None:
        with self.opened(name) as clusters:
            if not device:
                try:
                    fcntl.ioctl(fd, _FICLONE, clusters.fd)
                    return
                except OSError:
                    os.ftruncate(fd, size)
            buffer = memoryview(bytearray(CLUSTER))
            for offset in range(0, size, CLUSTER) if device else clusters.offsets():
                part = buffer[: min(CLUSTER, size - offset)]
                clusters.read(offset, part)
                os.pwrite(fd, part, offset)

    def opened(self, name: str) -> Clusters:
        """A file of the snapshot, cluster by cluster."""
        size, sums = self.contents.files[name]
        return Clusters(self.folder / name, size, sums)


class Clusters:
    """A checked file of a snapshot. A context manager."""

    cluster = CLUSTER

    def __init__(self, path: Path, size: int, sums: bytes) -> None:
        self.path, self.size = path, size
        self.sums = memoryview(sums).cast("I")
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def offsets(self) -> Iterator[int]:
        """Where data is; the rest is zero."""
        return (index * CLUSTER for index, wanted in enumerate(self.sums) if wanted)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the cluster at `offset`. SnapshotError when it is damaged."""
        wanted = self.sums[offset // CLUSTER]
        done = os.preadv(self.fd, [into], offset)
        if wanted and (done != len(into) or (zlib.crc32(into) or 1) != wanted):
            raise SnapshotError(f"{self.path}: damaged at offset {offset:#x} (checksum does not match)")

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
