"""A command that has a warm process do what it was started for, and is that process to whoever started it: its signals, its
exit status, its end, its place in the terminal's job control.

The process has our environment, directory, descriptors; it is in a session of its own, so that what comes by process group or
terminal comes here and is passed on. When we are killed, so is it (request.DIES). Imports nothing that takes time.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from types import FrameType

from qemu_user.warm import circumstances
from qemu_user.warm.asking import Asked, ask
from qemu_user.warm.request import MOST_FDS, SOFTKVM, Request

_PASSED_ON = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH,
)  # fmt: skip
_LOST = 125
_PIECE = 65536


def stand_in(arguments: list[str], command: bool) -> int | None:
    """`softkvm ARGUMENTS` done by a warm process; its exit status, or None: nobody has done it. Does not return if a signal
    ended it. `command`: it reads stdin as it comes, so that a terminal's job control has to see us read it.
    """
    try:
        fds = _descriptors()
        if fds is None:
            return None
        return _Front(arguments, fds, command and os.isatty(0)).run()
    except OSError:
        return None


def _descriptors() -> list[int] | None:
    """Those that a program that we exec would have; None if that is not 0, 1, 2 and some more."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # the listing's own
    return sorted(found) if {0, 1, 2} <= set(found) and len(found) <= MOST_FDS else None


class _Front:
    def __init__(self, arguments: list[str], numbers: list[int], relay: bool) -> None:
        self._arguments, self._numbers, self._relay = arguments, numbers, relay
        self._asked: Asked | None = None
        self._waiting: list[int] = []
        self._feed = -1

    def run(self) -> int | None:
        ignored = circumstances.ignored(os.getpid())
        before = {}
        for passed in (*_PASSED_ON, signal.SIGTSTP):
            if not ignored >> (passed - 1) & 1:
                before[passed] = signal.signal(passed, self._stopped if passed == signal.SIGTSTP else self._received)
        if not self._ask():
            for passed, handler in before.items():
                signal.signal(passed, handler)
            for early in self._waiting:
                os.kill(os.getpid(), early)
            return None
        assert self._asked is not None
        for early in self._waiting:
            self._send(early)
        if self._relay:
            self._feed_it()
        end = self._asked.end()
        if end is None:
            sys.stderr.write("softkvm: the process that all others are forked from was killed: the exit status is not known\n")
            return _LOST
        kind, number = end
        if kind == "signal":
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return number

    def _ask(self) -> bool:
        umask = os.umask(0)
        os.umask(umask)
        words = [os.fsencode(word) for word in self._arguments]
        request = Request(SOFTKVM.encode(), words, dict(os.environb), umask, True, self._numbers)
        directory = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        pipe, self._life = os.pipe()  # nobody writes to it; it is closed when we end
        fds, end = list(self._numbers), -1
        if self._relay:
            end, self._feed = os.pipe()
            fds[fds.index(0)] = end
        self._asked = ask(request, [directory, pipe, *fds])
        for fd in (directory, pipe, end):
            if fd >= 0:
                os.close(fd)
        return self._asked is not None

    def _feed_it(self) -> None:
        """Pass stdin on until one of both has ended. A terminal that is not ours at the moment stops us, as it should."""
        assert self._asked is not None
        poll = select.poll()
        poll.register(self._asked.fileno(), select.POLLIN)
        poll.register(0, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._asked.fileno() in ready:
                return
            try:
                data = left = os.read(0, _PIECE)
                while left:
                    left = left[os.write(self._feed, left) :]
            except OSError:  # the terminal, or the process, is gone
                data = b""
            if not data:
                poll.unregister(0)
                os.close(self._feed)
                self._feed = -1

    def _send(self, number: int) -> None:
        assert self._asked is not None
        try:
            signal.pidfd_send_signal(self._asked.pidfd, number)
        except ProcessLookupError:
            pass  # we shall hear of its end

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._waiting.append(number)
        else:
            self._send(number)

    def _stopped(self, number: int, frame: FrameType | None) -> None:
        """SIGTSTP: both stop, if we do (who has nobody that could continue it does not), and go on together."""
        if self._asked is not None:
            self._send(signal.SIGSTOP)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._stopped)
        if self._asked is not None:
            self._send(signal.SIGCONT)

