"""State that earlier versions have recorded loads for ever, and comes out again as it went in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from qemu_user.config.machine_config import Drive
from qemu_user.machine.machine import Machine
from qemu_user.migration import machine_state, sections
from tests.migration.record_golden import FOLDER

RECORDED = sorted(FOLDER.glob("*.state"))


def test_there_is_one() -> None:
    assert RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_state_loads(path: Path, endpoint: str, tmp_path: Path) -> None:
    recorded = sections.decode(path.read_bytes())
    config = machine_state.read_config(recorded)
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    machine = Machine(msgspec.structs.replace(config, drives=(Drive(file=str(tmp_path / "disk")),)), endpoint)
    machine.start(arriving=True)
    try:
        with machine.standing():
            machine_state.restore(machine, machine_state.check(machine, recorded))
            again = {part.name: part for part in machine_state.capture(machine)}
    finally:
        machine.close()
    assert set(again) == set(recorded)
    for name, part in recorded.items():
        if name not in ("config", "machine") and again[name].version == part.version:
            assert msgspec.msgpack.decode(again[name].payload) == msgspec.msgpack.decode(part.payload), name
