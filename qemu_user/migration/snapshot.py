"""Snapshots: a VM's memory, state and disks at one instant, as a folder; made while the VM runs on.

The folder: `state` (sections.py, with a section "contents" of checksums), `memory` (RAM byte for byte, sparse), `disk0`...
(writable disks: raw and sparse, or qcow2 over the same backing file if they are qcow2), `flash0`... (all banks of the flash),
`meta.json` (what lists show). It is built under another name and renamed when everything is on the disk, so a snapshot is
there whole or not at all.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from qemu_user.backends.block.opening import backing_path, format_by_name, open_disk, qcow2_of
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.qcow2.image import Qcow2Image
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.devices.device import State, StateError, decode_state, encode_state, require
from qemu_user.devices.pflash import BANK_SIZE
from qemu_user.holes import with_data
from qemu_user.migration import increments, machine_state, pages, places, sections
from qemu_user.migration.job import DEVICE, Job, JobError
from qemu_user.migration.precopy import Precopy
from qemu_user.migration.sections import Section, SectionError
from qemu_user.migration.volumes import Disk, Ram, banks, writable_disks

if TYPE_CHECKING:
    from qemu_user.config.machine_config import MachineConfig
    from qemu_user.machine.machine import Machine

CLUSTER = 64 << 10
"""Bytes of one checksum, and of one read when memory is loaded on demand."""
MAX_DOWNTIME = 0.02
_NEW = ".new-"
_NAMES = re.compile(r"memory|(disk|flash)[0-9]+", re.ASCII)
_FICLONE = 0x40049409


class SnapshotError(Exception):
    """A snapshot that is not there, not whole, or cannot be used; the text is for the user."""


class Contents(State, frozen=True, tag="contents", kw_only=True, omit_defaults=True):
    """Sizes and CRC-32 of every 64 KiB cluster of `memory` and the disks, u32 each; 0 where all is zero. Version 2 has a
    `parent`, the tag of a snapshot beside this one, and bitmaps of the pages that are in its file and not in ours."""

    version: Literal[1, 2] = 1
    files: dict[str, tuple[int, bytes]]
    parent: str = ""
    inherited: dict[str, bytes] = {}


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
    parent: str = ""
    """The snapshot that has what is not stored here."""


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

    def flush(self) -> None:
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


def save(machine: Machine, root: Path, tag: str, job: Job, incremental: bool = False) -> None:
    """Make the snapshot root/tag. `incremental`: pages that the last one in `root` has are not stored again. JobError,
    Cancelled; the VM goes on in any case.
    """
    if (root / tag).exists():
        raise JobError(f"VM {machine.config.name} has a snapshot {tag}; delete it first, or choose another name")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _clear_leftovers(root)
    folder = Path(tempfile.mkdtemp(prefix=_NEW, dir=root))
    try:
        _save_into(machine, folder, tag, job, root if incremental else None)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    job.result = f"{tag}: {job.downtime * 1000:.1f} ms pause"


def _save_into(machine: Machine, folder: Path, tag: str, job: Job, family: Path | None) -> None:
    disks = writable_disks(machine)
    copied = [disk for disk in disks if not _can_clone(disk, folder)]
    flash = banks(machine)
    volumes: list[Ram | Disk] = [Ram(machine), *copied, *flash]
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
            parts = machine_state.capture(machine, with_config=False)
        job.downtime = time.monotonic() - stopped
        parts.insert(0, machine_state.config_section(machine.config))
        copy.close()
        sink.complete()
        files = {name: os.stat(folder / name).st_size for name in ["memory", *(disk.name for disk in [*disks, *flash])]}
        contents = Contents(files={name: (size, _checksums(folder / name, size)) for name, size in files.items()})
        with increments.locked(folder.parent):
            if family is not None:
                whole = {volume.name for volume in volumes if volume.number not in sink.images}
                contents = _without_parents(folder, contents, whole, family)
            parts.append(Section("contents", contents.version, encode_state(contents)))
            _write(folder / "state", sections.encode(parts))
            meta = Meta(
                name=machine.config.name, tag=tag, created=time.time(), memory=machine.config.memory,
                cpus=machine.config.cpus, stored=_stored(folder), downtime=job.downtime, parent=contents.parent,
            )  # fmt: skip
            _write(folder / "meta.json", msgspec.json.encode(meta))
            _sync_directory(folder)
            os.rename(folder, folder.parent / tag)
            _sync_directory(folder.parent)
    finally:
        copy.close()
        sink.close()


def _stored(folder: Path) -> int:
    """Bytes that it takes on the disk."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def _without_parents(folder: Path, contents: Contents, names: set[str], family: Path) -> Contents:
    """Take out of the files `names` what the last snapshot of the family has. One that is damaged is no parent."""
    last = listed(family)[-1:]
    if not last:
        return contents
    try:
        parent = Snapshot(family / last[0].tag)
        if parent.depth >= increments.MAX_DEPTH:
            return contents
        inherited = {}
        for name in sorted(names):
            size, sums = contents.files[name]
            if parent.contents.files.get(name, (0, b""))[0] == size and parent.is_plain(name):
                with Clusters(folder / name, size, sums) as ours, parent.opened(name) as theirs:
                    inherited[name] = increments.inherit(ours, theirs)
    except SnapshotError:
        return contents
    return msgspec.structs.replace(contents, version=2, parent=last[0].tag, inherited=inherited)


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
    with increments.locked(folder.parent):
        for meta in listed(folder.parent):
            if meta.parent == folder.name:
                _hand_down(folder.parent / meta.tag, meta, Snapshot(folder))
        os.rename(folder, aside / "old")  # gone at once, whole
    shutil.rmtree(aside, ignore_errors=True)


