"""The warm parent's rehearsal: all devices of a usual machine are made and restored, and nothing of it is left."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from qemu_user.machine.build import Parts
from qemu_user.warm import rehearsal


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[set[str]] = []
    build = Parts.build

    def watched(self: Parts, *arguments: Any) -> None:
        build(self, *arguments)
        built.append({device.name for device in self.devices})

    monkeypatch.setattr(Parts, "build", watched)
    rehearsal.rehearse(1)
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    rehearsal.rehearse(2)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (descriptors, threads)
    assert len(built) == 3
    assert {"uart", "rtc", "plic", "pcie", "vmgenid", "drive0", "net0", "console", "balloon", "rng"} <= built[0]
