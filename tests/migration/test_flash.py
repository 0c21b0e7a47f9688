"""VMs with flash: content goes along with a migration, a snapshot, a clone, and is there after kill -9, as memory and as file.

The guest (memory_guest.py) notes each round in bank 1, reads the note of the round before, and looks at bank 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qemu_user.devices.pflash import BANK_SIZE
from qemu_user.machine.machine import Machine, StartError
from qemu_user.migration import job as jobs
from qemu_user.migration import places, snapshot
from qemu_user.migration.arrival import Restore, restored
from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest
from tests.migration.test_attach import kill_device_process


def last_note(path: Path) -> int:
    """The latest round that stands in the file of bank 1."""
    words = memoryview(path.read_bytes()).cast("I")[:64]
    return max(word for word in words if word != 0xFFFFFFFF)


@pytest.mark.parametrize("how", [("given",), ("postcopy", "--postcopy")])  # copied: with the files, below
def test_content_moves_along(
    how: tuple[str, ...], hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    uri = two.serve()
    one.boot("vm", flash=memory_guest.flash(tmp_path))
    goes_on("vm")
    code = tmp_path / "code.fd"
    code.rename(tmp_path / "old.fd")  # another version of the firmware: the guest keeps what it has
    code.write_bytes(bytes(BANK_SIZE))
    done = one.softkvm("migrate", "vm", uri, *how[1:])
    assert done.returncode == 0, done.stderr.decode()
    rounds = goes_on("vm", more=70)  # more than one erasure
    two.wait_for_names(["vm"])
    assert two.softkvm("kill", "vm").returncode == 0
    assert abs(last_note(tmp_path / "vars.fd") - memory_guest.rounds(tmp_path, "vm")) <= 1
    assert last_note(tmp_path / "vars.fd") >= rounds


def test_files_travel_with_disks(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    uri = two.serve()
    one.boot("vm", flash=memory_guest.flash(tmp_path), drives=(memory_guest.drive(tmp_path / "disk"),))
    goes_on("vm")
    done = one.softkvm("migrate", "vm", uri, "--copy", "--with-disks")
    assert done.returncode == 0, done.stderr.decode()
    left = last_note(tmp_path / "vars.fd")
    goes_on("vm")
    two.wait_for_names(["vm"])
    two.softkvm("kill", "vm")
    (copy,) = (two.runtime / "data/softkvm/disks").rglob("flash1.*")
    assert abs(last_note(copy) - memory_guest.rounds(tmp_path, "vm")) <= 1
    assert last_note(tmp_path / "vars.fd") == left, "the file that stayed behind is written no more"


def test_a_bank_that_cannot_be_had_is_a_refusal(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    uri = two.serve()
    one.boot("vm", flash=memory_guest.flash(tmp_path))
    goes_on("vm")
    (tmp_path / "code.fd").unlink()
    done = one.softkvm("migrate", "vm", uri)
    assert done.returncode == 1
    assert "code.fd" in done.stderr.decode()
    goes_on("vm")
    assert (one.names(), two.names()) == (["vm"], [])


def test_outlives_its_device_process(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """At most one kill in three hits a bank that is not in "read array": all of them go on."""
    one, _ = hosts
    one.boot("vm", pause=0, options=("-keep",), flash=memory_guest.flash(tmp_path))
    for _ in range(4):
        goes_on("vm")
        kill_device_process(one)
        done = one.softkvm("attach", "vm")
        assert done.returncode == 0, done.stderr.decode()
    goes_on("vm", more=70)
    other = one.softkvm("run", "-d", "--kernel", str(tmp_path / "vm.out"), "--pflash", str(tmp_path / "vars.fd"))
    assert b"in use by another VM" in other.stderr, "the lock was handed on"
    assert one.softkvm("kill", "vm").returncode == 0
    # A kill may repeat a write to the file, and loses the rounds that the process has not written yet: many on a busy host.
    assert memory_guest.rounds(tmp_path, "vm") - last_note(tmp_path / "vars.fd") <= 5


@pytest.fixture
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.mark.usefixtures("own_directories")
def test_snapshot_and_clone(endpoint: str, goes_on: Callable[..., int], tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm", pause=20000, flash=memory_guest.flash(tmp_path)), endpoint)
    machine.start()
    goes_on("vm")
    for tag in ("first", "second"):
        job = jobs.Job("snapshot", tag)
        jobs.start(machine, job, partial(snapshot.save, machine, tmp_path / "kept", tag, incremental=True))
        assert job.finished.wait(60)
        assert (job.status, job.error) == ("completed", "")
        at = goes_on("vm")
    machine.close()
    folder = tmp_path / "kept" / "second"
    assert folder.joinpath("flash0").stat().st_blocks == 0, "its parent has the firmware"
    saved = snapshot.Snapshot(folder)
    kept = bytearray(BANK_SIZE)
    saved.read("flash1", memoryview(kept))
    for name in ("code.fd", "vars.fd"):
        (tmp_path / name).write_bytes(bytes(BANK_SIZE))

    order = Restore(endpoint=endpoint, snapshot=str(folder), names=("vm",))
    instance = restored(order, "vm")
    try:
        goes_on("vm", more=at + 70)
    finally:
        instance.machine.close()
        instance._close()
    assert last_note(tmp_path / "vars.fd") > max(word for word in memoryview(kept).cast("I")[:64] if word != 0xFFFFFFFF)

    before = (tmp_path / "vars.fd").read_bytes()
    instance = restored(Restore(endpoint=endpoint, snapshot=str(folder), names=("copy",), new=True), "copy")
    try:
        assert instance.config.flash[1].file == str(places.disks() / "copy" / "flash1.raw")
        assert instance.config.flash[0].file == str(tmp_path / "code.fd")
        own = places.disks() / "copy" / "flash1.raw"
        first = last_note(own)
        goes_on("vm", more=5)  # its output is still the first one's file
        assert last_note(own) > first
    finally:
        instance.machine.close()
        instance._close()
    assert (tmp_path / "vars.fd").read_bytes() == before, "the clone has a file of its own"


@pytest.mark.usefixtures("own_directories")
def test_a_snapshot_without_the_flash_is_refused(endpoint: str, tmp_path: Path) -> None:
    machine = Machine(memory_guest.config(tmp_path, "vm", flash=memory_guest.flash(tmp_path)), endpoint)
    machine.start()
    job = jobs.Job("snapshot", "first")
    jobs.start(machine, job, partial(snapshot.save, machine, tmp_path / "kept", "first"))
    assert job.finished.wait(60)
    machine.close()
    (tmp_path / "kept/first/flash1").write_bytes(b"short")
    with pytest.raises(StartError, match="flash1: 5 bytes instead of"):
        restored(Restore(endpoint=endpoint, snapshot=str(tmp_path / "kept/first"), names=("vm",)), "vm")
