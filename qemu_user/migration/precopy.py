"""Pre-copy: volumes are copied while the guest runs on, again and again what it wrote meanwhile, until the rest is so
small that copying it fits into the downtime that was promised; then the machine stands and the rest follows.

It always converges: a guest that outruns the copy is slowed down by making its vCPUs stand for a share of the time,
a larger one each round. Used for migrations (to another process) and snapshots (to files): the Sink is the difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Protocol

from qemu_user.migration import pages
from qemu_user.migration.job import ACTIVE, Job, JobError
from qemu_user.migration.messages import PIECE
from qemu_user.migration.volumes import Disk, Ram

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

CHUNK = 1 << 20
"""Bytes that a sink is given at once, at most."""
MAX_ROUNDS = 64
_STATE_SECONDS = 0.015
"""What saving and loading the state takes, taken off the downtime that the rest of the pages may use."""
_TOO_MUCH, _WANTED = 0.6, 0.3
"""A guest that has written more than the one part of what a round sent runs so much less that it should be the other,"""
_STEP, _MOST = 0.25, 0.99
"""but at least this part of what it ran before, and never stands for a larger share."""
_PERIOD, _LEAST_RUN = 0.01, 0.0005
"""Seconds: whoever looks at the guest sees each stop, so they are short; stopping it takes some 0.3 ms itself."""
_GUESS = 500e6
"""Bytes per second, before anything was measured."""
_WORTH_MEASURING = 256 << 10
_SMALL = 256 << 10
"""Bytes that are not worth another round."""
_LATELY = 0.01
"""Post-copy: seconds before the switch. What a guest has written then it touches first when it goes on: that goes along,"""
_MOST_TAKEN_ALONG = 1 << 20
"""and of the rest as much as this takes, in bytes: less than a millisecond, and a fault less for each piece."""


class Sink(Protocol):
    """Where units go. Both calls return how many bytes went over the wire or to the disk."""

    def data(self, volume: Ram | Disk, first: int, count: int, content: memoryview) -> int:
        """The content of units [first, first + count)."""

    def zeroes(self, volume: Ram | Disk, first: int, count: int, fresh: bool) -> int:
        """These units are all zero; `fresh`: nothing was ever said about them."""

    def end_of_round(self) -> None:
        """All that was given has to be there now."""

    def flush(self) -> None:
        """All that was given has to be under way now."""


class Precopy:
    """rounds(), then finish() while the machine stands, then close() however it went."""

    def __init__(
        self, machine: Machine, volumes: Sequence[Ram | Disk], sink: Sink, job: Job, max_downtime: float,
        bandwidth: float = 0.0, leave_memory: bool = False,
        keep_promise: bool = True,
    ) -> None:  # fmt: skip
        """`max_downtime` in seconds, `bandwidth` in bytes per second, 0 for no limit. `leave_memory`: one round of RAM is
        enough, the rest follows when it is touched (post-copy). Not `keep_promise`: rather a longer pause than none.
        """
        self._leave_memory, self._keep_promise = leave_memory, keep_promise
        self._machine, self._volumes, self._sink, self._job = machine, volumes, sink, job
        self._max_downtime, self._bandwidth = max_downtime, bandwidth
        self._rate = min(_GUESS, bandwidth or _GUESS)
        self._throttle = _Throttle(machine, job)
        self._pending: list[bytearray] = []
        self._budget = time.monotonic()

    def rounds(self) -> None:
        """Copy until the rest is small enough. Cancelled; OSError of the sink."""
        job = self._job
        self._pending = [volume.start() for volume in self._volumes]
        job.total = sum(volume.size for volume in self._volumes)
        job.status = ACTIVE
        first = True
        while True:
            job.rounds += 1
            started, amount = time.monotonic(), self._amount()
            self._send(first)
            self._sink.end_of_round()
            spent = max(time.monotonic() - started, 1e-6)
            if amount >= _WORTH_MEASURING:
                self._rate = 0.5 * self._rate + 0.5 * amount / spent if not first else amount / spent
            # What a guest that outruns us writes between a look and the switch would undo the copy: it stands first.
            self._throttle.hold()
            self._pending = [volume.take() for volume in self._volumes]
            rest = self._amount()
            job.dirty_rate, job.throughput, job.remaining = rest / spent, self._rate, rest
            job.expected_downtime = rest / self._rate + _STATE_SECONDS
            allowed = max(self._max_downtime - _STATE_SECONDS, 0.2 * self._max_downtime) * self._rate
            left = rest - self._amount(disks_only=True) if self._leave_memory else 0
            # What is allowed need not be used up: another round while each leaves less than half.
            least = self._leave_memory or rest <= _SMALL or (not first and rest > amount / 2)
            if rest - left <= allowed and least:
                if self._leave_memory:
                    job.sleep(_LATELY)
                return
            if job.rounds >= MAX_ROUNDS:
                if self._keep_promise:
                    needed = 1000 * (rest / self._rate + _STATE_SECONDS)
                    raise JobError(
                        f"the guest would stand for {needed:.0f} ms, {1000 * self._max_downtime:.0f} ms were allowed; "
                        "allow more (--max-downtime), or let memory follow (--postcopy)"
                    )
                return
            self._throttle.adapt(rest / max(amount, _SMALL))
            self._throttle.go_on()
            first = False

    def finish(self) -> bytearray:
        """The machine stands: copy the rest. The map of RAM's pages that were left, if they were to be; else empty."""
        left = bytearray()
        for position, volume in enumerate(self._volumes):
            lately = volume.take()
            self._pending[position] = pages.union(self._pending[position], lately)
            if self._leave_memory and isinstance(volume, Ram):
                first = chain(volume.rings(), pages.indices(lately), pages.indices(self._pending[position]))
                most = _MOST_TAKEN_ALONG // volume.unit
                left, self._pending[position] = pages.divided(self._pending[position], first, PIECE // volume.unit, most)
        self._send(False)
        self._sink.flush()
        self._job.remaining = 0
        return left

    def close(self) -> None:
        """Let the guest run at full speed, and track no more. Idempotent."""
        self._throttle.release()
        for volume in self._volumes:
            volume.stop()

    def _amount(self, disks_only: bool = False) -> int:
        return sum(
            pages.count(units) * volume.unit
            for units, volume in zip(self._pending, self._volumes, strict=True)
            if not (disks_only and isinstance(volume, Ram))
        )

    def _send(self, first: bool) -> None:
        for units, volume in zip(self._pending, self._volumes, strict=True):
            for start, length in pages.runs(units, CHUNK // volume.unit):
                self._job.check()
                sent = self._send_run(volume, start, length, first)
                self._job.transferred += sent
                if self._bandwidth:
                    self._wait_for_budget(sent)

    def _send_run(self, volume: Ram | Disk, start: int, length: int, first: bool) -> int:
        if not isinstance(volume, Ram):
            return self._sink.data(volume, start, length, memoryview(volume.read(start, length)))
        sent = 0
        for zero, at, count in pages.split_zeroes(volume.address, start, length, volume.unit):
            if zero:
                sent += self._sink.zeroes(volume, at, count, first)
            else:
                sent += self._sink.data(volume, at, count, volume.view[at * volume.unit : (at + count) * volume.unit])
        return sent

    def _wait_for_budget(self, sent: int) -> None:
        now = time.monotonic()
        self._budget = max(self._budget, now - 0.01) + sent / self._bandwidth
        if self._budget > now and self._machine.status == "running":
            self._job.sleep(self._budget - now)


def slowed(share: float, left: float) -> float:
    """The share of the time for which a guest stands from now on, that stood for `share` in a round that has left this part of
    what it sent."""
    if left <= _TOO_MUCH:
        return share
    return min(1 - (1 - share) * max(_STEP, _WANTED / left), _MOST)


def stint(share: float) -> tuple[float, float]:
    """(seconds that it runs, seconds that it stands then) and again."""
    period = max(_PERIOD, _LEAST_RUN / (1 - share))
    return (1 - share) * period, share * period


class _Throttle:
    """Makes the vCPUs stand for a share of the time."""

    def __init__(self, machine: Machine, job: Job) -> None:
        self._machine, self._job = machine, job
        self._share = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._holds = False

    def adapt(self, left: float) -> None:
        """A round has left this part of what it sent."""
        self._share = self._job.throttle = slowed(self._share, left)

    def _run(self, stop: threading.Event) -> None:
        runs, stands = stint(self._share)
        while not stop.is_set():
            self._machine.rest(stands, stop)
            stop.wait(runs)

    def hold(self) -> None:
        """A guest that is slowed down stands, until go_on() or release()."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._machine.rest(0, self._stop)
            self._holds = True

    def go_on(self) -> None:
        """After hold(): as before."""
        self._release()
        if self._share:
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._stop,), name="throttle", daemon=True)
            self._thread.start()

    def _release(self) -> None:
        if self._holds:
            self._holds = False
            self._machine.unrest()

    def release(self) -> None:
        """Full speed again. Idempotent."""
        self.hold()
        self._release()
        self._share = self._job.throttle = 0.0
