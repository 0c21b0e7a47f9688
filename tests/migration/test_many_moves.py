"""A few of what scripts/migrations does by the hundred: a guest under load, its network, files and a TCP connection, moved."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.framework.product import ROOT


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.skipif(shutil.which("mkfs.ext4", path="/sbin:/usr/sbin") is None, reason="needs mkfs.ext4 (e2fsprogs)")
def test_nothing_is_lost_in_eight_moves(busybox: None) -> None:
    command = [sys.executable, "-m", "tests.framework.migrations", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 moves, nothing lost" in done.stdout
    assert "file system: clean" in done.stdout
