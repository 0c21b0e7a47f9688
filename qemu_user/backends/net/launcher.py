"""Starts passt for a device process that may not do so itself (`--only-files`): `python -m qemu_user.backends.net.launcher FD`.

passt shuts itself into namespaces, with mounts of its own, which Landlock forbids to all that a confined process starts. So
a process is made before the device process gives its rights up, which starts passt and nothing else, with no option but
those that PasstNet has: whoever takes the device process over gets no program and no file by it. It ends when its socket
does. Messages are packets: JSON words with two descriptors, passt's socket and stderr; the answer is JSON, with a pidfd.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys

from protocol.channel import fd_passing

_MOST = 65536
_FLAGS = frozenset(("-f", "-q", "-1", "--ipv4-only", "--ipv6-only"))
_VALUED = frozenset(("--runas", "-a", "-n", "-g", "-D", "--dns-forward", "-S", "-t", "-u", "--fd"))
_GRACE_SECONDS = 2.0

launcher: Launcher | None = None
"""Of this process, once begin() was called."""


class Launched:
    """A passt that the launcher has started."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    def reap(self) -> None:
        """End it and wait until it has: politely, then not."""
        for number, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
            if select.select([self._pidfd], [], [], patience)[0]:
                break
        os.close(self._pidfd)


class Launcher:
    """Our end."""

    def __init__(self) -> None:
        """OSError."""
        self._socket, theirs = fd_passing.pair()
        with theirs:
            command, null = [sys.executable, "-P", "-m", __name__, str(theirs.fileno())], subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=null, stdout=null, start_new_session=True
            )

    def start(self, words: list[str], sock: int, stderr: int) -> Launched:
        """passt with these options; `sock` is its 3. OSError."""
        fd_passing.send(self._socket, json.dumps(words).encode(), [sock, stderr])
        data, fds = fd_passing.receive(self._socket, _MOST)
        answer = json.loads(data) if data else {"error": "its launcher has ended"}
        if "error" in answer or len(fds) != 1:
            fd_passing.close_all(fds)
            raise OSError(int(answer.get("errno", 0)), str(answer.get("error")))
        return Launched(fds[0])

    def close(self) -> None:
        """It ends."""
        self._socket.close()
        self._process.wait()


def begin() -> None:
    """From now on this process has passt started by a launcher. OSError."""
    global launcher
    launcher = launcher or Launcher()


def refused(words: list[str]) -> str:
    """The first word that is no option of PasstNet's, or an option without its value; "": it may be started so."""
    left = iter(words)
    for word in left:
        if word in _FLAGS:
            continue
        value = next(left, None)
        if word not in _VALUED or value is None or value.startswith("-"):
            return word
    return ""


def spawn(program: str, words: list[str], sock: int, stderr: int) -> int:
    """The pid of a passt with descriptors 0 to 3 alone. OSError."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        moves = ((null, 0), (null, 1), (stderr, 2), (sock, 3))
        actions = [(os.POSIX_SPAWN_DUP2, fd, to) for fd, to in moves]
        return os.posix_spawn(
            program, [program, *words], os.environ, file_actions=actions, setsid=True, setsigdef=[signal.SIGCHLD]
        )
    finally:
        os.close(null)


def _answer(words: list[str], fds: list[int]) -> tuple[dict[str, object], list[int]]:
    if len(fds) != 2 or (bad := refused(words)):
        return {"error": f"passt is not started with {bad}" if len(fds) == 2 else "two descriptors go with it"}, []
    program = shutil.which("passt")
    if program is None:
        return {"error": "passt is not installed"}, []
    try:
        pid = spawn(program, words, *fds)
        return {"pid": pid}, [os.pidfd_open(pid)]
    except OSError as error:
        return {"error": error.strerror or str(error), "errno": error.errno}, []


def main(number: int) -> int:
    """Serve the device process until it is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children: the kernel forgets them at their end
    with socket.socket(fileno=number) as sock:
        os.set_inheritable(number, False)
        while True:
            data, fds = fd_passing.receive(sock, _MOST)
            if not data:
                return 0
            answer, pidfds = _answer([str(word) for word in json.loads(data)], fds)
            fd_passing.close_all(fds)
            fd_passing.send(sock, json.dumps(answer).encode(), pidfds)
            fd_passing.close_all(pidfds)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
