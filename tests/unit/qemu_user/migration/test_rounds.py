"""How many rounds of pre-copy there are before the guest stands."""

from __future__ import annotations

from typing import cast

import pytest

from qemu_user.machine.machine import Machine
from qemu_user.migration.job import Job
from qemu_user.migration.precopy import Precopy, Sink, slowed, stint
from qemu_user.migration.volumes import Disk

UNIT = 64 << 10


class Volume:
    """What the guest writes during each round, in units; later as much as in the last one."""

    unit, size = UNIT, 1024 * UNIT

    def __init__(self, written: list[int]) -> None:
        self.written = written

    def _units(self, count: int) -> bytearray:
        return bytearray(b"\1" * count + bytes(self.size // self.unit - count))

    def start(self) -> bytearray:
        return self._units(1024)

    def take(self) -> bytearray:
        return self._units(self.written.pop(0) if len(self.written) > 1 else self.written[0])

    def read(self, first: int, count: int) -> bytes:
        return bytes(count * self.unit)

    def stop(self) -> None:
        pass


class Counting:
    """A sink that is as fast as can be."""

    def __init__(self) -> None:
        self.bytes = 0

    def data(self, volume: object, first: int, count: int, content: memoryview) -> int:
        self.bytes += len(content)
        return len(content)

    def end_of_round(self) -> None:
        pass

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    ("written", "rounds", "last"),
    [
        ([4], 1, 4),  # little from the first on
        ([100, 40, 15, 3], 4, 3),  # each round leaves less than half
        ([100, 60], 2, 60),  # it gets no better, and is allowed
        ([0], 1, 0),
    ],
)
def test_rounds(written: list[int], rounds: int, last: int) -> None:
    job, sink = Job("migration"), Counting()
    volume = Volume(written)
    copy = Precopy(cast(Machine, None), [cast(Disk, volume)], cast(Sink, sink), job, max_downtime=1e6)
    copy.rounds()
    assert job.rounds == rounds
    before = sink.bytes
    volume.written = [0]
    copy.finish()
    assert sink.bytes - before == last * UNIT


@pytest.mark.parametrize("outruns", [0.7, 1, 1.5, 4, 20])
def test_a_guest_is_slowed_down_as_much_as_it_takes(outruns: float) -> None:
    """It writes `outruns` times what is sent meanwhile."""
    share, rounds = 0.0, 0
    while (left := outruns * (1 - share)) > 0.6:
        share = slowed(share, left)
        rounds += 1
    assert rounds <= 3
    assert left > 0.25  # and no more
    assert slowed(share, left) == share


def test_a_guest_that_cannot_be_slowed_down_enough_still_runs() -> None:
    share = 0.0
    for _ in range(20):
        share = slowed(share, 50)
    assert share == 0.99


@pytest.mark.parametrize("share", [0.01, 0.4, 0.7, 0.95, 0.99])
def test_a_guest_that_is_slowed_down_stands_for_short_times(share: float) -> None:
    runs, stands = stint(share)
    assert stands / (runs + stands) == pytest.approx(share)
    assert runs > 0.0004  # stopping takes about as long
    assert stands <= (0.01 if share <= 0.95 else 0.05)
