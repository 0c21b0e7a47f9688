"""The root file system of a Debian as one tar: packages unpacked as dpkg would, and dpkg's own record of that.

Every package is then "unpacked" (deb-version(7), dpkg(1)): `dpkg --configure -a` inside the guest does the rest. Directories
are merged into /usr, as base-files has it since Debian 13. Called by debian.py; the guest reads the tar from a disk.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from types import TracebackType
from typing import IO

from qemu_user.images import deb
from qemu_user.images.dependencies import Package
from qemu_user.images.errors import ImageError

#: Links into /usr (UsrMerge).
MERGED = ("bin", "sbin", "lib")
_INFO = "var/lib/dpkg/info"


class RootTar:
    """Written from front to back into `file`. A context manager; its end completes the archive."""

    def __init__(self, file: IO[bytes], time: int) -> None:
        """`time`: modification time of what no package brings."""
        self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT)
        self._time = time
        self._folders: set[str] = set()
        self._status: list[str] = []

    def __enter__(self) -> RootTar:
        for name in MERGED:
            self.folder(f"usr/{name}")
            self.link(name, f"usr/{name}")
        for name in ("etc", "var", "var/lib", "var/lib/dpkg", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", _INFO):
            self.folder(name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.file("var/lib/dpkg/status", "".join(self._status).encode())
            self.file("var/lib/dpkg/available", b"")
            self.file(f"{_INFO}/format", b"1\n")
            self._tar.close()

    def package(self, path: Path, package: Package) -> None:
        """Unpack a .deb. ImageError."""
        listed, sums = ["/."], {}
        for entry, content in deb.entries(path):
            name = entry.name.rstrip("/")
            if name in ("", "."):
                continue
            listed.append(f"/{name}")
            if entry.isfile():
                sums[name] = hashlib.md5(content, usedforsecurity=False).hexdigest()
            self._add(entry, name, content)
        self._record(path, package, listed, sums)

    def _add(self, entry: tarfile.TarInfo, name: str, content: bytes) -> None:
        entry.name = merged(name)
        if entry.islnk():
            entry.linkname = merged(entry.linkname.removeprefix("./"))
        entry.uname = entry.gname = ""  # numbers count: the guest's names are not there yet
        if entry.isdir():
            if entry.name in self._folders or entry.name in MERGED:
                return
            self._folders.add(entry.name)
        elif entry.name in MERGED:
            return  # base-files' own links are those that are there
        self._tar.addfile(entry, io.BytesIO(content) if entry.isfile() else None)

    def _record(self, path: Path, package: Package, listed: list[str], sums: dict[str, str]) -> None:
        """What dpkg notes of an unpacked package: the paragraph in its status and the files in its info folder."""
        name = package["Package"]
        if package.get("Multi-Arch") == "same":
            name += f":{package['Architecture']}"
        paragraph = conffiles = ""
        for entry, content in deb.entries(path, "control"):
            if not entry.isfile():
                continue
            if entry.name == "control":
                paragraph = content.decode().rstrip("\n") + "\n"
                continue
            self.file(f"{_INFO}/{name}.{entry.name}", content, entry.mode & 0o755)
            if entry.name == "conffiles":
                for line in content.decode().splitlines():
                    file = line.split()[-1] if line.strip() else ""
                    if file.lstrip("/") in sums:
                        conffiles += f" {file} {sums[file.lstrip('/')]}\n"
        self.file(f"{_INFO}/{name}.list", "".join(f"{line}\n" for line in listed).encode())
        head, _, rest = paragraph.partition("\n")
        if not head.startswith("Package:"):
            raise ImageError(f"{path.name}: its control file does not begin with the package's name")
        paragraph = f"{head}\nStatus: install ok unpacked\n{rest}"
        self._status.append(paragraph + (f"Conffiles:\n{conffiles}" if conffiles else "") + "\n")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """A regular file of root's; its folders are made."""
        self._parents(name)
        entry = self._entry(name, tarfile.REGTYPE, mode)
        entry.size = len(content)
        self._tar.addfile(entry, io.BytesIO(content))

    def folder(self, name: str, mode: int = 0o755) -> None:
        self._parents(name)
        if name not in self._folders:
            self._folders.add(name)
            self._tar.addfile(self._entry(name, tarfile.DIRTYPE, mode))

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self._parents(name)
        entry = self._entry(name, tarfile.SYMTYPE, 0o777)
        entry.linkname = target
        self._tar.addfile(entry)

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent and parent not in self._folders:
            self.folder(parent)

    def _entry(self, name: str, kind: bytes, mode: int) -> tarfile.TarInfo:
        entry = tarfile.TarInfo(name)
        entry.type, entry.mode, entry.mtime = kind, mode, self._time
        return entry


def merged(name: str) -> str:
    """Where a file of that name lies on a merged /usr: bin/x is usr/bin/x."""
    head, slash, _ = name.partition("/")
    return f"usr/{name}" if slash and head in MERGED else name
