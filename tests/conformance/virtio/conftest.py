"""Devices behind both transports, for tests named by section of the virtio specification, version 1.2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.framework.devices import Bench


@pytest.fixture(params=["mmio", "pci"])
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    return Bench(tmp_path, request.param)
