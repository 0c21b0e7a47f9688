"""Whether a process lets the host merge equal pages (KSM)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def may_merge(pid: int) -> bool:
    """Whether the pages of the process's heap may be merged. Skips where the kernel cannot do that for a whole process."""
    asked = [sys.executable, "-c", "import ctypes, sys; sys.exit(ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) != 0)"]
    if subprocess.run(asked, check=False).returncode:
        pytest.skip("the host's kernel is older than 6.4, or has no KSM")
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            inside = line.endswith("[heap]")
        elif inside and name == "VmFlags:":
            return "mg" in rest
    raise AssertionError("it has no heap")
