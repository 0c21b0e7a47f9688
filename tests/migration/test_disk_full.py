"""A disk that is full, for real (a tmpfs of 2 MiB): whoever writes is told so, and what was there before stays whole."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from errno import ENOSPC
from functools import partial
from pathlib import Path

import pytest

from kvmcore.engine.code_cache import CodeCache
from protocol.client import Kvm
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.cli import image
from qemu_user.machine.machine import RUNNING, Machine
from qemu_user.migration import job as jobs
from qemu_user.migration import snapshot
from tests.framework import memory_guest
from tests.framework.full_stack import Daemon

SIZE = 2 << 20
PIECE = 128 << 10


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tiny", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs root, for mount -t tmpfs: {done.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Leave so many bytes."""
    stat = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - leave)))


def write(disk: BlockBackend, first: int) -> int:
    """128 KiB a MiB, from MiB `first` on, until there is no room; the first MiB that was not written."""
    for index in range(first, 64):
        try:
            disk.write(index << 20, [memoryview(bytes([index + 1]) * PIECE)])
        except OSError as error:
            if error.errno != ENOSPC:
                raise
            return index
    raise AssertionError("2 MiB held 8")


def there(disk: BlockBackend, count: int) -> bool:
    buffer = bytearray(PIECE)
    for index in range(count):
        disk.read(index << 20, [memoryview(buffer)])
        if buffer != bytes([index + 1]) * PIECE:
            return False
    return True


def test_what_a_qcow2_image_has_flushed_stays(tiny: Path) -> None:
    path = tiny / "disk.qcow2"
    create_qcow2(path, 64 << 20)
    disk = open_disk(str(path), "qcow2")
    for index in range(3):
        disk.write(index << 20, [memoryview(bytes([index + 1]) * PIECE)])
    disk.flush()
    end = write(disk, 3)
    assert 4 < end < 16
    assert there(disk, end), "the guest goes on with what it has written"
    disk.close()
    assert image.main(["check", str(path)]) in (0, 3), "space may be lost, data not"
    again = open_disk(str(path), "qcow2")
    assert there(again, 3)
    again.close()


def test_a_qcow2_image_goes_on_when_there_is_room_again(tiny: Path) -> None:
    path = tiny / "disk.qcow2"
    create_qcow2(path, 64 << 20)
    disk = open_disk(str(path), "qcow2")
    fill(tiny, 1 << 20)
    end = write(disk, 0)
    (tiny / "filler").unlink()
    disk.write(end << 20, [memoryview(bytes([end + 1]) * PIECE)])
    disk.flush()
    disk.close()
    assert image.main(["check", str(path)]) in (0, 3)
    again = open_disk(str(path), "qcow2")
    assert there(again, end + 1)
    again.close()


def test_a_snapshot_leaves_nothing_half_made(
    endpoint: str, goes_on: Callable[..., int], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=2000), endpoint)
    machine.start()
    goes_on("vm")
    job = jobs.Job("snapshot", "one")
    jobs.start(machine, job, partial(snapshot.save, machine, tiny / "kept", "one"))
    assert job.finished.wait(60)
    assert job.status != "completed"
    assert "No space left" in job.error
    assert machine.status == RUNNING
    goes_on("vm")
    machine.close()
    assert list((tiny / "kept").iterdir()) == []


def test_the_cache_of_code_goes_without(tiny: Path) -> None:
    cache = CodeCache(b"k" * 32, tiny)
    for index in range(60):
        cache.store(bytes([index]) * 32, 0, os.urandom(64 << 10))
    cache.close()
    fill(tiny)
    late = CodeCache(b"k" * 32, tiny)
    late.find(bytes(32))
    late.store(b"x" * 32, 0, bytes(1000))
    late.close()
    (tiny / "filler").unlink()
    again = CodeCache(b"k" * 32, tiny)
    again.find(bytes([1]) * 32)
    again.close()


def test_a_log_that_is_full_keeps_nobody_waiting() -> None:
    """As the daemon's stderr on a full disk: every write fails."""
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(2)
    os.dup2(full, 2)
    try:
        daemon = Daemon("-v")
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(full)
    with daemon:
        for _ in range(3):
            kvm = Kvm.open(daemon.endpoint)
            vm = kvm.create_vm()
            assert vm.create_vcpu(0).get_mp_state() == 0
            vm.close()
            kvm.close()
        assert daemon.process.poll() is None
