"""Snapshots of running VMs: memory, state and disk of one instant; damaged ones are refused."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qemu_user.machine.machine import RUNNING, Machine, StartError
from qemu_user.migration import arrival, snapshot
from qemu_user.migration import job as jobs
from qemu_user.migration.arrival import Restore, restored
from qemu_user.migration.snapshot import Snapshot, SnapshotError
from tests.framework import memory_guest


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def save(machine: Machine, root: Path, tag: str) -> jobs.Job:
    job = jobs.Job("snapshot", tag)
    jobs.start(machine, job, partial(snapshot.save, machine, root, tag))
    assert job.finished.wait(60)
    return job


@pytest.mark.parametrize("kind", ["raw", "qcow2", "overlay"])
def test_snapshot_of_a_busy_guest_and_back(endpoint: str, goes_on: Callable[..., int], tmp_path: Path, kind: str) -> None:
    disk = memory_guest.drive(tmp_path / "disk", kind=kind)
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=2000, drives=(disk,)), endpoint)
    machine.start()
    goes_on("vm")
    job = save(machine, tmp_path / "kept", "first")
    assert (job.status, job.error) == ("completed", "")
    assert machine.status == RUNNING
    at = goes_on("vm")
    assert save(machine, tmp_path / "kept", "first").error.startswith("VM vm has a snapshot first")
    assert save(machine, tmp_path / "kept", "second").status == "completed"
    machine.close()
    assert [meta.tag for meta in snapshot.listed(tmp_path / "kept")] == ["first", "second"]
    before = memory_guest.content(disk.file)
    if kind == "overlay":
        assert (tmp_path / "kept" / "first" / "disk0").stat().st_size < 1 << 20, "what is in the backing file was not copied"
    Path(disk.file).write_bytes(b"spoilt")

    instance = restored(Restore(endpoint=endpoint, snapshot=str(tmp_path / "kept" / "first"), names=("vm",)), "vm")
    try:
        goes_on("vm", more=at)
    finally:
        instance.machine.close()
        instance._close()
    assert memory_guest.content(disk.file) == before
    snapshot.delete(tmp_path / "kept" / "first")
    with pytest.raises(SnapshotError):
        snapshot.delete(tmp_path / "kept" / "first")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["second"]


def test_a_vm_that_ends_before_its_memory_has_come(
    endpoint: str, goes_on: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who brings the rest of it finds the session closed, which is no failure."""
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=200), endpoint)
    machine.start()
    goes_on("vm")
    assert save(machine, tmp_path / "kept", "one").status == "completed"
    machine.close()
    monkeypatch.setattr(arrival, "_FILL_AFTER", 1.0)
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    instance = restored(Restore(endpoint=endpoint, snapshot=str(tmp_path / "kept" / "one"), names=("vm",)), "vm")
    (fill,) = [thread for thread in threading.enumerate() if thread.name == "fill"]
    assert instance.machine.memory.absent is not None
    instance.machine.vm.link.close()
    fill.join(60)
    assert not fill.is_alive()
    assert failed == []
    instance.machine.close()
    instance._close()


def test_a_paused_guest_stays_paused(endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm"), endpoint)
    machine.start()
    goes_on("vm")
    machine.pause()
    done = -1
    while done != (done := memory_guest.rounds(tmp_path, "vm")):
        time.sleep(0.3)  # what the guest has written is on its way to the file
    assert save(machine, tmp_path / "kept", "one").status == "completed"
    assert memory_guest.rounds(tmp_path, "vm") == done
    machine.resume()
    goes_on("vm")
    machine.close()


def test_cancelling_leaves_nothing(endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=8000), endpoint)
    machine.start()
    goes_on("vm")
    job = jobs.Job("snapshot", "one")
    job.cancel()
    jobs.start(machine, job, partial(snapshot.save, machine, tmp_path / "kept", "one"))
    assert job.finished.wait(60)
    assert job.status == "cancelled"
    assert list((tmp_path / "kept").iterdir()) == []
    goes_on("vm")
    machine.close()


