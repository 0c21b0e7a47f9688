"""kvmcore/server/watchdog.py: a process that should have ended, ends."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from kvmcore.server import watchdog


@pytest.mark.parametrize("outlives", [False, True])
def test_it_ends_what_its_owner_has_left(outlives: bool) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(owner.pid)
    asked, ended = threading.Event(), threading.Event()

    def may_live() -> bool:
        asked.set()
        return outlives

    watchdog.watch(pidfd, may_live, ended.set, patience=0.05)
    os.close(pidfd)
    assert not asked.wait(0.2), "the owner lives"
    owner.kill()
    owner.wait()
    assert asked.wait(60)
    assert ended.wait(0.2 if outlives else 60) != outlives