def _hand_down(folder: Path, meta: Meta, gone: Snapshot) -> None:
    """`gone`, the parent of the snapshot in `folder`, is about to be deleted: the child keeps what it needs of it. Its state
    is replaced at once, when that is there; until then it is its parent's child."""
    child = Snapshot(folder)
    inherited = {}
    for name, bits in child.contents.inherited.items():
        theirs = gone.contents.inherited.get(name, b"")
        left = increments.hand_down(folder / name, bits, gone.folder / name, theirs)
        if any(left):
            inherited[name] = left
    parent = gone.contents.parent if inherited else ""
    contents = msgspec.structs.replace(child.contents, version=2 if parent else 1, parent=parent, inherited=inherited)
    kept = {**child.sections, "contents": Section("contents", contents.version, encode_state(contents))}
    meta = msgspec.structs.replace(meta, parent=parent, stored=_stored(folder))
    for name, data in (("state", sections.encode(list(kept.values()))), ("meta.json", msgspec.json.encode(meta))):
        (folder / f".{name}").unlink(missing_ok=True)
        _write(folder / f".{name}", data)
        os.rename(folder / f".{name}", folder / name)
    _sync_directory(folder)


class Snapshot:
    """One that is there, opened for reading. SnapshotError when it is not, or its state is damaged."""

    def __init__(self, folder: Path, _depth: int = 0) -> None:
        self.folder = folder
        self._parent: Snapshot | None = None
        try:
            self.sections = sections.decode((folder / "state").read_bytes())
            self.config: MachineConfig = machine_state.read_config(self.sections)
            self.contents = decode_state(Contents, machine_state.find(self.sections, "contents").payload)
            self._check(_depth)
            self.depth: int = 0
            if self.contents.parent:
                self._parent = Snapshot(folder.parent / self.contents.parent, _depth + 1)
                self.depth = 1 + self._parent.depth
        except FileNotFoundError as error:
            raise SnapshotError(f"there is no snapshot in {folder}") from error
        except (OSError, SectionError, StateError) as error:
            raise SnapshotError(f"the snapshot in {folder} cannot be used: {error}") from error

    def _check(self, _depth: int = 0) -> None:
        require("memory" in self.contents.files, "it has no memory")
        parent = self.contents.parent
        require(not parent or places.is_name(parent), "its parent has no name that a snapshot can have")
        require(_depth <= increments.MAX_DEPTH, "too many snapshots over each other")
        for name, bits in self.contents.inherited.items():
            size = self.contents.files.get(name, (-1, b""))[0]
            require(bool(parent) and len(bits) == increments.bitmap_size(size), f"{name}: a bitmap of another size")
        for name, (size, sums) in self.contents.files.items():
            require(_NAMES.fullmatch(name) is not None, f"a file called {name!r}")
            require(len(sums) == 4 * -(-size // CLUSTER), f"{name}: wrong number of checksums")
            there = os.stat(self.folder / name).st_size
            require(there == size, f"{name}: {there} bytes instead of {size}")
        require(self.contents.files["memory"][0] == self.config.memory, "memory of another size than the machine's")
        for bank in range(len(self.config.flash)):
            size = self.contents.files.get(f"flash{bank}", (0, b""))[0]
            require(size == BANK_SIZE, f"it has no content of the flash (bank {bank})")

    def read(self, name: str, into: memoryview) -> None:
        """Put a file's clusters where they belong in `into`, which is zero. SnapshotError when one is damaged."""
        size, _ = self.contents.files[name]
        with self.opened(name) as clusters:
            for offset in clusters.offsets():
                clusters.read(offset, into[offset : min(offset + CLUSTER, size)])

    def write_disk(self, name: str, path: str) -> None:
        """Make `path` the disk that was saved as `name`: a file is replaced as a whole, at once; a block device is
        written over. It is for the caller to see that it reaches the disk. SnapshotError, OSError.
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
                    if name in self.contents.inherited:
                        raise OSError(errno.EOPNOTSUPP, "not all of it is in one file")
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
        bits = self.contents.inherited.get(name, b"")
        parent = self._parent.opened(name) if bits and self._parent is not None else None
        return Clusters(self.folder / name, size, sums, bits, parent)

    def is_plain(self, name: str) -> bool:
        """Whether byte n of the file is the disk's byte n."""
        return not name.startswith("disk") or machine_is_raw(self.config, name)


def machine_is_raw(config: MachineConfig, name: str) -> bool:
    """Whether the disk that is saved as `name` is a raw image."""
    drive = config.drives[int(name.removeprefix("disk"))]
    return format_by_name(drive.file, drive.format) == "raw"


class Clusters:
    """A checked file of a snapshot. A context manager."""

    cluster = CLUSTER

    def __init__(
        self, path: Path | str, size: int, sums: bytes, inherited: bytes = b"", parent: Clusters | None = None, fd: int = -1
    ) -> None:
        """`inherited`: the bitmap of the pages that are in the `parent` instead, which is closed with this one. `fd`: the open
        file, ours from now on."""
        self.path, self.size = path, size
        self.inherited, self._parent = inherited, parent
        self.sums = memoryview(sums).cast("I")
        self._checked = bytearray(len(self.sums))
        """1: its checksum was right when it was first read."""
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd < 0 else fd

    def chain(self) -> list[Clusters]:
        """This one, its parent, and so on."""
        return [self, *(self._parent.chain() if self._parent is not None else ())]

    def offsets(self) -> Iterator[int]:
        """Where data is; the rest is zero."""
        return (index * CLUSTER for index, wanted in enumerate(self.sums) if wanted)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with the cluster at `offset`. SnapshotError when it is damaged."""
        wanted = self.sums[offset // CLUSTER]
        done = os.preadv(self.fd, [into], offset)
        if self._parent is not None:
            self._read_inherited(offset, into)
        if wanted and (done != len(into) or not self._is_right(offset // CLUSTER, into)):
            raise SnapshotError(f"{self.path}: damaged at offset {offset:#x} (checksum does not match)")

    def _is_right(self, index: int, content: memoryview) -> bool:
        if not self._checked[index]:
            self._checked[index] = (zlib.crc32(content) or 1) == self.sums[index]
        return bool(self._checked[index])

    def _read_inherited(self, offset: int, into: memoryview) -> None:
        assert self._parent is not None
        first = offset // increments.PAGE
        wanted = increments.inherited_pages(self.inherited, first, -(-len(into) // increments.PAGE))
        if wanted:
            theirs = memoryview(bytearray(len(into)))
            self._parent.read(offset, theirs)
            for page in wanted:
                at = (page - first) * increments.PAGE
                into[at : at + increments.PAGE] = theirs[at : at + increments.PAGE]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._parent is not None:
            self._parent.close()

    def __enter__(self) -> Clusters:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
