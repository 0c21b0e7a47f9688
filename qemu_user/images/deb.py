"""Debian binary packages: an `ar` archive with a compressed tar inside (deb(5)). Reads only; hostile input raises.

Called by busybox.py on files whose sha256 has been checked.
"""

from __future__ import annotations

import io
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from qemu_user.images.errors import ImageError

_AR_MAGIC = b"!<arch>\n"


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._at, self._end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        self._file.seek(self._at)
        data = self._file.read(min(len(view), self._end - self._at))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name without leading "./", content) of every regular file in the package, in order. ImageError."""
    for entry, content in entries(path):
        if entry.isfile():
            yield entry.name, content


def entries(path: Path, part: str = "data") -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Everything in the package's data.tar, or control.tar, in order: (the entry, its name without leading "./"; the content
    of a regular file, else b""). ImageError.
    """
    try:
        with path.open("rb") as file:
            name, start, size = _part(file, path, part)
            raw = io.BufferedReader(_Window(file, start, size), 1 << 20)
            stream = lzma.LZMAFile(raw) if name.endswith(".xz") else raw
            mode = "r|" if name.endswith((".xz", ".tar")) else "r|*"
            with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    member.name = member.name.removeprefix("./")
                    yield member, content.read() if content else b""
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise ImageError(f"{path.name}: not a package that can be unpacked ({error})") from error


def _part(file: IO[bytes], path: Path, part: str) -> tuple[str, int, int]:
    """Name, offset and size of the member data.tar.* or control.tar.*."""
    if file.read(8) != _AR_MAGIC:
        raise ImageError(f"{path.name}: not a Debian package")
    at = 8
    while True:
        file.seek(at)
        header = file.read(60)
        if len(header) < 60 or header[58:] != b"`\n":
            raise ImageError(f"{path.name}: a damaged Debian package")
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if size < 0:
            raise ImageError(f"{path.name}: a damaged Debian package")
        if name.startswith(f"{part}.tar"):
            return name, at + 60, size
        at += 60 + size + (size & 1)
