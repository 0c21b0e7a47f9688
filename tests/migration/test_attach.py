"""kill -9 of a VM's device process, and another one in its place: the guest goes on where it was."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostUnderTest]:
    made = HostUnderTest(tmp_path, "a")
    yield made
    made.close()


def row(host: HostUnderTest) -> dict[str, object]:
    """The one VM that is listed."""
    (found,) = json.loads(host.softkvm("ps", "--format", "json").stdout)
    return dict(found)


def kill_device_process(host: HostUnderTest) -> None:
    """kill -9, and wait until it is seen."""
    pid = row(host)["pid"]
    (process,) = [process for process in host.processes() if process.pid == pid]
    process.send_signal(signal.SIGKILL)
    process.wait(60)


def wait_until_it_waits(host: HostUnderTest, name: str = "vm") -> None:
    """Until the device process of the VM, or of one that comes in as that, is dead."""
    end = time.monotonic() + 60
    while not any(entry["waits"] for entry in rows(host) if str(entry["name"]).startswith(name)):
        assert time.monotonic() < end
        time.sleep(0.02)


def rows(host: HostUnderTest) -> list[dict[str, object]]:
    """What is listed."""
    return list(json.loads(host.softkvm("ps", "--format", "json").stdout))


@pytest.mark.parametrize("cpus", [1, 2])
def test_guest_goes_on_after_each_of_three_kills(
    cpus: int, host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path
) -> None:
    host.boot("vm", options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),), cpus=cpus)
    goes_on("vm")
    vm_pid = row(host)["vm_pid"]
    for _ in range(3):
        kill_device_process(host)
        assert row(host)["waits"]
        done = host.softkvm("attach", "vm")
        assert done.returncode == 0, done.stderr.decode()
        goes_on("vm")
        assert host.status("vm") == "running"
        assert (row(host)["vm_pid"], row(host)["waits"]) == (vm_pid, False)
    assert host.softkvm("attach", "vm").returncode == 1
    assert host.softkvm("kill", "vm").returncode == 0
    assert host.names() == []


def test_an_attach_that_fails_can_be_done_again(host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    disk = memory_guest.drive(tmp_path / "disk")
    host.boot("vm", options=("-keep",), drives=(disk,))
    goes_on("vm")
    kill_device_process(host)
    Path(disk.file).rename(tmp_path / "elsewhere")
    done = host.softkvm("attach", "vm")
    assert done.returncode == 1
    assert b"disk" in done.stderr
    assert row(host)["waits"]
    (tmp_path / "elsewhere").rename(disk.file)
    done = host.softkvm("attach", "vm")
    assert done.returncode == 0, done.stderr.decode()
    goes_on("vm")


def test_upgrade_hands_over_to_new_processes(host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    old = host.boot("vm", options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),))
    goes_on("vm")
    before = row(host)
    done = host.softkvm("upgrade", "vm")
    assert done.returncode == 0, done.stderr.decode()
    assert old.wait(60) == 0
    host.wait_for_names(["vm"])
    goes_on("vm")
    after = row(host)
    assert before["pid"] != after["pid"]
    assert before["vm_pid"] != after["vm_pid"]
    kill_device_process(host)  # what it was made to outlive, it outlives there too
    assert host.softkvm("attach", "vm").returncode == 0
    goes_on("vm")
    assert host.softkvm("upgrade", "nobody").returncode == 1
    assert not list((host.runtime / "softkvm").glob("upgrade-*"))


@pytest.mark.parametrize(
    ("step", "stays"),
    [
        pytest.param("source:round=kill", True, marks=pytest.mark.slow), ("source:standing=kill", True),
        ("source:state=kill", False), pytest.param("source:prepared=kill", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_source_that_is_killed_while_it_migrates(
    step: str, stays: bool, host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """Until the destination has everything its VM waits here for another process, also while the guest stands for the switch;
    from then on it is the other host's, and what is left here is not attached to."""
    other = HostUnderTest(tmp_path, "b")
    try:
        uri = other.serve()
        host.boot("vm", fault=step, options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),))
        goes_on("vm")
        assert host.softkvm("migrate", "vm", uri, "--copy").returncode == 1
        if stays:
            assert row(host)["waits"]
            assert host.softkvm("attach", "vm").returncode == 0
            other.wait_for_names([])
        else:
            other.wait_for_names(["vm"])
            done = host.softkvm("attach", "vm")
            assert done.returncode == 1
            assert b"has gone on at another host" in done.stderr
            host.wait_for_names([])
        goes_on("vm")
    finally:
        other.close()


def test_a_source_that_is_killed_in_the_switch_of_a_post_copy(
    host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """The destination has no whole VM, so this one goes on."""
    other = HostUnderTest(tmp_path, "b")
    try:
        uri = other.serve()
        host.boot("vm", fault="source:state=kill", options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),))
        goes_on("vm")
        assert host.softkvm("migrate", "vm", uri, "--postcopy").returncode == 1
        other.wait_for_names([])
        done = host.softkvm("attach", "vm")
        assert done.returncode == 0, done.stderr.decode()
        goes_on("vm")
    finally:
        other.close()


def test_what_waits_ends_when_its_vm_has_moved(host: HostUnderTest, goes_on: Callable[..., int], tmp_path: Path) -> None:
    """To the same host, where the name is needed: an upgrade whose old process is killed in the middle of the switch."""
    host.boot("vm", fault="source:state=kill", options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),))
    goes_on("vm")
    before = row(host)["vm_pid"]
    host.softkvm("upgrade", "vm")
    goes_on("vm")
    host.wait_for_names(["vm"])
    assert (row(host)["vm_pid"] == before, row(host)["waits"]) == (False, False)


@pytest.mark.parametrize("way", ["handed", "copied", "post-copy"])
@pytest.mark.parametrize("step", ["destination:commit", "destination:decided"])
def test_a_destination_that_is_killed_when_it_is_decided(
    step: str, way: str, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    """Until its journal says that it runs the VM it is the source's, from then on it waits here: there is nothing between."""
    one, two = hosts
    uri = two.serve(fault=f"{step}=kill")
    one.boot("vm", options=("-keep",), drives=(memory_guest.drive(tmp_path / "disk"),))
    goes_on("vm")
    ways = {"handed": (), "copied": ("--copy",), "post-copy": ("--postcopy",)}
    with one.started("migrate", "vm", uri, *ways[way]) as moving:
        if step == "destination:commit":
            assert moving.wait(60) == 1
            goes_on("vm")
            assert one.status("vm") == "running"
            two.wait_for_names([])
            return
        if way != "post-copy":
            assert moving.wait(60) == 0
            one.wait_for_names([])
        wait_until_it_waits(two)
        done = two.softkvm("attach", str(row(two)["name"]))
        assert done.returncode == 0, done.stderr.decode()
        goes_on("vm")
        assert moving.wait(60) == 0
    one.wait_for_names([])
    two.wait_for_names(["vm"])
    assert two.status("vm") == "running"
