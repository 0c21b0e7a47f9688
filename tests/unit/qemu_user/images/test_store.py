"""Images are there whole or not at all: a failed builder, a full disk, remains of a killed one, a warm cache."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from qemu_user.images import store
from qemu_user.images.download import Progress, download
from qemu_user.images.errors import ImageError
from qemu_user.images.store import Store

LIMIT = 1 << 20


def quiet(what: str, done: int, total: int) -> None:
    pass


def catalogue(monkeypatch: pytest.MonkeyPatch, source: Path) -> list[Path]:
    """The image `small`, fetched from `source`; the list grows with every build."""
    builds: list[Path] = []

    def build(folder: Path, progress: Progress) -> str:
        builds.append(folder)
        (folder / "initrd").write_bytes(b"i")
        download(source.as_uri(), folder / "kernel", source.stat().st_size, "", progress)
        return "a test"

    monkeypatch.setattr(store, "CATALOGUE", {"small": store.Recipe("for a test", "quiet")})
    monkeypatch.setitem(sys.modules, "qemu_user.images.small", SimpleNamespace(build=build))
    return builds


@contextlib.contextmanager
def short_files() -> Iterator[None]:
    """No file of this process may become longer than LIMIT: write(2) fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock-small"}


def test_built_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"kernel")
    builds = catalogue(monkeypatch, source)
    images = Store(tmp_path / "images")
    assert images.find("small") is None
    assert images.ensure("small", quiet).kernel.read_bytes() == b"kernel"
    source.unlink()  # with a warm cache nothing is fetched
    assert images.ensure("small", quiet).meta.verified == "a test"
    assert len(builds) == 1
    assert [image.name for image in images.images()] == ["small"]


def test_no_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(2 * LIMIT))
    catalogue(monkeypatch, source)
    images = Store(tmp_path / "images")
    with short_files(), pytest.raises(ImageError, match=r"cannot build image 'small' in .*XDG_CACHE_HOME"):
        images.ensure("small", quiet)
    assert left(images.folder) == set()


def test_failed_renewal_keeps_the_old_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"first")
    catalogue(monkeypatch, source)
    images = Store(tmp_path / "images")
    images.ensure("small", quiet)
    source.write_bytes(bytes(2 * LIMIT))
    with short_files(), pytest.raises(ImageError, match="cannot build image"):
        images.ensure("small", quiet, renew=True)
    found = images.find("small")
    assert found is not None
    assert found.kernel.read_bytes() == b"first"
    assert left(images.folder) == {"small"}


def test_remains_of_a_killed_build_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"kernel")
    catalogue(monkeypatch, source)
    images = Store(tmp_path / "images")
    (images.folder / ".new-small-killed").mkdir(parents=True)
    (images.folder / ".new-small-killed" / "kernel").write_bytes(b"half")
    images.ensure("small", quiet)
    assert left(images.folder) == {"small"}


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}', b"\xff\0"])
def test_damaged_meta_is_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "meta.json").write_bytes(content)
    assert Store(tmp_path).find("small") is None


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no image 'nothing'; there are: busybox, debian, edk2"):
        Store(tmp_path).ensure("nothing", quiet)
