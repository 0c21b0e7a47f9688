"""Starting a VM in the background, as a process of its own (arrival.py), and hearing how that went.

The process is started first and told what to become later, so that a host can have one waiting with its imports done.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from qemu_user.management.registry import made_runtime_directory
from qemu_user.warm.process import WarmProcess, start
from qemu_user.warm.request import ARRIVAL


class SpawnError(Exception):
    """The VM did not start; the text says why."""


class Newcomer:
    """A process that waits for its order. `name`: of its log file; if that is another one's yet, `replaces`: from the time on
    that all is well."""

    def __init__(self, name: str, replaces: bool = False) -> None:
        """OSError."""
        self._name = name
        self._log = made_runtime_directory() / f"{name}.log"
        self.log = self._log.with_name(f".{name}.log") if replaces else self._log
        readable, writable = os.pipe()
        self._pipe = os.fdopen(readable, "rb")
        self._socket, theirs = socket.socketpair()
        with open(self.log, "wb") as output, theirs:
            try:
                self.process = _start(theirs.fileno(), output.fileno(), writable)
            finally:
                os.close(writable)

    def order(self, order: bytes, fds: list[int] | None = None) -> bool:
        """Tell it what to become (JSON), with the descriptors that it needs for that. False: it has ended; its log says why."""
        with self._socket:
            try:
                done = socket.send_fds(self._socket, [order], fds or [])
                self._socket.sendall(order[done:])
                return True
            except (BrokenPipeError, ConnectionResetError):
                return False

    def hear(self, count: int = 1) -> dict[str, Any]:
        """What the last of its `count` VMs says: name and pid, or where it listens. SpawnError."""
        with self._pipe as pipe:
            lines = [pipe.readline() for _ in range(count)]
        failed = [word["error"] for word in map(json.loads, filter(None, lines)) if "error" in word]
        if failed:
            raise SpawnError("; ".join(sorted(set(failed))))
        if not all(lines):
            self.process.wait()
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            raise SpawnError(f"VM {self._name}: its process ended at once: {last} (all of it: {self.log})")
        if self.log != self._log:
            self.log = self.log.rename(self._log)
        return dict(json.loads(lines[-1]))

    def forget(self) -> None:
        """It speaks to whoever it was given to; or, without an order, it ends."""
        self._pipe.close()
        self._socket.close()


def _start(stdin: int, output: int, tell: int) -> WarmProcess | subprocess.Popen[bytes]:
    """A process that waits for its order on `stdin`. OSError."""
    arguments = ["--tell", str(tell)]
    warm = start(ARRIVAL, arguments, {0: stdin, 1: output, 2: output, tell: tell}, "/")
    return warm or subprocess.Popen(
        [sys.executable, "-P", "-m", "qemu_user.migration.arrival", *arguments],
        stdin=stdin, stdout=output, stderr=output, start_new_session=True, pass_fds=[tell], cwd="/",
    )  # fmt: skip


def spawn(order: bytes, name: str, count: int = 1, replaces: bool = False) -> dict[str, Any]:
    """A process with this order, and what the last of its `count` VMs says. `replaces`: Newcomer's. SpawnError."""
    newcomer = Newcomer(name, replaces)
    newcomer.order(order)
    return newcomer.hear(count)
