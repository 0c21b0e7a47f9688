"""Opening disks by name: which format, which backing files; making overlays.

Formats are never guessed from what a guest may have written: without format= an image is qcow2 if its name ends in
.qcow2 and raw if it has no qcow2 header; anything else has to be said. Read by machine/build.py and the `image` verb.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import closing
from typing import Any

from qemu_user.backends.block.direct import DirectImage
from qemu_user.backends.block.filter import Filter
from qemu_user.backends.block.nbd.disk import RECONNECT_SECONDS, NbdDisk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.qcow2.header import CORRUPT, DIRTY, MAGIC
from qemu_user.backends.block.qcow2.image import Qcow2Image, read_header
from qemu_user.backends.block.raw import SECTOR, BlockBackend, RawImage, unheard
from qemu_user.backends.block.write_through import WriteThrough
from qemu_user.backends.errors import BackendError

FORMATS = ("raw", "qcow2")
CACHES = ("writeback", "none", "writethrough", "directsync", "unsafe")
"""QEMU's cache modes: none and directsync go past the host's page cache, writethrough and directsync have every write on the
disk when it is done, unsafe ignores flushes."""
MAX_CHAIN = 200
"""Images over each other."""


def open_disk(
    file: str,
    format: str = "",
    readonly: bool = False,
    discard: bool = True,
    locked: bool = True,
    cache: str = "writeback",
    reconnect: float = RECONNECT_SECONDS,
) -> BlockBackend:
    """A disk from what a user calls it. Not `locked`: somebody else still has it, and nothing is written before lock().
    `cache`: of CACHES. `reconnect`: seconds for which requests wait for an NBD server that has gone. BackendError.
    """
    if is_nbd(file):
        if format not in ("", "raw"):
            raise BackendError(f"disk {file}: what an NBD server has is raw: the server reads {format}")
        return NbdDisk(file, readonly, discard, cache in ("writethrough", "directsync"), reconnect)
    disk = _open(file, format, readonly, discard, locked, [], cache)
    return WriteThrough(disk) if cache in ("writethrough", "directsync") and not readonly else disk


def _open(
    file: str,
    format: str,
    readonly: bool,
    discard: bool,
    locked: bool,
    chain: list[tuple[int, int]],
    cache: str = "writeback",
) -> BlockBackend:
    image = (DirectImage if cache in ("none", "directsync") else RawImage)(file, readonly, discard, locked)
    image.syncs = cache != "unsafe"
    try:
        format = format or probe(image)
        if format == "raw":
            return image
        if format != "qcow2":
            raise BackendError(f"disk image {file}: format {format!r}: one of {', '.join(FORMATS)}")
        assert image.descriptor is not None
        status = os.fstat(image.descriptor)
        chain = [*chain, (status.st_dev, status.st_ino)]
        backing = _open_backing(image, file, chain)
        try:
            return Qcow2Image(image, backing, discard, locked)
        except BaseException:
            if backing is not None:
                backing.close()
            raise
    except BaseException:
        image.close()
        raise


def _open_backing(image: RawImage, file: str, chain: list[tuple[int, int]]) -> BlockBackend | None:
    header = read_header(image)
    if not header.backing_file:
        return None
    path = backing_path(file, header.backing_file)
    if is_nbd(path):
        return NbdDisk(path, readonly=True)
    try:
        status = os.stat(path)
    except OSError as error:
        raise BackendError(f"disk image {file}: its backing file {shown(path)}: {error.strerror}") from error
    if (status.st_dev, status.st_ino) in chain:
        raise BackendError(f"disk image {file}: its backing file {shown(path)} is one of those over it: a loop")
    if len(chain) >= MAX_CHAIN:
        raise BackendError(f"disk image {file}: more than {MAX_CHAIN} images over each other")
    return _open(path, header.backing_format, True, False, True, chain)


def is_nbd(file: str) -> bool:
    """Whether this names an NBD server's disk and not a file."""
    return file.startswith(("nbd:", "nbd+", "nbds:", "nbds+"))


def shown(text: str) -> str:
    """A name out of an image, as it may be written to a terminal."""
    return text if text.isprintable() else ascii(text)


def backing_path(image: str, name: str) -> str:
    """The path (or NBD address) of a backing file that the header of `image` calls `name`. BackendError."""
    if is_nbd(name):
        return name
    protocol = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name)
    if protocol and protocol[0] != "file:":
        raise BackendError(f"disk image {image}: its backing file {shown(name[:80])}: {protocol[0]} is not supported")
    name = name.removeprefix("file:")
    return os.path.join(os.path.dirname(os.path.realpath(image)), name)


