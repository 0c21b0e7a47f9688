"""Finding the kvmcore daemon of this user, and starting one when none listens.

The daemon is started as a process of its own by its command line: the two halves share no code but protocol.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from qemu_user.management.registry import runtime_directory

#: Seconds that a daemon that we started stays when nobody needs it.
IDLE_TIMEOUT = 60
_LOG = "kvmcore.log"


class DaemonError(Exception):
    """No daemon could be reached or started; the message says why."""


def endpoint() -> str:
    """Where this user's daemon listens: SOFTKVM_ENDPOINT, or the runtime directory."""
    return os.environ.get("SOFTKVM_ENDPOINT") or f"ipc://{runtime_directory() / 'kvmcore.sock'}"


def ensure() -> str:
    """The endpoint of a daemon that listens. DaemonError."""
    return begin()()


def begin() -> Callable[[], str]:
    """Start a daemon if none listens; what is returned waits for it, and is ensure(): meanwhile there is other work to do."""
    where = endpoint()
    if not where.startswith("ipc://"):
        return lambda: where
    directory = Path(where.removeprefix("ipc://")).parent
    early = None if _listens(where) else _start(where, directory, fcntl.LOCK_NB)

    def finish() -> str:
        if early is not None:
            _await(early, directory)
        if not _listens(where):  # another command was starting one, or it had nothing to do for too long
            late = _start(where, directory)
            if late is not None:
                _await(late, directory)
        return where

    return finish


def _listens(where: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        try:
            probe.connect(where.removeprefix("ipc://"))
        except OSError:
            return False
        return True


class _Starting(NamedTuple):
    """A daemon that has not said yet that it listens. As long as `lock` is open nobody else starts one."""

    process: subprocess.Popen[bytes]
    word: int
    lock: IO[str]


def _start(where: str, directory: Path, how: int = 0) -> _Starting | None:
    """Start one detached from our terminal, unless one listens (None). LOCK_NB: or somebody else starts one. DaemonError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(directory / ".start", "w")  # closed when the daemon has said its word
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | how)  # two commands at once start one daemon
            if not _listens(where):
                return _Starting(*_launch(where, directory), lock)
        except BlockingIOError:
            pass
        except BaseException:
            lock.close()
            raise
        lock.close()
        return None
    except OSError as error:
        raise DaemonError(f"cannot start kvmcore in {directory}: {error.strerror}") from error


def _launch(where: str, directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The process, and the pipe that it writes "ready" to."""
    readable, writable = os.pipe()
    with open(directory / _LOG, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kvmcore", "--listen", where, "--idle-timeout", str(IDLE_TIMEOUT),
             "--ready-fd", str(writable)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, pass_fds=[writable],
            cwd="/",
        )  # fmt: skip
    os.close(writable)
    return process, readable


def _await(starting: _Starting, directory: Path) -> None:
    """Until it listens. DaemonError."""
    with starting.lock, os.fdopen(starting.word, "rb") as pipe:
        word = pipe.readline()
    if word.strip() != b"ready":
        starting.process.poll()
        log = directory / _LOG
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise DaemonError(f"kvmcore did not start: {last} (all of it: {log})")
