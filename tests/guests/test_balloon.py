"""The memory balloon under Debian's kernel: memory really goes back to the host."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]
MIB = 1 << 20


def _guest_memory(product: Product) -> int:
    """Bytes that the host has given the one VM's guest_memfd."""
    found = 0
    for process in product.processes():
        folder = f"/proc/{process.pid}/fd"
        for fd in os.listdir(folder):
            try:
                status = os.stat(f"{folder}/{fd}")
                if status.st_size == 256 * MIB and os.readlink(f"{folder}/{fd}").startswith("/memfd:"):
                    found = max(found, status.st_blocks * 512)
            except OSError:
                continue
    return found


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_free_memory_goes_back_and_the_target_is_followed(product: Product) -> None:
    script = """
        dd if=/dev/zero bs=1M count=100 2>/dev/null | tr '\\0' x >/tmp/big; echo filled; read line
        rm /tmp/big; echo removed; read line; grep MemTotal /proc/meminfo
        while read line; do grep MemFree /proc/meminfo; echo end; done
    """
    running = product.start("run", "-m", "256M", "--name", "b", "--balloon", "--", "sh", "-c", script)
    assert running.stdin is not None

    def go_on() -> None:
        assert running.stdin is not None
        running.stdin.write(b"\n")
        running.stdin.flush()

    try:
        read_until(running, b"filled\n", 120)
        filled = _guest_memory(product)
        assert filled > 100 * MIB
        go_on()
        read_until(running, b"removed\n", 120)
        _until(lambda: _guest_memory(product) < filled - 40 * MIB)  # whole blocks of 2 MiB only
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.connect(str(next(product.runtime.rglob("control.sock"))))
            lines = control.makefile("rwb")
            lines.readline()

            def command(execute: str, **arguments: Any) -> Any:
                lines.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
                lines.flush()
                while True:
                    answer = json.loads(lines.readline())
                    if "event" not in answer:
                        return answer.get("return", answer)

            command("qmp_capabilities")
            assert command("query-balloon") == {"actual": 256 * MIB}
            command("balloon", value=160 * MIB)
            _until(lambda: command("query-balloon")["actual"] == 160 * MIB)
            command("balloon", value=1 << 40)
            _until(lambda: command("query-balloon")["actual"] == 256 * MIB)
            assert "error" in command("balloon", value=0)
    finally:
        running.kill()
        running.communicate()
