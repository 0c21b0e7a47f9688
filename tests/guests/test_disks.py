"""Debian's kernel on qcow2 overlays and mirrors: what it has synced is there after kill -9 of the VM."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from qemu_user.backends.block.qcow2.create import create_qcow2
from tests.framework.disk_tools import check, needs_qemu_img
from tests.framework.product import Product, read_until

MKE2FS = shutil.which("mke2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""
pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("busybox"),
    pytest.mark.skipif(not MKE2FS, reason="needs mke2fs: apt-get install e2fsprogs"),
]
MIB = 1 << 20
WRITE = """
    mkdir -p /m; mount -t ext4 -o discard /dev/vda /m && cd /m
    n=0
    while [ $n -lt 12 ]; do
        dd if=/dev/urandom of=file$n bs=64k count=9 2>/dev/null
        [ $n -gt 3 ] && rm -f file$((n - 4))
        md5sum file* > sums; sync; n=$((n + 1))
    done
    cp sums kept; sync; echo synced
    while true; do dd if=/dev/urandom of=more bs=4k count=100 conv=fsync 2>/dev/null; rm more; done
"""
READ = "mkdir -p /m; mount -t ext4 /dev/vda /m && cd /m && md5sum -c kept && wc -l < kept && echo whole"


def _base(folder: Path) -> Path:
    base = folder / "base.img"
    base.write_bytes(bytes(48 * MIB))
    subprocess.run([MKE2FS, "-q", "-F", "-t", "ext4", str(base)], check=True)
    return base


@needs_qemu_img
@pytest.mark.parametrize("kind", ["overlay", "mirror"])
def test_what_is_synced_survives_kill_9(product: Product, tmp_path: Path, kind: str) -> None:
    base = _base(tmp_path)
    top = tmp_path / "top.qcow2"
    if kind == "overlay":
        create_qcow2(top, 48 * MIB, "base.img", "raw")
        drive = f"file={top},discard=unmap,id=data"
    else:
        create_qcow2(top, 48 * MIB)
        drive = f"driver=mirror,file={base},file={top},discard=unmap,id=data"
    running = product.start("run", "--drive", drive, "--", "sh", "-c", WRITE)
    try:
        read_until(running, b"synced\n", 120)
        os.kill(running.pid, signal.SIGKILL)
    finally:
        running.kill()
        running.communicate()
    check(top, leaks=True)
    done = product.run("run", "--drive", drive, "--", "sh", "-c", READ)
    assert done.stdout.endswith(b"4\nwhole\n"), done.stdout + done.stderr
    check(top, leaks=True)