@pytest.mark.parametrize("file", ["state", "memory", "meta.json"])
def test_damage_is_noticed(file: str, endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm"), endpoint)
    machine.start()
    goes_on("vm")
    assert save(machine, tmp_path / "kept", "one").status == "completed"
    machine.close()
    path = tmp_path / "kept" / "one" / file
    if file == "meta.json":
        path.unlink()
        assert snapshot.listed(tmp_path / "kept") == []
        return
    data = bytearray(path.read_bytes())
    data[0x200010 if file == "memory" else 100] ^= 1
    path.write_bytes(bytes(data))
    order = Restore(endpoint=endpoint, snapshot=str(tmp_path / "kept" / "one"), names=("vm",))
    if file == "memory":  # it is read when it is touched
        instance = restored(order, "vm")
        assert instance.wait() == 1
        assert "damaged at offset 0x200000" in instance.machine.failure
    else:
        with pytest.raises(StartError, match=r"damaged|cannot be used"):
            restored(order, "vm")


def test_shorter_memory_and_strange_files_are_refused(endpoint: str, tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm", paused=True), endpoint)
    machine.start()
    assert save(machine, tmp_path / "kept", "one").status == "completed"
    machine.close()
    folder = tmp_path / "kept" / "one"
    good = Snapshot(folder)
    strange = msgspec.structs.replace(good.contents, files={**good.contents.files, "../../etc": (0, b"")})
    good.contents = strange
    with pytest.raises(ValueError, match="called"):
        good._check()
    with (folder / "memory").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(SnapshotError, match="4096 bytes instead"):
        Snapshot(folder)


def content(folder: Path, name: str = "memory") -> bytes:
    """A file of a snapshot, whole."""
    kept = Snapshot(folder)
    data = bytearray(kept.contents.files[name][0])
    kept.read(name, memoryview(data))
    return bytes(data)


def test_only_what_has_changed_is_stored_again(endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    disk = memory_guest.drive(tmp_path / "disk")
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=64, drives=(disk,)), endpoint)
    machine.start()
    machine.memory.write(0x8200_0000, random.Random(1).randbytes(16 << 20))
    root = tmp_path / "kept"
    whole = {}
    for tag in ("one", "two", "three", "four"):
        goes_on("vm")
        machine.pause()
        job = jobs.Job("snapshot", tag)
        jobs.start(machine, job, partial(snapshot.save, machine, root, tag, incremental=True))
        assert job.finished.wait(60)
        assert job.status == "completed", job.error
        whole[tag] = bytes(machine.memory.regions[0][1])
        machine.resume()
    machine.close()
    metas = {meta.tag: meta for meta in snapshot.listed(root)}
    assert [metas[tag].parent for tag in whole] == ["", "one", "two", "three"]
    assert metas["one"].stored > 16 << 20
    assert all(metas[tag].stored < 8 << 20 for tag in ("two", "three", "four"))
    for gone in ("two", "one", "three", ""):
        for tag in whole:
            assert content(root / tag) == whole[tag], (tag, gone)
            assert content(root / tag, "disk0") == Path(disk.file).read_bytes()
        if gone:
            snapshot.delete(root / gone)
            del whole[gone]
    (last,) = snapshot.listed(root)
    assert (last.tag, last.parent, last.stored > 16 << 20) == ("four", "", True)


def test_a_parent_that_is_missing_or_damaged_is_named(endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm", pages=64), endpoint)
    machine.start()
    root = tmp_path / "kept"
    for tag in ("one", "two"):
        goes_on("vm")
        job = jobs.Job("snapshot", tag)
        snapshot.save(machine, root, tag, job, incremental=True)
    machine.close()
    assert Snapshot(root / "two").depth == 1
    (root / "one").rename(root / "elsewhere")
    with pytest.raises(SnapshotError, match=r"there is no snapshot in .*one"):
        Snapshot(root / "two")
    (root / "elsewhere").rename(root / "one")
    inherited = Snapshot(root / "two").contents.inherited["memory"]
    page = next(index for index in range(8 * len(inherited)) if inherited[index >> 3] >> (index & 7) & 1)
    with (root / "one" / "memory").open("r+b") as file:
        file.seek(4096 * page + 5)
        file.write(b"spoilt")
    with pytest.raises(SnapshotError, match="damaged at offset"):
        content(root / "two")
