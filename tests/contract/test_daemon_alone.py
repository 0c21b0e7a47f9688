"""A daemon that has neither clients nor VMs."""

from __future__ import annotations

import os
import random
import select
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from kvmcore.engine.translation import Later, Wishes, encode_wishes, in_memory, receive, send
from protocol.channel import fd_passing
from protocol.client import Kvm
from tests.framework.full_stack import Daemon

_LEFT = 1000
"""Regions of 250 instructions: minutes of work."""


def leave_work(folder: Path) -> None:
    """The wishes of a VM that has ended: code that nobody has translated before."""
    (path,) = folder.glob("kv-*/t-*")
    for _ in range(_LEFT // 10):
        addi = (random.randrange(1 << 12) << 20 | 0x00050513 for _ in range(250))  # a0, a0, N
        code = b"".join(instruction.to_bytes(4, "little") for instruction in addi)
        page = (code + bytes.fromhex("67800000")).ljust(4096, b"\0")  # ret
        sock = fd_passing.connect(str(path))
        select.select([sock], [], [], 30)
        for received in receive(sock)[1]:  # its greeting: it knows us
            os.close(received)
        fd = in_memory("wishes", encode_wishes(Wishes([(0, 0, page)], [(0, 4 * number) for number in range(10)])))
        send(sock, Later(), [fd])
        os.close(fd)
        sock.close()


def test_work_for_later_keeps_it_only_while_it_can_be_reached() -> None:
    """It stays to translate what is left, and ends at once when its socket is gone: nobody would ever find it again."""
    with Daemon("--idle-timeout", "1") as daemon:
        socket = Path(daemon.endpoint.removeprefix("ipc://"))
        kvm = Kvm.open(daemon.endpoint)
        vm = kvm.create_vm()
        end = time.monotonic() + 240
        while not list(socket.parent.glob("kv-*/t-*")):  # the translator starts after the VM
            assert time.monotonic() < end
            time.sleep(0.05)
        leave_work(socket.parent)
        family = psutil.Process(daemon.process.pid)
        while not any("idle" in " ".join(child.cmdline()) for child in family.children(recursive=True)):
            assert time.monotonic() < end  # until the translator has begun with it
            time.sleep(0.05)
        vm.close()
        kvm.close()
        with pytest.raises(subprocess.TimeoutExpired):
            daemon.process.wait(4)
        socket.unlink()
        daemon.process.wait(120)
