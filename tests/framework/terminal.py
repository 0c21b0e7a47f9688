"""A terminal with a program in it: a real pty, so that raw mode, window sizes, signals and job control are real."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType


def _log_in() -> None:
    """As a login does: the terminal is ours, and its keys are signals, whatever those who started the tests ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
        signal.signal(number, signal.SIG_DFL)


class Terminal:
    """`command` on a pty of 24 by 80, as its foreground process group. A context manager; its end kills the program."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            command, stdin=self._slave, stdout=self._slave, stderr=self._slave, env=environment,
            start_new_session=True, preexec_fn=_log_in,
        )  # fmt: skip
        self.seen = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def restored(self) -> bool:
        """Whether the terminal's modes are what they were before the program ran."""
        return termios.tcgetattr(self._slave) == self.before

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def expect(self, text: bytes, seconds: float = 60) -> bytes:
        """Wait until the program has written `text` since the last call; everything up to its end."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"no {text!r} within {seconds} s in {self.seen.decode(errors='replace')}"
            if select.select([self._master], [], [], left)[0]:
                self.seen += os.read(self._master, 65536)
        found, self.seen = self.seen[: self.seen.index(text) + len(text)], self.seen[self.seen.index(text) + len(text) :]
        return found
