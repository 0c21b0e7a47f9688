"""The device side of the fuzzer: every device is driven, and what it found stays fixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_user.cli import fuzz
from qemu_user.devices.virtio import DEVICES
from qemu_user.devices.virtio.queue import Chain, QueueError
from qemu_user.fuzz import devices
from qemu_user.fuzz.devices import BUILDERS, TARGETS, perform_device
from qemu_user.fuzz.sequence import Op


def test_every_virtio_device_is_driven() -> None:
    assert set(BUILDERS) == set(DEVICES)


@pytest.mark.parametrize("name", TARGETS)
def test_nonsense_is_stood(name: str, tmp_path: Path) -> None:
    for seed in range(60):
        assert perform_device(Op("device", name=name, extra={"seed": f"t:{seed}"}), tmp_path) is None


def test_taking_nothing_of_a_chain_without_readable_buffers() -> None:
    """Found in 9p, balloon and net: a request of write-only buffers raised IndexError."""
    assert Chain(0, [], []).take(0) == b""
    with pytest.raises(QueueError):
        Chain(0, [], []).take(1)


def test_a_device_that_raises_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, index: int) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(DEVICES["rng"], "on_queue", broken)
    figures = devices.run(1, 60, tmp_path, lambda figures: None, most=20)
    assert figures.findings == 1
    (file,) = (tmp_path / "findings").iterdir()
    assert fuzz.main(["replay", str(file)]) == 1
    assert "broken on purpose" in capsys.readouterr().out
