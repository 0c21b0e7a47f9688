"""The warm parent's rehearsal: a usual VM runs, and nothing of it is left, so that forking stays safe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qemu_user.management.instance import Instance
from qemu_user.migration import arrival
from qemu_user.warm import rehearsal
from tests.framework.full_stack import Daemon


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ran: list[tuple[bool, set[str]]] = []
    restored = arrival.restored

    def watched(*arguments: Any, **named: Any) -> Instance:
        instance = restored(*arguments, **named)
        ran.append((instance.machine.let_run > 0, {device.name for device in instance.machine.parts.devices}))
        return instance

    monkeypatch.setattr(arrival, "restored", watched)
    left = tmp_path / "softkvm" / "rehearsal" / "vm"
    left.mkdir(mode=0o700, parents=True)  # the last one was killed in the middle of it
    left.parent.parent.chmod(0o700)
    (left / "control.sock").touch()
    with Daemon() as daemon:
        rehearsal.rehearse(daemon.endpoint, 1)
        descriptors, tasks = os.listdir("/proc/self/fd"), os.listdir("/proc/self/task")
        rehearsal.rehearse(daemon.endpoint, 2)
        assert len(os.listdir("/proc/self/fd")) == len(descriptors)
        assert os.listdir("/proc/self/task") == tasks
    assert [runs for runs, _ in ran] == [True] * 3
    assert {"uart", "rtc", "plic", "pcie", "vmgenid", "drive0", "net0", "console", "balloon", "rng"} <= ran[0][1]
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == []
