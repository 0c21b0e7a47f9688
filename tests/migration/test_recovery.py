"""A connection that is lost while memory follows: both sides say so, the source calls again, and the guest has lost nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest


def move(
    hosts: tuple[HostUnderTest, HostUnderTest], step: str, folder: Path, way: str = "unix"
) -> subprocess.CompletedProcess[bytes]:
    one, two = hosts
    here = step.startswith("source")
    if way == "tcp":
        one.trust(two)
        two.trust(one)
    uri = two.serve("tcp://127.0.0.1:0" if way == "tcp" else "", fault="" if here else step)
    one.boot("vm", fault=step if here else "", pages=4096, pause=1000, drives=(memory_guest.drive(folder / "disk"),))
    return one.softkvm("migrate", "vm", uri, "--postcopy")


@pytest.mark.parametrize(
    ("step", "way"),
    [("source:page=cut", "unix"), ("destination:page=cut", "unix"), ("source:page=cut", "tcp")],
)
def test_connection_is_lost(
    step: str, way: str, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path
) -> None:
    one, two = hosts
    done = move(hosts, step, tmp_path, way)
    assert done.returncode == 0, done.stderr.decode()
    goes_on("vm")
    assert two.status("vm") == "running"
    one.wait_for_names([])
    said = b"".join(path.read_bytes() for path in (two.runtime / "softkvm").glob("*.log"))
    assert b"it waits for the source" in said
    assert b"the source of its memory is back" in said
    assert b"the destination is reached again" in (tmp_path / "vm.log").read_bytes()
    assert not list((two.runtime / "softkvm").glob("recover-*"))


@pytest.mark.parametrize("step", ["source:page=kill", "destination:page=kill"])
def test_a_side_dies(step: str, hosts: tuple[HostUnderTest, HostUnderTest], tmp_path: Path) -> None:
    """Then part of the memory is lost, the source's only with what it has left with kvmcore, and the VM with it: nobody runs
    half a VM, and nobody waits for ever."""
    one, two = hosts
    if step == "source:page=kill":
        uri = two.serve()
        one.boot("vm", fault=step, pages=4096, pause=1000, drives=(memory_guest.drive(tmp_path / "disk"),))
        one.begin_postcopy("vm", uri)
        assert one.softkvm("kill", "vm").returncode == 0
    else:
        move(hosts, step, tmp_path)
    one.wait_for_names([])
    two.wait_for_names([])
