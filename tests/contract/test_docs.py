"""Generated documentation is fresh, and what the ioctl table promises has a function."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.abi import ioctls

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_FUNCTION = {"CREATE_IRQCHIP", "SET_MEMORY_ATTRIBUTES", "PRE_FAULT_MEMORY"}
"""Known by name, absent on RISC-V."""


def test_abi_page_is_fresh() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs"), "--check"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("row", ioctls.IOCTLS, ids=lambda row: row.name)
def test_each_row_has_its_function(row: ioctls.Ioctl) -> None:
    for kind in row.on:
        function = getattr(importlib.import_module(f"kvmcore.ioctl.{kind}"), row.function, None)
        assert (function is None) == (row.name in WITHOUT_FUNCTION)
        if function is not None:
            assert len(inspect.signature(function).parameters) == 2
            assert inspect.getdoc(function)
