"""The disk of a VM of an image that has one: an overlay over the image's, kept under the VM's name or gone with the VM.

A kept VM is a folder $XDG_DATA_HOME/softkvm/vms/NAME with everything it boots from, hard links to the image's files and its
own overlay: neither a renewed image nor an empty cache changes it. A throw-away one lies in the cache until its VM ends; what a
killed one leaves is cleared by the next. Called by `softkvm run` and `softkvm disks`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qemu_user.backends.block import opening
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.errors import BackendError
from qemu_user.images.errors import ImageError
from qemu_user.images.store import DISK, Image, Store, load

_NEW = ".new-"
_SECTOR = 512
_BASE = "base.qcow2"
_BOOTED = "booted"


@dataclass(frozen=True)
class VmDisk:
    """`new`: it has not booted yet, so first-boot settings apply."""

    image: Image
    """What the VM boots from: the kept copy."""
    disk: Path
    """Of firmware: its variables."""
    new: bool
    kept: bool
    login: str = "root"
    """The user for whom its first boot was."""

    def booted(self, login: str) -> None:
        """The system on it has begun to boot: its first boot, for the user `login`, is over."""
        if self.kept:
            (self.disk.parent / _BOOTED).write_text(login)

    def discard(self) -> None:
        """The VM has ended: a throw-away disk goes."""
        if not self.kept:
            shutil.rmtree(self.disk.parent, ignore_errors=True)


def kept_folder() -> Path:
    """Where VMs with a name are kept."""
    value = os.environ.get("XDG_DATA_HOME", "")
    return (Path(value) if os.path.isabs(value) else Path.home() / ".local/share") / "softkvm" / "vms"


def find_kept(name: str) -> Image | None:
    """What the kept VM of that name boots from."""
    return load(kept_folder() / name, name)


def kept() -> list[Image]:
    """All kept VMs by name."""
    folder = kept_folder()
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [image for name in names if not name.startswith(".") and (image := find_kept(name)) is not None]


def remove(name: str) -> None:
    """Delete a kept VM. ImageError: it runs, or there is none."""
    folder = kept_folder() / name
    there = find_kept(name)
    if there is None:
        raise ImageError(f"no VM {name!r} is kept; softkvm disks lists them")
    with _lock(there.own) as free:
        if not free:
            raise ImageError(f"VM {name}: is running; softkvm stop {name} ends it")
        gone = folder.with_name(f"{_NEW}gone-{name}-{os.getpid()}")
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def open_disk(image: Image, name: str, keep: bool, size: int) -> VmDisk:
    """The disk of the VM `name`: the kept one, or a new one of `size` bytes (0: as the image has it, or as it is).
    ImageError, with nothing left behind.
    """
    size = -(-size // _SECTOR) * _SECTOR
    try:
        if keep and (there := find_kept(name)) is not None:
            if there.disk.exists():
                _grow(there.disk, size)
            booted = there.folder / _BOOTED
            login = booted.read_text() if booted.exists() else ""
            return VmDisk(there, there.own, not booted.exists(), True, login or "root")
        folder = kept_folder() if keep else Store().folder.with_name("scratch")
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder, keep)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f"{_NEW}{os.getpid()}-"))
        try:
            _fill(temporary, image, keep, size)
            place = folder / (name if keep else f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
            temporary.rename(place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        own = load(place, name) if keep else image
        assert own is not None
        return VmDisk(own, place / image.own.name, True, keep)
    except BackendError as error:
        raise ImageError(f"VM {name}: {error}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; softkvm disks lists what is kept" if full else ""
        raise ImageError(f"VM {name}: cannot make its disk: {error.strerror}{hint}") from error


def _fill(folder: Path, image: Image, keep: bool, size: int) -> None:
    if keep:
        for path in image.folder.iterdir():
            if path not in (image.own, image.folder / "meta.json") and path.is_file():
                _link(path, folder / path.name)
        (folder / "meta.json").write_bytes(msgspec.json.encode(image.meta))
    if image.firmware.exists():
        shutil.copyfile(image.own, folder / image.own.name)
        return
    _link(image.disk, folder / _BASE)
    with contextlib.closing(opening.open_disk(str(image.disk), readonly=True)) as template:
        least = template.size
    _check_size(size, least)
    create_qcow2(folder / DISK, size or least, _BASE, "qcow2")


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file systems differ."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        shutil.copyfile(source, target)


def _check_size(size: int, least: int) -> None:
    if size and size < least:
        raise ImageError(f"--disk-size: the disk has {least / (1 << 30):g} GiB already, and does not become smaller")


def _grow(disk: Path, size: int) -> None:
    if not size:
        return
    with contextlib.closing(opening.open_disk(str(disk))) as image:
        _check_size(size, image.size)
        if size > image.size:
            image.resize(size)
            image.flush()


def _clear(folder: Path, keep: bool) -> None:
    """Remove what killed processes have left: copies that were not complete, and disks of VMs that are gone."""
    for path in folder.iterdir():
        words = path.name.removeprefix(_NEW).removeprefix("gone-").split("-")
        if (keep and not path.name.startswith(_NEW)) or _alive(words[0]):
            continue
        with _lock(path / DISK) as free:  # a VM that has moved to another process has it
            if free:
                shutil.rmtree(path, ignore_errors=True)


def _alive(pid: str) -> bool:
    return pid.isdigit() and os.path.exists(f"/proc/{pid}")


@contextlib.contextmanager
def _lock(disk: Path) -> Iterator[bool]:
    """Whether no VM has the disk open, and none will meanwhile."""
    if not disk.exists():
        yield True
        return
    try:
        image = RawImage(str(disk))
    except BackendError:
        yield False
        return
    try:
        yield True
    finally:
        image.close()