def probe(image: RawImage) -> str:
    """The format of an image for which none was said. BackendError where guessing is not safe."""
    head = bytearray(len(MAGIC))
    image.read(0, [memoryview(head)])
    named = image.path.endswith(".qcow2")
    if (head == MAGIC) != named:
        what = "does not begin as a qcow2 image does" if named else "begins as a qcow2 image does"
        raise BackendError(f"disk image {image.path}: {what}: say format=qcow2 or format=raw")
    return "qcow2" if named else "raw"


def qcow2_of(disk: object) -> Qcow2Image | None:
    """The image of a VM's disk, if it is a qcow2 one."""
    image = disk
    while isinstance(image, Filter):
        image = image.image
    return image if isinstance(image, Qcow2Image) else None


def format_by_name(file: str, format: str) -> str:
    """The format of an image that was opened without one being said."""
    return format or ("qcow2" if file.endswith(".qcow2") else "raw")


def create_overlay(
    base: str | os.PathLike[str],
    path: str | os.PathLike[str],
    size: int | None = None,
    base_format: str = "",
    stored: str = "",
) -> None:
    """A new qcow2 image at `path` that shows `base` (raw or qcow2) until it is written to. `size`: in bytes, at least the
    base's; None: the base's. `base` must not change as long as there are overlays over it. `stored`: what the overlay calls
    it, if not by its absolute path. BackendError.
    """
    base = os.fspath(base) if is_nbd(os.fspath(base)) else os.path.abspath(base)
    disk = open_disk(base, base_format, readonly=True)
    try:
        base_format = "qcow2" if isinstance(disk, Qcow2Image) else "raw"
        least = disk.size
    finally:
        disk.close()
    if size is None:
        size = least
    elif size < least:
        raise BackendError(f"disk image {os.fspath(path)}: {size} bytes are less than the {least} of {base}")
    create_qcow2(path, -(-size // SECTOR) * SECTOR, stored or base, base_format)


def describe(file: str, format: str = "") -> list[dict[str, Any]]:
    """What is known of an image and those beneath it, the top one first. BackendError."""
    layers: list[dict[str, Any]] = []
    top = open_disk(file, format, readonly=True)
    with closing(top):
        disk: BlockBackend | None = top
        while isinstance(disk, Qcow2Image):
            header = disk.header
            layer = {"file": disk.path, "format": "qcow2", "size": disk.size, "stored": _stored(disk.path)}
            layer |= {"version": header.version, "cluster_size": header.cluster_size}
            layer |= {"backing_file": header.backing_file, "backing_format": header.backing_format}
            layer |= {"snapshots": header.nb_snapshots, "dirty": bool(header.incompatible & DIRTY)}
            layer |= {"damaged": bool(header.incompatible & CORRUPT)}
            layers.append({name: value for name, value in layer.items() if value not in ("", 0, False)})
            disk = disk.backing
        if isinstance(disk, NbdDisk):
            layers.append({"file": disk.path, "format": "raw", "size": disk.size})
        if isinstance(disk, RawImage):
            layers.append({"file": disk.path, "format": "raw", "size": disk.size, "stored": _stored(disk.path)})
    return layers


def _stored(path: str) -> int:
    """Bytes that a file takes."""
    return 512 * os.stat(path).st_blocks


class Beneath:
    """Stands for a backing file that is not opened: an image over it can be asked only for what is its own."""

    size = 1 << 62
    readonly, discard, descriptor = True, False, None

    def __init__(self) -> None:
        self.report = unheard

    def _refuse(self, *arguments: object) -> None:
        raise OSError(errno.EINVAL, "the backing file is not open")

    read = write = punch = zero = resize = _refuse

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        return bytearray()

    def _nothing(self) -> None:
        pass

    flush = lock = unlock = close = _nothing


def opened_alone(file: str, readonly: bool = True) -> Qcow2Image:
    """A qcow2 image without its backing files, for those who want what is its own. BackendError."""
    image = RawImage(file, readonly)
    try:
        beneath: Any = Beneath() if read_header(image).backing_file else None
        return Qcow2Image(image, beneath, discard=False)
    except BaseException:
        image.close()
        raise
