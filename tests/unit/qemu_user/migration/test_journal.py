"""Journals of a hand-over: a living side decides, a dead one's last word counts, and is settled once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qemu_user.migration import journal
from qemu_user.migration.journal import ABORTED, COMMITTED, GRANTED, OFFERED, PREPARED, REVOKED, RUNNING, Journal

UUID = "6ee2d1c0-3c42-4a39-9a3e-2a6d1f9f5f10"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def left(role: str, *states: str) -> str:
    """The journal of a side that wrote these and died."""
    ours = Journal(UUID, role)
    for state in states:
        ours.write(state, 1)
    ours.keep()
    return str(ours.path)


def test_a_living_side_is_believed() -> None:
    source = Journal(UUID, "source")
    for state in (OFFERED, ABORTED, COMMITTED):
        source.write(state, 1)
        assert journal.ask_source(str(source.path), 2) == state
    destination = Journal(UUID, "destination")
    for state in (PREPARED, RUNNING):
        destination.write(state, 2)
        assert journal.ask_destination(str(destination.path), 3) == state
    source.close()
    destination.close()


@pytest.mark.parametrize(
    ("states", "verdict"), [((), GRANTED), ((OFFERED,), GRANTED), ((COMMITTED,), COMMITTED), ((ABORTED,), ABORTED)]
)
def test_a_dead_source(states: tuple[str, ...], verdict: str) -> None:
    path = left("source", *states)
    assert journal.ask_source(path, 2) == verdict
    assert journal.ask_source(path, 2) == verdict


@pytest.mark.parametrize(("states", "verdict"), [((), REVOKED), ((PREPARED,), REVOKED), ((RUNNING,), RUNNING)])
def test_a_dead_destination(states: tuple[str, ...], verdict: str) -> None:
    path = left("destination", *states)
    assert journal.ask_destination(path, 3) == verdict
    assert journal.ask_destination(path, 3) == verdict


def test_what_is_granted_is_not_revoked_and_the_reverse() -> None:
    path = left("source", OFFERED)
    assert journal.ask_source(path, 2) == GRANTED
    assert journal.ask_source(path, 2) == GRANTED
    other = left("destination", PREPARED)
    assert journal.ask_destination(other, 3) == REVOKED


def test_no_other_file_is_written(runtime: Path) -> None:
    victim = runtime / "victim"
    victim.write_text("precious")
    folder = runtime / "handover"
    folder.mkdir()
    link = folder / f"{UUID}.1.2.source"
    os.symlink(victim, link)
    large = folder / f"{UUID}.1.3.source"
    large.write_bytes(b"x" * 4096)
    for path in (str(victim), str(link), str(large), str(runtime / "handover" / "missing"), "/proc/self/mem"):
        assert journal.ask_source(path, 2) == ABORTED
    assert victim.read_text() == "precious"
    assert large.read_bytes() == b"x" * 4096


def test_what_a_dead_side_has_left_keeps_it_from_being_dead(runtime: Path) -> None:
    ours = Journal(UUID, "source")
    ours.write(OFFERED, 1)
    held = ours.held()
    assert not journal.is_dead(str(ours.path))
    ours.keep()
    assert journal.is_dead(str(ours.path))  # it has not given it away
    with ours.path.open("r+b") as file:
        file.write(b'{"state": "committed", "generation": 2}'.ljust(128))
    os.utime(ours.path, (0, 0))
    assert not journal.is_dead(str(ours.path))
    Journal(UUID, "destination").close()  # which clears away what nobody has asked about for long
    assert journal.state_of(held) == COMMITTED
    assert ours.path.exists()
    passed_on = os.dup(held)
    os.close(held)
    assert not journal.is_dead(str(ours.path))
    os.close(passed_on)
    assert journal.is_dead(str(ours.path))
    Journal(UUID, "destination").close()
    assert not ours.path.exists()


def test_what_kvmcore_looks_for_is_what_is_written() -> None:
    ours = Journal(UUID, "destination")
    for state in (PREPARED, RUNNING, ABORTED):
        ours.write(state, 1)
        with ours.opened() as file:
            said = file.read()
        words = {other: journal.condition(other)[0].encode() for other in (PREPARED, RUNNING, ABORTED)}
        assert [other for other, word in words.items() if said.startswith(word)] == [state]
    ours.close()
