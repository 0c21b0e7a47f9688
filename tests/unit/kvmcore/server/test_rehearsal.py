"""The zygote's rehearsal: a whole VM is made, told and thrown away, and nothing of it is left, so that forking stays safe."""

from __future__ import annotations

import os
import threading

from kvmcore import ioctl
from kvmcore.server import rehearsal


def test_nothing_is_left() -> None:
    ioctl.preload()
    rehearsal.rehearse(1)
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    rehearsal.rehearse(3)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)
