"""`softkvm bench ioctl` runs every row, and says the same to people and to programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qemu_user.cli import bench


def test_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert bench.main(["ioctl", "--rounds", "1", "--seconds", "0.1", "--json", str(file)]) == 0
    told = capsys.readouterr().out
    rows = json.loads(file.read_text())["ioctl"]
    assert {"ioctl", "ioctl-batch", "vm", "vm-vcpu", "generic", "sequences", "guests"} <= set(rows)
    for name, row in rows.items():
        assert row["per_second"] > 0
        if row["per_server_core"] is not None:  # the server may have done it all between two ticks of its clock
            assert name != "dev-kvm"
            assert row["per_server_core"] > 0
        assert name in told
