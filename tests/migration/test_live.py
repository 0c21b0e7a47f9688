"""Live migration between two hosts: the guest counts in its memory and never finds a wrong page."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest


def moved(source: HostUnderTest, uri: str, *words: str) -> str:
    done = source.softkvm("migrate", "vm", uri, *words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stderr.decode()


WAYS = {
    "handed": (), "copied": ("--copy",), "packed": ("--copy", "--bandwidth", "150M"), "postcopy": ("--postcopy",),
    "channels": ("--copy", "--channels", "3"), "packed channels": ("--copy", "--channels", "2", "--bandwidth", "150M"),
}  # fmt: skip


@pytest.mark.parametrize("words", WAYS.values(), ids=WAYS)
def test_back_and_forth(
    words: tuple[str, ...], hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    there, back = two.serve(), one.serve()
    disk = memory_guest.drive(tmp_path / "disk", kind="overlay" if words else "raw")
    child = one.boot("vm", pages=1000, drives=(disk,))
    goes_on("vm")
    for source, target, uri in ((one, two, there), (two, one, back), (one, two, there)):
        moved(source, uri, *words)
        target.wait_for_names(["vm"])
        assert target.status("vm") == "running"
        goes_on("vm", more=10)
    assert child.wait(60) == 0
    one.wait_for_names([])
    two.wait_for_names(["vm"])
    assert two.status("vm") == "running"


def test_over_tcp_with_keys(hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]) -> None:
    one, two = hosts
    one.trust(two)
    two.trust(one)
    uri = two.serve("tcp://127.0.0.1:0")
    one.boot("vm", pages=1000, cpus=2)
    goes_on("vm")
    moved(one, uri, "--max-downtime", "100ms", "--channels", "3")
    two.wait_for_names(["vm"])
    goes_on("vm")
    stranger = HostUnderTest(one.shared, "c")
    try:
        stranger.trust(two)
        stranger.boot("other")
        done = stranger.softkvm("migrate", "other", uri)
        assert done.returncode == 1
        assert "does not know our key" in done.stderr.decode()
        goes_on("other")
    finally:
        stranger.close()


def test_a_host_has_its_daemon_before_a_vm_comes(hosts: tuple[HostUnderTest, HostUnderTest]) -> None:
    _, two = hosts
    two.serve()
    path = two.runtime / "softkvm" / "kvmcore.sock"
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["raw", "overlay"])
def test_disks_travel_along(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path, kind: str
) -> None:
    one, two = hosts
    uri = two.serve()
    disk = memory_guest.drive(tmp_path / "disk", size=9 << 20, kind=kind)
    one.boot("vm", drives=(disk,))
    goes_on("vm")
    moved(one, uri, "--with-disks", "--copy")
    goes_on("vm")
    (copy,) = (two.runtime / "data" / "softkvm" / "disks").rglob("disk0.*")
    assert copy.suffix == (".raw" if kind == "raw" else ".qcow2")
    two.softkvm("kill", "vm")
    digests = {hashlib.sha256(memory_guest.content(path)).hexdigest() for path in (copy, Path(disk.file))}
    assert len(digests) == 1


def test_disks_that_travel_along_are_flushed_while_the_guest_runs(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """At the switch next to nothing of them waits to be written: the destination is killed just there."""
    one, two = hosts
    uri = two.serve(fault="destination:state=kill")
    size = 64 << 20
    one.boot("vm", drives=(memory_guest.drive(tmp_path / "disk", size=size),))
    goes_on("vm")
    assert one.softkvm("migrate", "vm", uri, "--with-disks", "--copy").returncode == 1
    (copy,) = (two.runtime / "data" / "softkvm" / "disks").rglob("disk0.*")
    assert copy.stat().st_blocks * 512 >= size
    assert unwritten(copy) < size / 16


def unwritten(path: Path) -> int:
    """Bytes of a file that are in the page cache alone (cachestat(2), Linux 6.5)."""
    libc, span, found = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        if libc.syscall(451, file.fileno(), span, found, 0):
            pytest.skip("the host's kernel is older than 6.5")
    return (found[1] + found[2]) * os.sysconf("SC_PAGESIZE")


def test_a_paused_vm_moves_and_stays_paused(hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]) -> None:
    one, two = hosts
    uri = two.serve()
    one.boot("vm")
    goes_on("vm")
    assert one.softkvm("pause", "vm").returncode == 0
    moved(one, uri)
    end = time.monotonic() + 60
    while two.status("vm") != "paused":
        assert time.monotonic() < end
        time.sleep(0.02)
    assert two.softkvm("resume", "vm").returncode == 0
    goes_on("vm")


def test_a_guest_that_outruns_the_copy_is_slowed_down(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]
) -> None:
    one, two = hosts
    uri = two.serve()
    one.boot("vm", pages=8000, pause=0)
    goes_on("vm")
    assert "the guest stood" in moved(one, uri, "--copy", "--bandwidth", "60M", "--max-downtime", "20ms")
    goes_on("vm")


@pytest.mark.parametrize("reason", ["disk", "nobody"])
def test_refusals_say_why_and_the_guest_goes_on(
    reason: str, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    drives = (memory_guest.drive(tmp_path / "disk"),) if reason == "disk" else ()
    one.boot("vm", drives=drives)
    goes_on("vm")
    uri = f"ipc://{tmp_path}/nobody" if reason == "nobody" else two.serve()
    if reason == "disk":
        (tmp_path / "disk").rename(tmp_path / "elsewhere")
    done = one.softkvm("migrate", "vm", uri)
    assert done.returncode == 1
    expected = {"disk": "disk image", "nobody": "no host listens"}[reason]
    assert expected in done.stderr.decode()
    assert one.status("vm") == "running"
    goes_on("vm")
    assert two.names() == []
