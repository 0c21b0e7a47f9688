"""kill -9 of a device process while its VM's memory is coming, from a snapshot or from the source of a post-copy: another one
in its place goes on fetching, and nothing of the memory is lost or comes twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_user.migration.snapshot import Snapshot
from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest
from tests.migration.test_attach import kill_device_process, row, wait_until_it_waits

slow = pytest.mark.slow
PAGES = 8000
"""Of 16384: some 500 clusters."""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostUnderTest]:
    made = HostUnderTest(tmp_path, "a")
    yield made
    made.close()


def ok(host: HostUnderTest, *words: str) -> None:
    done = host.softkvm(*words)
    assert done.returncode == 0, done.stderr.decode()


def ok_with(host: HostUnderTest, fault: str, *words: str) -> None:
    """A verb whose VM meets a fault."""
    host.environment["SOFTKVM_MIGRATION_FAULT"] = fault
    try:
        ok(host, *words)
    finally:
        del host.environment["SOFTKVM_MIGRATION_FAULT"]


def memory_of(host: HostUnderTest, tag: str) -> bytes:
    folder = host.runtime / "data" / "softkvm" / "snapshots" / "vm" / tag
    kept = Snapshot(folder)
    data = bytearray(kept.contents.files["memory"][0])
    kept.read("memory", memoryview(data))
    return bytes(data)


@pytest.mark.parametrize(
    "moment",
    [pytest.param("page=kill:30", marks=slow), "page=kill:200", pytest.param("page=kill:450", marks=slow), "whole=kill"],
)
def test_a_restored_vm_goes_on(moment: str, host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    disk = memory_guest.drive(tmp_path / "disk")
    before = memory_guest.content(disk.file)
    host.boot("vm", options=("-keep",), drives=(disk,), pages=PAGES)
    goes_on("vm")
    ok(host, "snapshot", "vm", "one")
    goes_on("vm")
    ok(host, "snapshot", "vm", "two")  # its memory is in two files
    ok_with(host, f"restored:{moment}", "restore", "vm", "two")
    wait_until_it_waits(host)
    vm_pid = row(host)["vm_pid"]
    ok(host, "delete", "vm", "two")
    ok(host, "delete", "vm", "one")
    ok(host, "attach", "vm")
    goes_on("vm")
    assert (row(host)["vm_pid"], row(host)["waits"]) == (vm_pid, False)
    kill_device_process(host)
    ok(host, "attach", "vm")
    goes_on("vm")
    ok(host, "kill", "vm")
    assert memory_guest.content(disk.file) == before


def test_what_comes_is_what_was_saved(host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    """It stands meanwhile, so that all of its memory can be compared."""
    host.boot("vm", options=("-keep",), pages=PAGES)
    goes_on("vm")
    ok(host, "snapshot", "vm", "one")
    goes_on("vm")
    ok(host, "snapshot", "vm", "two")
    ok(host, "restore", "vm", "two", "--paused")
    for _ in range(4):
        kill_device_process(host)
        ok(host, "attach", "vm")
        assert host.status("vm") == "paused"
    ok(host, "snapshot", "vm", "three")
    assert memory_of(host, "three") == memory_of(host, "two")
    ok(host, "resume", "vm")
    goes_on("vm")


def test_a_clone_goes_on(host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    """Its memory comes page by page, and the folder that it comes from is gone."""
    host.boot("vm", options=("-keep",), pages=PAGES)
    goes_on("vm")
    ok_with(host, "restored:page=kill:300", "clone", "vm", "other")
    wait_until_it_waits(host, "other")
    ok(host, "kill", "vm")
    ok(host, "attach", "other")
    goes_on("vm")  # where the clone writes as well
    kill_device_process(host)
    ok(host, "attach", "other")
    goes_on("vm")
    assert host.names() == ["other"]


@pytest.mark.parametrize(("way", "which"), [pytest.param("unix", 1, marks=slow), ("unix", 40), ("tcp", 40)])
def test_a_post_copy_goes_on(
    way: str, which: int, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """The source has the rest, and calls until somebody answers for the VM."""
    one, two = hosts
    if way == "tcp":
        one.trust(two)
        two.trust(one)
    uri = two.serve("tcp://127.0.0.1:0" if way == "tcp" else "", fault=f"destination:page=kill:{which}")
    disk = memory_guest.drive(tmp_path / "disk")
    before = memory_guest.content(disk.file)
    one.boot("vm", options=("-keep",), pages=PAGES, pause=1000, drives=(disk,))
    goes_on("vm")
    with one.started("migrate", "vm", uri, "--postcopy") as moving:
        wait_until_it_waits(two)
        ok(two, "attach", str(row(two)["name"]))
        assert moving.wait(60) == 0
    goes_on("vm")
    one.wait_for_names([])
    two.wait_for_names(["vm"])
    assert not list((two.runtime / "softkvm").glob("recover-*"))
    kill_device_process(two)
    ok(two, "attach", "vm")
    goes_on("vm")
    ok(two, "kill", "vm")
    assert memory_guest.content(disk.file) == before


def test_a_source_that_dies_meanwhile(hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]) -> None:
    """And is ended: part of the memory is lost, and the VM with it. attach says so, nobody waits for ever."""
    one, two = hosts
    uri = two.serve(fault="destination:page=kill:40")
    one.boot("vm", options=("-keep",), pages=PAGES, pause=1000)
    goes_on("vm")
    moving = threading.Thread(target=one.begin_postcopy, args=("vm", uri), daemon=True)
    moving.start()
    wait_until_it_waits(two)
    kill_device_process(one)
    moving.join(60)
    ok(one, "kill", "vm")
    two.softkvm("attach", str(row(two)["name"]))
    two.wait_for_names([])
    one.wait_for_names([])
