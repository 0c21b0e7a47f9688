"""kill -9 of either side, or a lost connection, at every step of a hand-over: never two running copies, never none but
where the one that ran the guest was killed itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_user.migration.steps import STEPS
from tests.framework import memory_guest
from tests.migration.hosts import HostUnderTest

SOURCE, DESTINATION, NEITHER = "source", "destination", "neither"
#: Where the VM must be in the end. A killed process takes the guest along that it runs, so a source that is killed before
#: the destination has everything, or a destination that is killed after it has begun to run, leaves what kill -9 of a VM
#: leaves: no VM, and a disk that nobody has locked.
KILLED = {
    "source:connected": NEITHER, "source:offered": NEITHER, "source:round": NEITHER, "source:standing": NEITHER,
    "source:state": DESTINATION, "source:prepared": DESTINATION, "source:committed": DESTINATION,
    "source:commit-sent": DESTINATION, "source:done": DESTINATION,
    "destination:hello": SOURCE, "destination:built": SOURCE, "destination:data": SOURCE, "destination:state": SOURCE,
    "destination:prepared": SOURCE, "destination:prepared-sent": SOURCE, "destination:commit": SOURCE,
    "destination:decided": NEITHER, "destination:running": NEITHER, "destination:done": NEITHER,
}  # fmt: skip
CUT = {
    **dict.fromkeys(STEPS, SOURCE),
    "source:prepared": DESTINATION, "source:committed": DESTINATION, "source:commit-sent": DESTINATION,
    "source:done": DESTINATION,
    "destination:prepared-sent": DESTINATION, "destination:commit": DESTINATION, "destination:decided": DESTINATION,
    "destination:running": DESTINATION, "destination:done": DESTINATION,
}  # fmt: skip
#: The VM's process of kvmcore, alone or with its daemon. Its registers are there, so a source that has not sent them is lost.
KVMCORE = {
    "source:connected": NEITHER, "source:offered": NEITHER, "source:standing": NEITHER,
    "source:state": DESTINATION, "source:prepared": DESTINATION, "source:committed": DESTINATION,
    "source:commit-sent": DESTINATION, "source:done": DESTINATION,
    "destination:built": SOURCE, "destination:data": SOURCE, "destination:state": SOURCE, "destination:prepared": SOURCE,
    "destination:prepared-sent": SOURCE, "destination:commit": SOURCE,
    "destination:decided": NEITHER, "destination:running": NEITHER, "destination:done": NEITHER,
}  # fmt: skip
TABLES = {"kill": KILLED, "cut": CUT, "killvm": KVMCORE, "killdaemon": KVMCORE}
#: Those that run every time; the rest are slow.
QUICK = {
    ("source:state", "kill"), ("source:committed", "cut"), ("destination:prepared-sent", "kill"),
    ("source:prepared", "killvm"), ("source:standing", "killdaemon"),
    ("destination:commit", "killvm"), ("destination:state", "killdaemon"), ("destination:decided", "killdaemon"),
}  # fmt: skip


#: Post-copy: the destination alone has no whole VM. What is left of a source that is killed behind the switch: test_owed.py.
POSTCOPY = {"source:state": NEITHER, "source:prepared": NEITHER}
OWED = ("source:committed", "source:commit-sent", "source:done")


def cases() -> list[object]:
    found = []
    for way in ("handed", "copied", "tcp", "post-copy"):
        for action, table in TABLES.items():
            for step, expected in table.items():
                if way == "post-copy" and action == "kill":
                    if step in OWED:
                        continue
                    expected = POSTCOPY.get(step, expected)
                quick = way in ("handed", "copied") and (step, action) in QUICK
                marks = () if quick else (pytest.mark.slow,)
                found.append(pytest.param(step, action, expected, way, id=f"{way}-{step}={action}", marks=marks))
    return found


def running(hosts: tuple[HostUnderTest, HostUnderTest]) -> list[str]:
    """Who runs the VM, of both hosts, under whatever name."""
    found = []
    for role, host in zip((SOURCE, DESTINATION), hosts, strict=True):
        found += [role for name in host.names() if host.status(name) == "running"]
    return found


@pytest.mark.parametrize(("step", "action", "expected", "way"), cases())
def test_fault(
    step: str, action: str, expected: str, way: str,
    hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int], tmp_path: Path,
) -> None:  # fmt: skip
    one, two = hosts
    here = step.startswith("source")
    if step == "destination:data" and way == "handed":
        expected = DESTINATION  # memory that is given as it is needs no data: nothing happens
    possible = [[] if expected == NEITHER else [expected]]
    if way == "tcp":
        one.trust(two)
        two.trust(one)
        if (step, action) == ("destination:prepared-sent", "cut"):
            possible.append([SOURCE])  # ZeroMQ may drop what is under way when it closes
    uri = two.serve("tcp://127.0.0.1:0" if way == "tcp" else "", fault="" if here else f"{step}={action}")
    one.boot("vm", fault=f"{step}={action}" if here else "", drives=(memory_guest.drive(tmp_path / "disk"),))
    goes_on("vm")
    one.softkvm("migrate", "vm", uri, *{"copied": ["--copy"], "post-copy": ["--postcopy"]}.get(way, []))
    end, seen = time.monotonic() + 60, []
    while time.monotonic() < end:
        seen = running(hosts)
        assert len(seen) <= 1, f"runs at {seen}"
        if seen in possible and settled(hosts):
            break
        time.sleep(0.1)
    assert seen in possible
    assert settled(hosts)
    if seen:
        goes_on("vm", more=5)
        assert running(hosts) == seen
    else:
        one.wait_for_names([])
        two.wait_for_names([])
        one.boot("again", drives=(memory_guest.drive(tmp_path / "disk"),))  # nobody holds its lock


EXTRA = {
    ("source:extra", "kill"): NEITHER, ("source:extra", "cut"): SOURCE,
    ("destination:extra", "kill"): SOURCE, ("destination:extra", "cut"): SOURCE,
}  # fmt: skip


@pytest.mark.parametrize("way", ["copied", pytest.param("tcp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("step", "action"), EXTRA, ids="=".join)
def test_fault_of_one_of_several_channels(
    step: str, action: str, way: str, hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]
) -> None:
    one, two = hosts
    if way == "tcp":
        one.trust(two)
        two.trust(one)
    here, expected = step.startswith("source"), EXTRA[step, action]
    uri = two.serve("tcp://127.0.0.1:0" if way == "tcp" else "", fault="" if here else f"{step}={action}")
    one.boot("vm", fault=f"{step}={action}" if here else "", pages=2000)
    goes_on("vm")
    assert one.softkvm("migrate", "vm", uri, "--copy", "--channels", "3").returncode
    two.wait_for_names([])
    if expected == SOURCE:
        goes_on("vm", more=5)
        assert running(hosts) == [SOURCE]
    else:
        one.wait_for_names([])


def test_every_step_is_in_the_tables() -> None:
    assert set(KILLED) == set(CUT) == set(STEPS)
    assert set(STEPS) - set(KVMCORE) == {"source:round", "destination:hello"}  # nothing but the step before them; no VM yet


def settled(hosts: tuple[HostUnderTest, HostUnderTest]) -> bool:
    """Whether no VM stands in the middle of a hand-over any more."""
    return all(host.status(name) not in ("inmigrate", "postmigrate") for host in hosts for name in host.names())


def test_a_lost_source_of_post_copy_is_told(hosts: tuple[HostUnderTest, HostUnderTest], goes_on: Callable[..., int]) -> None:
    """Memory that has not come is gone with what the source has left: the VM ends, and says why."""
    one, two = hosts
    uri = two.serve()
    one.boot("vm", fault="source:done=kill", pages=4000, pause=0, memory=128 << 20)
    goes_on("vm")
    one.begin_postcopy("vm", uri)
    assert one.softkvm("kill", "vm").returncode == 0
    one.wait_for_names([])
    two.wait_for_names([])
    logs = b"".join(path.read_bytes() for path in (two.runtime / "softkvm").glob("incoming*.log"))
    assert b"a page of its memory cannot be had" in logs
