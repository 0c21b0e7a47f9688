"""The device side of the fuzzer: every device is driven, and what it found stays fixed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from qemu_user.cli import fuzz
from qemu_user.devices.virtio.catalogue import DEVICES
from qemu_user.devices.virtio.queue import Chain, QueueError
from qemu_user.fuzz import devices
from qemu_user.fuzz.devices import TARGETS, perform_device
from qemu_user.fuzz.sequence import Op
from qemu_user.fuzz.virtio_case import BUILDERS, PORTS
from qemu_user.images import deb
from qemu_user.images.errors import ImageError


def test_every_virtio_device_is_driven() -> None:
    assert set(BUILDERS) == set(DEVICES)
    assert {f"{device}-{port}" for device in DEVICES for port in PORTS} < set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_nonsense_is_stood(name: str, tmp_path: Path) -> None:
    for seed in range(30):
        assert perform_device(Op("device", name=name, extra={"seed": f"t:{seed}"}), tmp_path) is None


def test_taking_nothing_of_a_chain_without_readable_buffers() -> None:
    """Found in 9p, balloon and net: a request of write-only buffers raised IndexError."""
    assert Chain(0, [], []).take(0) == b""
    with pytest.raises(QueueError):
        Chain(0, [], []).take(1)


def test_a_member_of_negative_size() -> None:
    """Found in packages: a member of -60 bytes was looked at for ever."""
    head = b"!<arch>\n" + b"x".ljust(48) + b"-60".ljust(10) + b"`\n"
    with tempfile.NamedTemporaryFile() as file:
        file.write(head)
        file.flush()
        with pytest.raises(ImageError, match="damaged"):
            list(deb.members(Path(file.name)))


def test_a_device_that_raises_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: object, index: int) -> None:
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(DEVICES["rng"], "on_queue", broken)
    figures = devices.run(1, 60, tmp_path, lambda figures: None, most=20, targets=("rng-pci",))
    assert figures.findings == 1
    (file,) = (tmp_path / "findings").iterdir()
    assert fuzz.main(["replay", str(file)]) == 1
    assert "broken on purpose" in capsys.readouterr().out


def test_a_target_that_there_is_not_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fuzz.main(["--devices", "blk,nonsense", "--output", str(tmp_path)]) == 2
    assert "no target is called nonsense" in capsys.readouterr().err
    assert devices.chosen("blk,qcow2") == ("blk-mmio", "blk-pci", "qcow2")
