"""Disks of VMs: kept under a name or gone with the VM, sparse, grown, never half made, never deleted under a running VM."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec
import pytest

from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import RawImage
from qemu_user.images import store, vm_disk
from qemu_user.images.errors import ImageError
from qemu_user.images.store import Image, Meta

SIZE = 16 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Image:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    folder = tmp_path / "cache" / "softkvm" / "images" / "debian"
    folder.mkdir(parents=True)
    meta = Meta(store._FORMAT, "debian", "a test", 1.0)
    (folder / "meta.json").write_bytes(msgspec.json.encode(meta))
    for name in ("kernel", "initrd", "modules-ext4"):
        (folder / name).write_text(name)
    create_qcow2(folder / "disk.qcow2", SIZE)
    with contextlib.closing(open_disk(str(folder / "disk.qcow2"))) as disk:
        disk.write(5 << 20, [memoryview(b"root")])
    found = store.load(folder, "debian")
    assert found is not None
    return found


def read(path: Path, offset: int = 5 << 20) -> bytes:
    """Four bytes of a disk."""
    found = bytearray(4)
    with contextlib.closing(open_disk(str(path), readonly=True)) as disk:
        disk.read(offset, [memoryview(found)])
    return bytes(found)


def size(path: Path) -> int:
    with contextlib.closing(open_disk(str(path), readonly=True)) as disk:
        return disk.size


def scratch(image: Image) -> list[Path]:
    return sorted((image.folder.parent.parent / "scratch").iterdir())


def test_a_throw_away_disk_is_an_overlay_and_goes(image: Image) -> None:
    disk = vm_disk.open_disk(image, "vm-1", keep=False, size=0)
    assert (disk.new, disk.kept, disk.image) == (True, False, image)
    assert size(disk.disk) == SIZE
    assert read(disk.disk) == b"root"
    assert disk.disk.stat().st_size < 1 << 20
    disk.discard()
    assert scratch(image) == []
    assert vm_disk.kept() == []


def test_a_kept_vm_needs_neither_image_nor_cache(image: Image) -> None:
    first = vm_disk.open_disk(image, "web", keep=True, size=0)
    assert first.new
    with contextlib.closing(open_disk(str(first.disk))) as disk:
        disk.write(0, [memoryview(b"mine")])
    first.booted("ada")
    first.discard()
    for path in image.folder.iterdir():
        path.unlink()
    again = vm_disk.open_disk(image, "web", keep=True, size=0)
    assert (again.new, again.login, read(again.disk, 0), read(again.disk)) == (False, "ada", b"mine", b"root")
    assert again.image.kernel.read_text() == "kernel"
    assert again.image.extra("ext4").read_text() == "modules-ext4"
    assert [vm.name for vm in vm_disk.kept()] == ["web"]


def test_a_command_is_no_first_boot(image: Image) -> None:
    vm_disk.open_disk(image, "web", keep=True, size=0)
    again = vm_disk.open_disk(image, "web", keep=True, size=0)
    assert again.new
    again.booted("root")
    assert not vm_disk.open_disk(image, "web", keep=True, size=0).new


def test_disks_grow_and_never_shrink(image: Image) -> None:
    disk = vm_disk.open_disk(image, "web", keep=True, size=SIZE * 2 + 100)
    assert size(disk.disk) == SIZE * 2 + 512
    vm_disk.open_disk(image, "web", keep=True, size=SIZE * 3)
    assert size(disk.disk) == SIZE * 3
    with pytest.raises(ImageError, match=r"--disk-size: the disk has .* already"):
        vm_disk.open_disk(image, "web", keep=True, size=SIZE)
    with pytest.raises(ImageError, match="--disk-size"):
        vm_disk.open_disk(image, "other", keep=True, size=1 << 20)
    assert [vm.name for vm in vm_disk.kept()] == ["web"]
    assert [path.name for path in vm_disk.kept_folder().iterdir()] == ["web"]


def test_what_killed_processes_left_is_cleared(image: Image) -> None:
    disk = vm_disk.open_disk(image, "vm-1", keep=False, size=0)
    folder = disk.disk.parent.parent
    dead = folder / "4194305-1234abcd"  # above the largest pid there may be
    disk.disk.parent.rename(dead)
    (folder / ".new-4194305-x").mkdir()
    with contextlib.closing(RawImage(str(dead / "disk.qcow2"))):  # the VM has moved to a process that lives
        mine = vm_disk.open_disk(image, "vm-2", keep=False, size=0)
        assert {path.name for path in folder.iterdir()} == {dead.name, mine.disk.parent.name}
    other = vm_disk.open_disk(image, "vm-3", keep=False, size=0)
    assert {path.name for path in folder.iterdir()} == {mine.disk.parent.name, other.disk.parent.name}
    assert mine.disk.parent.name.startswith(f"{os.getpid()}-")


def test_a_running_vm_is_not_deleted(image: Image) -> None:
    disk = vm_disk.open_disk(image, "web", keep=True, size=0)
    with contextlib.closing(RawImage(str(disk.disk))), pytest.raises(ImageError, match="web: is running"):
        vm_disk.remove("web")
    vm_disk.remove("web")
    assert list(vm_disk.kept_folder().iterdir()) == []
    with pytest.raises(ImageError, match="no VM 'web' is kept"):
        vm_disk.remove("web")


def test_no_room_leaves_nothing(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vm_disk.os, "link", full)
    with pytest.raises(ImageError, match=r"web: cannot make its disk: No space.*softkvm disks"):
        vm_disk.open_disk(image, "web", keep=True, size=0)
    assert list(vm_disk.kept_folder().iterdir()) == []
