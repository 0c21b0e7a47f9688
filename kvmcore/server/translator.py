"""The translator as a process of its own: started with the first VM that can use it, started again if it dies.

VMs do not notice but for speed: they look for its socket every now and then. `TranslatorProcess` is the daemon's hold
on it, `main` what runs in it (kvmcore/engine/translator.py). The daemon itself never imports LLVM.
"""

from __future__ import annotations

import logging
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

from kvmcore.server import process
from kvmcore.server.loop import EventLoop
from kvmcore.server.runtime_dir import PrivateDirectory

log = logging.getLogger("kvmcore.daemon")

#: Seconds between two starts, doubled with each that did not last; at most the second.
_PAUSE, _LONGEST = 1.0, 60.0
_LASTED = 30.0
#: Of the memory that the translator tells in how much is waiting.
WAITING_BYTES = 8


class TranslatorProcess:
    """At most one process. `path` is where VM processes find it."""

    def __init__(self, private: PrivateDirectory, loop: EventLoop) -> None:
        self._private, self._loop = private, loop
        self.path = private.name("t")
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._waiting_fd = os.memfd_create("softkvm-waiting", os.MFD_CLOEXEC)
        os.ftruncate(self._waiting_fd, WAITING_BYTES)
        self._waiting = mmap.mmap(self._waiting_fd, WAITING_BYTES, prot=mmap.PROT_READ)
        self._pause = _PAUSE
        self._started = 0.0

    @property
    def pid(self) -> int:
        """0 if none runs."""
        return self._process.pid if self._process is not None else 0

    @property
    def waiting(self) -> int:
        """Regions that somebody has asked for or wished for, and that are not translated yet."""
        return int.from_bytes(self._waiting, "little") if self._process is not None else 0

    def start(self) -> None:
        """Unless it runs already, or has died a moment ago."""
        if self._process is not None or time.monotonic() < self._started + self._pause:
            return
        self._started = time.monotonic()
        os.set_inheritable(self._private.fd, True)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvmcore.server.translator", self.path, str(self._waiting_fd), str(os.getpid())],
                pass_fds=[self._private.fd, self._waiting_fd],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).parents[2],
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            log.warning("no translator: %s", error)
            return
        self._loop.add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        status = self._process.wait()
        self._process = None
        lasted = time.monotonic() - self._started > _LASTED
        self._pause = _PAUSE if lasted else min(2 * self._pause, _LONGEST)
        log.warning("the translator has ended with status %d; VMs go on with the interpreter until it is back", status)
        wait = max(0.0, self._started + self._pause - time.monotonic())
        self._loop.call_later(wait, self.start)


def main() -> int:
    """`python -m kvmcore.server.translator SOCKET FD PARENT`: be the translator of the daemon with process id PARENT, which
    looks into the memfd FD for how much is waiting. `--idle FD PARENT`: be the translator's process for idle time.
    """
    idle = sys.argv[1:2] == ["--idle"]
    path, number, parent = sys.argv[1:]
    process.die_with_parent(int(parent))
    process.ignore_terminal_signals()
    process.set_title("kvmcore-translator idle" if idle else "kvmcore-translator")
    logging.basicConfig(format="%(name)s: %(message)s")
    if idle:
        from kvmcore.engine.idle_translator import work

        work(int(number))
        return 0
    from kvmcore.engine.translator import Translator

    Translator(path, mmap.mmap(int(number), WAITING_BYTES)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
