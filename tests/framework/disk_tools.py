"""QEMU's disk tools as the oracle of the block layer's tests: qemu-img, qemu-io, qemu-nbd, and nbdkit."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

needs_qemu_img = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img and qemu-io: apt-get install qemu-utils"
)
needs_qemu_nbd = pytest.mark.skipif(not shutil.which("qemu-nbd"), reason="needs qemu-nbd: apt-get install qemu-utils")
needs_nbdkit = pytest.mark.skipif(not shutil.which("nbdkit"), reason="needs nbdkit: apt-get install nbdkit")


def qemu_img(*arguments: object, status: int = 0) -> str:
    """Its output; its exit status has to be `status`."""
    done = subprocess.run(["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == status, f"qemu-img {arguments}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(path: Path, *commands: str, format: str = "qcow2") -> str:
    """Do these commands on an image."""
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", format, *arguments, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"qemu-io {commands}: {done.stdout}{done.stderr}"
    assert "failed" not in done.stdout, done.stdout
    return done.stdout


def check(path: Path, leaks: bool = False) -> dict[str, Any]:
    """qemu-img's verdict on a qcow2 image, which has to be that it is clean (`leaks`: but for lost clusters)."""
    done = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode in ((0, 3) if leaks else (0,)), f"qemu-img check {path}: {done.stdout}{done.stderr}"
    return dict(json.loads(done.stdout))


def compare(path: Path, content: bytes, scratch: Path, format: str = "qcow2") -> None:
    """qemu-img compare finds the image to hold exactly `content`."""
    raw = scratch / "expected.raw"
    raw.write_bytes(content)
    qemu_img("compare", "-f", format, "-F", "raw", path, raw)
