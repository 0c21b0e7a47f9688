"""The root file system as a tar: merged /usr, owners and modes kept, dpkg's record of unpacked packages."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from qemu_user.images.errors import ImageError
from qemu_user.images.root_tar import RootTar, merged

CONTROL = """Package: thing
Version: 1.0-1
Architecture: riscv64
Multi-Arch: same
Maintainer: Nobody <nobody@example.org>
Description: a thing
 of two lines
"""


def make_tar(entries: list[tuple[str, bytes, bytes, int, str]]) -> bytes:
    """Of (name, type, content, mode, link target); everything belongs to 7:8."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, kind, content, mode, target in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mode, info.linkname = kind, len(content), mode, target
            info.uid, info.gid, info.uname = 7, 8, "somebody"
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def make_deb(path: Path, control: str = CONTROL) -> Path:
    scripts = [("./control", tarfile.REGTYPE, control.encode(), 0o644, ""),
               ("./conffiles", tarfile.REGTYPE, b"/etc/thing.conf\n/etc/not-there\n", 0o644, ""),
               ("./postinst", tarfile.REGTYPE, b"#!/bin/sh\n", 0o755, "")]  # fmt: skip
    files = [("./", tarfile.DIRTYPE, b"", 0o755, ""), ("./bin", tarfile.DIRTYPE, b"", 0o755, ""),
             ("./bin/thing", tarfile.REGTYPE, b"program", 0o4755, ""),
             ("./bin/same", tarfile.LNKTYPE, b"", 0o755, "./bin/thing"),
             ("./usr/lib/l.so", tarfile.SYMTYPE, b"", 0o777, "l.so.1"),
             ("./etc/thing.conf", tarfile.REGTYPE, b"a=1\n", 0o640, "")]  # fmt: skip
    data = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", make_tar(scripts)), ("data.tar.xz", make_tar(files))):
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    path.write_bytes(data)
    return path


@pytest.fixture
def root(tmp_path: Path) -> tarfile.TarFile:
    deb = make_deb(tmp_path / "thing.deb")
    with (tmp_path / "root.tar").open("wb") as file, RootTar(file, 5) as tar:
        tar.package(deb, {"Package": "thing", "Multi-Arch": "same", "Architecture": "riscv64"})
        tar.file("etc/own", b"x", 0o600)
    return tarfile.open(tmp_path / "root.tar")


def content(root: tarfile.TarFile, name: str) -> bytes:
    file = root.extractfile(name)
    assert file is not None
    return file.read()


def test_merged_names() -> None:
    assert [merged(name) for name in ("bin/sh", "sbin", "lib/x/y", "etc/x", "libexec/z")] == [
        "usr/bin/sh", "sbin", "usr/lib/x/y", "etc/x", "libexec/z",
    ]  # fmt: skip


def test_files_lie_under_usr_with_their_owners_and_modes(root: tarfile.TarFile) -> None:
    assert root.getmember("bin").issym()
    assert root.getmember("bin").linkname == "usr/bin"
    thing = root.getmember("usr/bin/thing")
    assert (thing.mode, thing.uid, thing.gid, thing.uname) == (0o4755, 7, 8, "")
    assert content(root, "usr/bin/thing") == b"program"
    assert root.getmember("usr/bin/same").linkname == "usr/bin/thing"
    assert root.getmember("usr/lib/l.so").linkname == "l.so.1"
    assert root.getmember("etc/own").mode == 0o600
    names = root.getnames()
    assert len(names) == len(set(names))
    folders = {"", *(member.name for member in root if member.isdir())}
    assert all(name.rpartition("/")[0] in folders for name in names), "a file comes before its folder"


def test_dpkg_knows_the_package_as_unpacked(root: tarfile.TarFile) -> None:
    status = content(root, "var/lib/dpkg/status").decode()
    assert status.startswith("Package: thing\nStatus: install ok unpacked\nVersion: 1.0-1\n")
    md5 = hashlib.md5(b"a=1\n", usedforsecurity=False).hexdigest()
    assert f" of two lines\nConffiles:\n /etc/thing.conf {md5}\n\n" in status
    assert "/etc/not-there" not in status
    info = "var/lib/dpkg/info/thing:riscv64"
    assert content(root, f"{info}.list").decode().splitlines()[:3] == ["/.", "/bin", "/bin/thing"]
    assert root.getmember(f"{info}.postinst").mode == 0o755
    assert content(root, f"{info}.conffiles").startswith(b"/etc/thing.conf")


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="needs dpkg (Debian)")
def test_dpkg_itself_reads_the_record(root: tarfile.TarFile, tmp_path: Path) -> None:
    root.extractall(tmp_path / "root", filter="fully_trusted" if hasattr(tarfile, "data_filter") else None)
    done = subprocess.run(
        ["dpkg-query", f"--admindir={tmp_path}/root/var/lib/dpkg", "-W", "-f", "${Package} ${db:Status-Status} ${Conffiles}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("thing unpacked")
    assert "/etc/thing.conf" in done.stdout


def test_a_control_file_that_begins_with_something_else(tmp_path: Path) -> None:
    deb = make_deb(tmp_path / "thing.deb", "Version: 1\nPackage: thing\n")
    with (tmp_path / "root.tar").open("wb") as file, pytest.raises(ImageError, match="package's name"), RootTar(file, 0) as tar:
        tar.package(deb, {"Package": "thing"})
