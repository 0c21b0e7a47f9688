"""A disk grows while Debian's kernel runs on it (QMP's block_resize)."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from qemu_user.backends.block.qcow2.create import create_qcow2
from tests.framework import memory_guest
from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]


@pytest.mark.parametrize("kind", ["img", "qcow2"])
def test_the_guest_sees_the_new_size(product: Product, tmp_path: Path, kind: str) -> None:
    disk = tmp_path / f"disk.{kind}"
    if kind == "qcow2":
        create_qcow2(disk, 1 << 20)
    else:
        disk.write_bytes(bytes(1 << 20))
    script = """
        cat /sys/block/vda/size; echo up; read line
        while [ $(cat /sys/block/vda/size) = 2048 ]; do usleep 20000; done
        cat /sys/block/vda/size; echo grown | dd of=/dev/vda bs=512 seek=4000 conv=sync,fsync 2>/dev/null
    """
    running = product.start("run", "--smp", "2", "--drive", f"file={disk},id=data", "--", "sh", "-c", script)
    try:
        assert read_until(running, b"up\n", 120) == b"2048\nup\n"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.connect(str(next(product.runtime.rglob("control.sock"))))
            lines = control.makefile("rwb")
            lines.readline()
            answers = []
            for execute, arguments in (
                ("qmp_capabilities", {}),
                ("block_resize", {"device": "nope", "size": 1 << 21}),
                ("block_resize", {"device": "data", "size": 1000}),
                ("block_resize", {"device": "data", "size": 1 << 21}),
            ):
                lines.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
                lines.flush()
                answers.append(json.loads(lines.readline()))
        assert [next(iter(answer)) for answer in answers] == ["return", "error", "error", "return"]
        out, errors = running.communicate(b"\n", timeout=60)
        assert out == b"4096\n", errors
        assert memory_guest.content(disk)[4000 * 512 :].startswith(b"grown\n")
    finally:
        running.kill()
        running.communicate()
