"""Finding the kvmcore daemon of this user, and starting one when none listens, or one of another version.

The daemon is started as a process of its own by its command line: the two halves share no code but protocol. One of another
version makes way: it listens no more, and ends with its last VM.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from protocol.channel import fd_passing
from protocol.codec import session
from protocol.codec.session import Message, Op
from protocol.version import fingerprint
from qemu_user.management.registry import runtime_directory
from qemu_user.warm.request import TITLE_ROOM

#: Seconds that a daemon that we started stays when nobody needs it.
IDLE_TIMEOUT = 60
_CALM, _CALM_AT_FIRST = 2.0, 5.0
"""Seconds that whoever is at work needs the cores more than the parent of warm processes does."""
_LOG = "kvmcore.log"
_ANSWER_SECONDS = 10.0
_HELLOS, _HELLO_PAUSE = 3, 0.05


class DaemonError(Exception):
    """No daemon could be reached or started; the message says why."""


def endpoint() -> str:
    """Where this user's daemon listens: SOFTKVM_ENDPOINT, or the runtime directory."""
    return os.environ.get("SOFTKVM_ENDPOINT") or f"ipc://{runtime_directory() / 'kvmcore.sock'}"


def ensure() -> str:
    """The endpoint of a daemon that listens. DaemonError."""
    return begin()()


def begin() -> Callable[[], str]:
    """Start a daemon unless one listens that may stay. What is returned waits for it, and is ensure(): meanwhile there is other
    work to do."""
    where = endpoint()
    if not where.startswith("ipc://"):
        return lambda: where
    directory = Path(where.removeprefix("ipc://")).parent
    early = None
    if not _may_stay(where):
        early = _start(where, directory, fcntl.LOCK_NB)
    if not os.environ.get("SOFTKVM_ENDPOINT"):
        warm_up(where, early)

    def finish() -> str:
        if early is not None:
            _await(early, directory)
        if not _may_stay(where):  # another command was starting one, or it had nothing to do for too long
            late = _start(where, directory)
            if late is not None:
                _await(late, directory)
        return where

    return finish


def hold() -> socket.socket:
    """A connection to a daemon that listens: while it is open it does not end for want of something to do. DaemonError."""
    where = ensure()
    try:
        sock = fd_passing.connect(where.removeprefix("ipc://"))
        sock.send(session.encode(Message(Op.HELLO, 1)))
        return sock
    except OSError as error:
        raise DaemonError(f"kvmcore at {where} does not answer: {error}") from error


def _may_stay(where: str) -> bool:
    """Whether a daemon listens there that can be used: of our version; or the user has named it, and it is his business; or it
    is too busy for more clients."""
    welcome = _hello(where)
    if welcome is None:
        return False
    return bool(welcome.errno) or welcome.body.get("version") == fingerprint() or bool(os.environ.get("SOFTKVM_ENDPOINT"))


def _replace(where: str) -> None:
    """A daemon of another version that listens there, if there is one, makes way. DaemonError: it does not."""
    if _hello(where, retire=True) is not None and _hello(where) is not None:
        raise DaemonError(
            f"kvmcore at {where} is of another version and does not make way; end its VMs (softkvm ps), and it with SIGTERM"
        )


def _hello(where: str, **body: Any) -> Message | None:
    """What a daemon says to a hello; None: nobody listens. Said again if it hangs up: it was about to end, or one of us had
    stood still for so long that it had lost patience."""
    for left in reversed(range(_HELLOS)):
        try:
            with fd_passing.connect(where.removeprefix("ipc://")) as sock:
                sock.settimeout(_ANSWER_SECONDS)
                sock.send(session.encode(Message(Op.HELLO, 1, body=body)))
                if data := sock.recv(session.MAX_MESSAGE):
                    return session.decode(data)
                raise ConnectionResetError("it hangs up")
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except (OSError, ValueError) as error:
            if not left:
                raise DaemonError(f"kvmcore at {where} does not answer: {error}") from error
            time.sleep(_HELLO_PAUSE)
    return None


def warm_up(where: str, starting: _Starting | None) -> None:
    """Have a parent for warm processes beside the daemon, which is at `where` or is just starting: our user may come again. It
    inherits its lock, and a pidfd of the daemon, with which it ends."""
    path = Path(where.removeprefix("ipc://"))
    try:
        with open(path.parent / "warm.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if starting is not None:
                daemon = os.pidfd_open(starting.process.pid)
            else:
                with fd_passing.connect(str(path)) as sock:
                    daemon = fd_passing.peer_pidfd(sock)
            words = [str(lock.fileno()), str(daemon), str(_CALM if starting is None else _CALM_AT_FIRST), "-" * TITLE_ROOM]
            try:
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "qemu_user.warm", *words],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                    pass_fds=[lock.fileno(), daemon], cwd="/",
                )  # fmt: skip
            finally:
                os.close(daemon)
    except OSError:
        pass  # there is one, or there cannot be one: commands are slower, no more


class _Starting(NamedTuple):
    """A daemon that has not said yet that it listens. As long as `lock` is open nobody else starts one."""

    process: subprocess.Popen[bytes]
    word: int
    lock: IO[str]


def _start(where: str, directory: Path, how: int = 0) -> _Starting | None:
    """Start one detached from our terminal, unless one listens that may stay, or with LOCK_NB somebody else starts one (None).
    DaemonError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(directory / ".start", "w")  # closed when the daemon has said its word
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | how)  # two commands at once start one daemon
            if not _may_stay(where):
                _replace(where)
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
