"""The thread on which a migration or a snapshot runs."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

import pytest

from protocol.channel.latency import SLICE_NS
from qemu_user.machine.machine import Machine
from qemu_user.migration import job as jobs
from tests.framework.threads import slice_of


def test_it_is_woken_soon() -> None:
    """The guest stands while it waits."""
    if not slice_of(threading.get_native_id()):
        pytest.skip("this Linux does not say how long a thread's slices are")
    job, found = jobs.Job("migration"), []
    machine = cast(Machine, SimpleNamespace(job=None))
    jobs.start(machine, job, lambda job: found.append(slice_of(threading.get_native_id())))
    assert job.finished.wait(60)
    assert found == [SLICE_NS]
