"""The initramfs and the Debian packages, byte by byte; packages that are damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from qemu_user.images import cpio, deb
from qemu_user.images.errors import ImageError


def test_newc_entry() -> None:
    archive = cpio.Archive()
    archive.file("f", b"abc", 0o755)
    head = b"070701" + b"00000001" + b"000081ed" + b"00000000" * 2 + b"00000001" + b"00000000" + b"00000003"
    head += b"00000000" * 4 + b"00000002" + b"00000000"
    data = archive.finish()
    assert data[:116] == head + b"f\0abc\0"
    assert data[116 + 110 :].startswith(b"TRAILER!!!\0")
    assert len(data) % 512 == 0


def test_folders_are_made_once() -> None:
    archive = cpio.Archive()
    archive.file("a/b/f", b"")
    archive.file("a/b/g", b"")
    data = archive.finish()
    assert [data.count(name) for name in (b"a\0", b"a/b\0", b"a/b/f\0", b"a/b/g\0")] == [1, 1, 1, 1]


def package(path: Path, compression: str = "xz") -> bytes:
    """A Debian package with one file, ./boot/x."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{compression}") as archive:
        info = tarfile.TarInfo("./boot/x")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))
    result = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), (f"data.tar.{compression}", tar.getvalue())):
        result += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        result += content + bytes(len(content) & 1)
    path.write_bytes(result)
    return result


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_members(tmp_path: Path, compression: str) -> None:
    package(tmp_path / "p.deb", compression)
    assert list(deb.members(tmp_path / "p.deb")) == [("boot/x", b"hello")]


def test_damaged_packages(tmp_path: Path) -> None:
    path = tmp_path / "p.deb"
    whole = package(path)
    refused = 0
    for cut in range(len(whole)):  # never a part of what was inside; what is missing may be the end of xz alone
        path.write_bytes(whole[:cut])
        try:
            assert list(deb.members(path)) == [("boot/x", b"hello")]
        except ImageError:
            refused += 1
    assert refused >= len(whole) - 36
    path.write_bytes(whole.replace(b"\xfd7zXZ", b"\xfd7zXY"))
    with pytest.raises(ImageError, match=r"p\.deb"):
        list(deb.members(path))
