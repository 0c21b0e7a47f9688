"""fio and iperf3 of Debian's riscv64 archive as an initramfs that stands behind the image `busybox`: what `softkvm bench io`
boots here and under QEMU.

The packages are checked as the image's are; of their libraries those are taken that the two programs need, by the
dynamic sections of the ELF files (System V ABI, chapter 5). Made once, kept beside the images.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path

from qemu_user.images import archive, cpio, deb
from qemu_user.images.download import Progress
from qemu_user.images.errors import ImageError
from qemu_user.images.store import Store

PROGRAMS = {"fio": "usr/bin/fio", "iperf3": "usr/bin/iperf3"}
"""Package -> the program in it."""
_NAME = "bench-io.cpio"
_LOADER = "ld-linux-riscv64-lp64d.so.1"
_NEEDED, _SONAME, _STRTAB = 1, 14, 5
_DYNAMIC, _LOAD = 2, 1


def ensure(progress: Progress) -> Path:
    """The archive, made when it is not there. ImageError."""
    target = Store().folder / _NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as name:
        folder = Path(name)
        listed = {package["Package"]: package for package in archive.packages(folder, progress)[0]}
        programs: dict[str, bytes] = {}
        libraries: dict[str, bytes] = {}
        for package in _closure(listed, PROGRAMS):
            for path, content in deb.members(archive.fetch(listed[package], folder, progress)):
                if path == PROGRAMS.get(package):
                    programs[path] = content
                elif "/lib/" in f"/{path}" and ".so" in path and content[:4] == b"\x7fELF":
                    libraries.setdefault(_soname(content) or os.path.basename(path), content)
        made = folder / _NAME
        made.write_bytes(_pack(programs, libraries))
        made.rename(target)
    return target


def script() -> bytes:
    """The guest's first process, with this version's measurements, as an archive to stand behind the others."""
    extra = cpio.Archive()
    extra.file("init", files("qemu_user.bench").joinpath("io_guest.sh").read_bytes(), 0o755)
    extra.file("etc/udhcpc.script", files("qemu_user.images").joinpath("udhcpc.sh").read_bytes(), 0o755)
    return extra.finish()


def _closure(listed: dict[str, dict[str, str]], wanted: Iterable[str]) -> list[str]:
    """The packages and the libraries that they depend on, directly or not."""
    found: list[str] = []
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in listed:
            raise ImageError(f"{archive.mirror()}: {archive.SUITE} has no package {name}")
        found.append(name)
        for needed in listed[name].get("Depends", "").split(","):
            first = needed.split("|")[0].split("(")[0].split(":")[0].strip()
            if "lib" in first and first in listed:
                waiting.append(first)
    return found


def _pack(programs: dict[str, bytes], libraries: dict[str, bytes]) -> bytes:
    made = cpio.Archive()
    for path, content in programs.items():
        made.file(path, content, 0o755)
    needed, waiting = {_LOADER}, [*programs.values()]
    while waiting:
        for name in _needed(waiting.pop()):
            if name not in needed and name in libraries:
                needed.add(name)
                waiting.append(libraries[name])
    for name in sorted(needed):
        if name not in libraries:
            raise ImageError(f"the packages of fio and iperf3 lack {name}")
        made.file(f"lib/{name}", libraries[name], 0o755)
    return made.finish()


# -- ELF ---------------------------------------------------------------------------------------------------


def _dynamic(content: bytes) -> Iterator[tuple[int, str]]:
    """(tag, string) of the entries of the dynamic section that name something."""
    (headers,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    segments = [struct.unpack_from("<IIQQQQ", content, headers + size * index) for index in range(count)]
    entries = [
        struct.unpack_from("<QQ", content, at)
        for kind, _, offset, _, _, length in segments if kind == _DYNAMIC
        for at in range(offset, offset + length, 16)
    ]  # fmt: skip
    tables = [value for tag, value in entries if tag == _STRTAB]
    if not tables:
        return
    start = next(offset + tables[0] - address for kind, _, offset, address, _, length in segments
                 if kind == _LOAD and address <= tables[0] < address + length)  # fmt: skip
    for tag, value in entries:
        if tag in (_NEEDED, _SONAME):
            at = start + value
            yield tag, content[at : content.index(b"\0", at)].decode()


def _needed(content: bytes) -> list[str]:
    return [name for tag, name in _dynamic(content) if tag == _NEEDED]


def _soname(content: bytes) -> str:
    return next((name for tag, name in _dynamic(content) if tag == _SONAME), "")
