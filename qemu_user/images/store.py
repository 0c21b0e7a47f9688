"""Where images lie: one folder each under $XDG_CACHE_HOME/softkvm/images, made whole or not at all.

`Store().ensure("busybox")` builds what is missing under a lock, in a temporary folder that is renamed at the end.
With a warm cache nothing is fetched. Called by qemu_user/cli.
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from qemu_user.images import cpio
from qemu_user.images.boot_files import KERNEL_OPTIONS, SYSTEMD_OPTIONS, add_scripts
from qemu_user.images.errors import ImageError

if TYPE_CHECKING:
    from qemu_user.images.download import Progress


class Recipe(NamedTuple):
    """An image that can be made, by the module of its name. `append`: kernel options."""

    text: str
    append: str
    disk: bool = False
    """Whether it has a system on a disk (root.sh), of which each VM has its own."""
    firmware: bool = False
    """Whether it is for the flash (edk2.py), and has neither kernel nor /init."""


#: One line for each image that can be pulled.
CATALOGUE = {
    "busybox": Recipe("Debian's kernel with busybox, boots in seconds", KERNEL_OPTIONS),
    "debian": Recipe("Debian 13 with systemd, sshd and apt, on a disk", f"{KERNEL_OPTIONS} {SYSTEMD_OPTIONS}", disk=True),
    "edk2": Recipe("UEFI firmware, boots what is on --drive", "", firmware=True),
}
_FORMAT = 2
#: Names in the folder of an image that is firmware: what the flash holds.
CODE, VARIABLES = "code.fd", "vars.fd"
#: Name of the disk in an image's folder, and in a VM's.
DISK = "disk.qcow2"
#: Beginning of the names of folders that are being built.
_NEW = ".new-"


class Meta(msgspec.Struct, frozen=True):
    """What is known of an image; meta.json in its folder."""

    format: int
    name: str
    verified: str
    built: float


class Image(msgspec.Struct, frozen=True):
    """An image that is there."""

    name: str
    folder: Path
    meta: Meta

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    @property
    def initrd(self) -> Path:
        return self.folder / "initrd"

    @property
    def append(self) -> str:
        """Kernel options; this version's, as /init is, whichever has built the image."""
        return CATALOGUE[self.meta.name].append

    @property
    def disk(self) -> Path:
        """The image's disk, over which VMs have theirs; images that live in memory have none."""
        return self.folder / DISK

    @property
    def firmware(self) -> Path:
        """What the flash holds, of an image that is firmware."""
        return self.folder / CODE

    @property
    def own(self) -> Path:
        """What each VM has of its own: the disk, or the firmware's variables."""
        return self.folder / VARIABLES if self.firmware.exists() else self.disk

    def extra(self, name: str) -> Path:
        """The archive of additional modules of that name (busybox.EXTRAS); images of earlier versions lack it."""
        return self.folder / f"modules-{name}"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())


def load(folder: Path, name: str) -> Image | None:
    """The image in this folder, if it is there and whole."""
    try:
        meta = msgspec.json.decode((folder / "meta.json").read_bytes(), type=Meta)
    except (OSError, msgspec.MsgspecError):
        return None
    image = Image(name, folder, meta)
    system = image.kernel.is_file() and image.initrd.is_file()
    whole = system or (image.firmware.is_file() and image.own.is_file())
    return image if whole and meta.format == _FORMAT and meta.name in CATALOGUE else None


class Store:
    """The images of this user."""

    def __init__(self, folder: Path | None = None) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        self.folder = folder or Path(cache) / "softkvm" / "images"

    def find(self, name: str) -> Image | None:
        """The image, if it is there and whole."""
        return load(self.folder / name, name)

    def images(self) -> list[Image]:
        """All images that are there."""
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        return [image for name in names if (image := self.find(name)) is not None]

    def ensure(self, name: str, progress: Progress, renew: bool = False, extras: Sequence[str] = ()) -> Image:
        """The image, built if it is not there or lacks one of `extras` (or anew). ImageError."""
        if name not in CATALOGUE:
            raise ImageError(f"no image {name!r}; there are: {', '.join(CATALOGUE)}")
        if not renew and (image := self._find_with(name, extras)) is not None:
            return image
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f".lock-{name}", "w") as lock:
                _wait_for(lock, name)
                self._clear(name)
                if not renew and (image := self._find_with(name, extras)) is not None:
                    return image  # somebody else has just built it
                self._build(name, progress)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = ": an image needs up to 1.5 GB while it is built" if full else ""
            raise ImageError(
                f"cannot build image {name!r} in {self.folder}: {error.strerror}{hint} (XDG_CACHE_HOME chooses another place)"
            ) from error
        image = self.find(name)
        if image is None:
            raise ImageError(f"image {name!r} is not whole after it was built; look into {self.folder}")
        return image

    def _find_with(self, name: str, extras: Sequence[str]) -> Image | None:
        image = self.find(name)
        return image if image and all(image.extra(extra).is_file() for extra in extras) else None

    def _build(self, name: str, progress: Progress) -> None:
        recipe = importlib.import_module(f"qemu_user.images.{name}")
        temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f"{_NEW}{name}-"))
        try:
            verified: str = recipe.build(temporary, progress)  # into the empty folder; how its parts were verified
            meta = Meta(_FORMAT, name, verified, time.time())
            (temporary / "meta.json").write_bytes(msgspec.json.encode(meta))
            place = self.folder / name
            if place.exists():
                place.rename(temporary.with_name(f".old-{temporary.name.removeprefix(_NEW)}"))
            temporary.rename(place)
        finally:
            self._clear(name)

    def _clear(self, name: str) -> None:
        """Remove what an interrupted build of the image has left, and the image that was replaced. The lock is held."""
        for left in self.folder.iterdir():
            if left.name.startswith((f"{_NEW}{name}-", f".old-{name}-")) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)


def _wait_for(lock: IO[str], name: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.stderr.write(f"softkvm: another softkvm makes the image {name}; waiting for it\n")
        fcntl.flock(lock, fcntl.LOCK_EX)


def settings(values: Mapping[str, str]) -> bytes:
    """A cpio archive with /init and /softkvm.conf: shell assignments that it reads."""
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    extra = cpio.Archive()
    add_scripts(extra)
    extra.file("softkvm.conf", text.encode(), 0o600)
    return extra.finish()


def command_line(command: Sequence[str]) -> str:
    """A command as the guest's shell gets it: every word quoted, the shell replaced by it."""
    return "exec " + shlex.join(command)
