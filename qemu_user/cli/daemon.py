"""Finding the kvmcore daemon of this user, and starting one when none listens.

The daemon is started as a process of its own by its command line: the two halves share no code but protocol.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

from qemu_user.management.registry import runtime_directory

#: Seconds that a daemon that we started stays when nobody needs it.
IDLE_TIMEOUT = 60


class DaemonError(Exception):
    """No daemon could be reached or started; the message says why."""


def endpoint() -> str:
    """Where this user's daemon listens: SOFTKVM_ENDPOINT, or the runtime directory."""
    return os.environ.get("SOFTKVM_ENDPOINT") or f"ipc://{runtime_directory() / 'kvmcore.sock'}"


def ensure() -> str:
    """The endpoint of a daemon that listens. DaemonError."""
    where = endpoint()
    if not where.startswith("ipc://") or _listens(where):
        return where
    directory = Path(where.removeprefix("ipc://")).parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(directory / ".start", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two commands at once start one daemon
            if not _listens(where):
                _start(where, directory)
    except OSError as error:
        raise DaemonError(f"cannot start kvmcore in {directory}: {error.strerror}") from error
    return where


def _listens(where: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(where.removeprefix("ipc://"))
        except OSError:
            return False
        return True


def _start(where: str, directory: Path) -> None:
    """Start it detached from our terminal; wait for its word."""
    readable, writable = os.pipe()
    log = directory / "kvmcore.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvmcore", "--listen", where, "--idle-timeout", str(IDLE_TIMEOUT),
             "--ready-fd", str(writable)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, pass_fds=[writable],
            cwd="/",
        )  # fmt: skip
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        word = pipe.readline()
    if word.strip() != b"ready":
        process.poll()
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise DaemonError(f"kvmcore did not start: {last} (all of it: {log})")
