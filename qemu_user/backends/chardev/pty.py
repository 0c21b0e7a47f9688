"""`-chardev pty`: a pseudo-terminal of its own, for screen, minicom or a test. Its name is told to the user
and to QMP.

While nobody has the other end open, output is dropped (a cable not plugged in), which the kernel shows by a
hang-up on our end.
"""

from __future__ import annotations

import os
import select
import termios
import tty

from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop

_LOOK_SECONDS = 0.25


class PtyChardev(DescriptorChardev):
    """`path` is the other end's name."""

    def __init__(self, name: str) -> None:
        try:
            ours, theirs = os.openpty()
            self.path = os.ttyname(theirs)
            tty.setraw(theirs, termios.TCSANOW)
        except OSError as error:
            raise BackendError(f"chardev {name}: no pseudo-terminal: {error.strerror}") from error
        os.close(theirs)
        os.set_blocking(ours, False)
        super().__init__(name, ours, ours, own=True)
        self.is_open = False

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        self._look()

    def _look(self) -> None:
        """Is somebody there now?"""
        if self._in < 0 or self._loop is None:
            return
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        ready = poll.poll(0)
        there = not (ready and ready[0][1] & select.POLLHUP)
        if there and not self.is_open:
            self.is_open = True
            self.frontend.opened()
            self.resume_input()
        elif not there and self.is_open:
            self._end_of_input()
        self._loop.call_later(_LOOK_SECONDS, self._look)

    @property
    def connected(self) -> bool:
        return self.is_open

    def resume_input(self) -> None:
        if self.is_open:
            super().resume_input()

    def _end_of_input(self) -> None:
        self._pause()
        if self.is_open:
            self.is_open = False
            self.frontend.closed()

    def _lost_reader(self, count: int) -> int:
        return count
