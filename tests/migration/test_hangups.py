"""Somebody hangs up before he has heard all that is said to him, or stands still for a while: who calls tries again, or tells
the user why it does not work.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from protocol.client import Kvm
from qemu_user.machine.machine import Machine
from qemu_user.management.commands import migrate
from qemu_user.migration.channel import Channel
from qemu_user.migration.job import JobError
from tests.framework.full_stack import Daemon
from tests.migration.hosts import HostUnderTest


class Impostor:
    """Listens where a daemon should, and hangs up on the first `calls` who come."""

    def __init__(self, path: Path, calls: int, then: Callable[[], None]) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen(8)
        self.heard = 0
        self._thread = threading.Thread(target=self._run, args=(calls, then), daemon=True)
        self._thread.start()

    def _run(self, calls: int, then: Callable[[], None]) -> None:
        with self._socket, suppress(OSError):
            while self.heard < calls:
                connection, _ = self._socket.accept()
                with connection:
                    connection.recv(65536)
                    self.heard += 1
                    if self.heard == calls:
                        then()

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)


def test_a_daemon_hangs_up_once(tmp_path: Path, hosts: tuple[HostUnderTest, HostUnderTest]) -> None:
    """As one that was about to end: the command starts another one."""
    path = hosts[0].runtime / "softkvm" / "kvmcore.sock"
    impostor = Impostor(path, 1, path.unlink)
    code = "from qemu_user.cli.daemon import ensure; print(ensure())"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, env=hosts[0].environment, capture_output=True, text=True, timeout=300, check=False)
    impostor.close()
    assert (done.returncode, done.stdout.strip(), impostor.heard) == (0, f"ipc://{path}", 1), done.stderr


def test_kvmcore_hangs_up_once(tmp_path: Path) -> None:
    with Daemon() as daemon:
        there = Path(daemon.endpoint.removeprefix("ipc://"))
        path = there.with_name("other.sock")
        impostor = Impostor(path, 1, lambda: there.rename(path))
        with closing(Kvm.open(f"ipc://{path}", name="again")) as kvm:
            assert kvm.api_version() == 12
        impostor.close()
        path.rename(there)


def test_the_source_hears_why(tmp_path: Path, hosts: tuple[HostUnderTest, HostUnderTest]) -> None:
    """The destination gives up before it has heard the whole announcement."""
    one, two = hosts
    uri = two.serve()
    impostor = Impostor(two.runtime / "softkvm" / "kvmcore.sock", 1000, lambda: None)
    one.boot("vm")
    done = one.softkvm("migrate", "vm", uri)
    impostor.close()
    assert done.returncode == 1
    assert b"the destination refuses it: kvmcore at" in done.stderr, done.stderr.decode()
    assert one.status("vm") == "running"


def test_nobody_is_called_before_memory_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a VM that was restored just now: who answered its call would wait for the announcement in vain."""
    order = []

    def complete_memory(stop: threading.Event) -> bool:
        order.append("memory")
        return len(order) > 1

    def connect(uri: str, key: object) -> Channel:
        order.append(uri)
        raise JobError("nobody there")

    monkeypatch.setattr(migrate, "connect", connect)
    machine = cast(Machine, SimpleNamespace(config=SimpleNamespace(name="vm"), job=None, complete_memory=complete_memory))
    for status in ("cancelled", "failed"):
        migrate.run(machine, migrate.MigrateArguments(uri="ipc:///x"))
        assert machine.job.finished.wait(60)
        assert machine.job.status == status
    assert order == ["memory", "memory", "ipc:///x"]
