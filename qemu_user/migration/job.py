"""One migration or snapshot of a VM while it happens: numbers for who watches, and the way to call it off.

Made by the command that starts it, filled in by precopy.py and source.py on the job's own thread, read by
query-migrate. States have QEMU's names (MigrationStatus).
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qemu_user.machine.machine import Machine

SETUP, ACTIVE, DEVICE, POSTCOPY, POSTCOPY_PAUSED = "setup", "active", "device", "postcopy-active", "postcopy-paused"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)


class JobError(Exception):
    """It cannot be done; the text is for the user, and the VM goes on where it was."""


class Cancelled(Exception):
    """The user has called it off."""


class Job:
    """`kind`: "migration", "snapshot", ... Sizes in bytes, times in seconds."""

    def __init__(self, kind: str, goal: str = "") -> None:
        self.kind, self.goal = kind, goal
        self.status = SETUP
        self.error = ""
        self.result = ""
        """What to tell the user at the end."""
        self.total = self.remaining = self.transferred = 0
        self.rounds = 0
        self.dirty_rate = self.throughput = 0.0
        """Bytes per second: written by the guest, moved by us."""
        self.expected_downtime = self.downtime = 0.0
        self.throttle = 0.0
        """Share of the time that the vCPUs are made to stand."""
        self.waits: list[float] = []
        """How long pages that were touched before they had come were waited for."""
        self.started = time.monotonic()
        self.ended = 0.0
        self.called_off = threading.Event()
        self.finished = threading.Event()

    def cancel(self) -> None:
        """Call it off, if it is not too late."""
        self.called_off.set()

    @property
    def cancelled(self) -> bool:
        return self.called_off.is_set()

    def end(self, status: str) -> None:
        """It is over."""
        self.status, self.ended = status, time.monotonic()
        self.finished.set()

    def check(self) -> None:
        """Cancelled, if somebody has called it off."""
        if self.called_off.is_set():
            raise Cancelled

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than until it is called off."""
        if self.called_off.wait(seconds):
            raise Cancelled

    def numbers(self) -> dict[str, Any]:
        """What query-migrate shows."""
        return {
            "status": self.status,
            "kind": self.kind,
            "goal": self.goal,
            "total-time": round(1000 * ((self.ended or time.monotonic()) - self.started)),
            "downtime": round(1000 * self.downtime, 1),
            "expected-downtime": round(1000 * self.expected_downtime, 1),
            "cpu-throttle-percentage": round(100 * self.throttle),
            "error-desc": self.error,
            "result": self.result,
            "postcopy": {"faults": len(self.waits), "median-us": round(1e6 * median(self.waits)) if self.waits else 0},
            "ram": {
                "total": self.total,
                "remaining": self.remaining,
                "transferred": self.transferred,
                "dirty-sync-count": self.rounds,
                "dirty-bytes-rate": round(self.dirty_rate),
                "mbps": round(8 * self.throughput / 1e6, 1),
            },
        }


def arriving(machine: Machine, kind: str, status: str) -> Job:
    """The machine comes from elsewhere: `kind` is "arrival" or "restore"."""
    job = machine.job = Job(kind)
    job.status = status
    return job


def start(machine: Machine, job: Job, work: Callable[[Job], None]) -> None:
    """Run `work(job)` on a thread of its own. JobError if something is under way already."""
    if machine.job is not None and not machine.job.finished.is_set():
        raise JobError(f"VM {machine.config.name}: a {machine.job.kind} is under way; cancel it or wait")
    machine.job = job
    threading.Thread(target=_run, args=(machine, job, work), name=job.kind, daemon=True).start()


def _run(machine: Machine, job: Job, work: Callable[[Job], None]) -> None:
    try:
        work(job)
        job.status = COMPLETED
    except Cancelled:
        job.status = CANCELLED
    except (JobError, OSError, ValueError, TimeoutError) as error:
        job.error, job.status = str(error) or repr(error), FAILED
    except Exception as error:
        machine.warn(f"internal error in a {job.kind}: {error!r}\n{traceback.format_exc()}")
        job.error, job.status = f"internal error: {error!r}", FAILED
    finally:
        job.ended = time.monotonic()
        job.finished.set()
