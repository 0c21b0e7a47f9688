"""kill -9 of the source's processes while memory follows: what is left there goes on sending it, and the VM goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest
from tests.migration.test_attach import kill_device_process, row, wait_until_it_waits

slow = pytest.mark.slow
PAGES = 8000
KEEP = ("-keep",)


def begin(
    hosts: tuple[HostUnderTest, HostUnderTest], fault: str, folder: Path, options: tuple[str, ...] = (), way: str = "unix"
) -> None:
    """Move a VM by post-copy, the source meeting a fault."""
    one, two = hosts
    if way == "tcp":
        one.trust(two)
        two.trust(one)
    uri = two.serve("tcp://127.0.0.1:0" if way == "tcp" else "")
    one.boot("vm", fault=fault, options=options, pages=PAGES, pause=1000, drives=(memory_guest.drive(folder / "disk"),))
    one.begin_postcopy("vm", uri)


def attach(host: HostUnderTest) -> bytes:
    done = host.softkvm("attach", "vm")
    assert done.returncode == 0, done.stderr.decode()
    return done.stderr


@pytest.mark.parametrize(
    ("step", "options", "way"),
    [
        ("source:page=kill:20", (), "unix"), ("source:page=kill:20", KEEP, "tcp"), ("source:committed=kill", (), "unix"),
        pytest.param("source:committed=kill", KEEP, "unix", marks=slow),
        pytest.param("source:commit-sent=kill", (), "tcp", marks=slow),
        pytest.param("source:done=kill", KEEP, "unix", marks=slow),
    ],
)  # fmt: skip
def test_what_is_left_of_a_source_goes_on(
    step: str, options: tuple[str, ...], way: str,
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path,
) -> None:  # fmt: skip
    one, two = hosts
    begin(hosts, step, tmp_path, options, way)
    wait_until_it_waits(one)
    assert b"runs at another host" in attach(one)
    goes_on("vm")
    one.wait_for_names([])
    two.wait_for_names(["vm"])
    assert two.status("vm") == "running"
    said = b"".join(path.read_bytes() for path in (two.runtime / "softkvm").glob("*.log"))
    assert b"the source of its memory is back" in said


def test_it_is_killed_again(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """What was attached can be killed as what was before, and says how it goes meanwhile."""
    one, two = hosts
    begin(hosts, "source:page=kill:5", tmp_path)
    wait_until_it_waits(one)
    one.environment["SOFTKVM_MIGRATION_FAULT"] = "source:page=kill:5"
    for _ in range(2):
        attach(one)
        wait_until_it_waits(one)
    del one.environment["SOFTKVM_MIGRATION_FAULT"]
    attach(one)
    goes_on("vm")
    one.wait_for_names([])
    two.wait_for_names(["vm"])


def test_who_has_it_moved_sees_to_it(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """`softkvm migrate` attaches by itself, and ends when all of it has gone."""
    one, two = hosts
    uri = two.serve()
    one.boot("vm", fault="source:page=kill:20", pages=PAGES, pause=1000, drives=(memory_guest.drive(tmp_path / "disk"),))
    done = one.softkvm("migrate", "vm", uri, "--postcopy")
    assert done.returncode == 0, done.stderr.decode()
    assert b"its process here was killed" in done.stderr
    goes_on("vm")
    assert two.status("vm") == "running"
    one.wait_for_names([])


def test_it_is_not_attached_to_what_goes_on_here(
    hosts: tuple[HostUnderTest, HostUnderTest], tmp_path: Path
) -> None:
    """That is the user's to decide."""
    one, two = hosts
    uri = two.serve()
    one.boot("vm", fault="source:state=kill", options=KEEP, drives=(memory_guest.drive(tmp_path / "disk"),))
    done = one.softkvm("migrate", "vm", uri, "--postcopy")
    assert done.returncode == 1
    assert b"waits here; softkvm attach vm" in done.stderr
    assert row(one)["waits"]


@pytest.mark.parametrize("action", ["killvm", "killdaemon"])
def test_kvmcore_is_not_needed_to_send_it(
    action: str, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    begin(hosts, f"source:page={action}:20", tmp_path)
    goes_on("vm")
    one.wait_for_names([])
    two.wait_for_names(["vm"])


@pytest.mark.parametrize("step", ["source:state=kill", "source:prepared=kill"])
@pytest.mark.parametrize("options", [(), KEEP], ids=["", "keep"])
def test_before_it_is_decided_the_vm_is_the_sources(
    step: str, options: tuple[str, ...], hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """So it has been killed with it, unless it was made to outlive that."""
    one, two = hosts
    begin(hosts, step, tmp_path, options)
    two.wait_for_names([])
    if not options:
        one.wait_for_names([])
        return
    wait_until_it_waits(one)
    assert b"goes on; softkvm console" in attach(one)
    goes_on("vm")
    assert one.status("vm") == "running"
    kill_device_process(one)  # what was left for the move counts no more
    assert b"goes on; softkvm console" in attach(one)
    goes_on("vm")
    assert row(one)["waits"] is False


def test_a_move_that_failed_leaves_nothing(
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """A VM without --keep ends with its process afterwards, as ever."""
    one, two = hosts
    uri = two.serve(fault="destination:state=kill")
    one.boot("vm", drives=(memory_guest.drive(tmp_path / "disk"),))
    assert one.softkvm("migrate", "vm", uri, "--postcopy").returncode == 1
    goes_on("vm")
    kill_device_process(one)
    one.wait_for_names([])
