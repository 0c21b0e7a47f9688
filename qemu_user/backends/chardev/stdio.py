"""`-chardev stdio`: our own terminal or pipes. A terminal is made raw for the VM's life and put back in any
case.

Keys go to the guest, Ctrl-C and Ctrl-Z too; the way out is escape.py's. With pipes there is nothing to set
and no escape.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import termios
from collections.abc import Callable
from typing import Any

from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.chardev.escape import EscapeFilter
from qemu_user.backends.io_loop import IoLoop

IFLAG, OFLAG, CFLAG, LFLAG, _, _, CC = range(7)


class StdioChardev(DescriptorChardev):
    """Descriptors 0 and 1. `quit` is called on the I/O thread when the user asks to leave."""

    def __init__(self, name: str, escape: bool = True) -> None:
        super().__init__(name, 0, 1)
        self._before: list[Any] | None = None
        self._filter = EscapeFilter() if escape and os.isatty(0) else None
        self.quit: Callable[[], None] = lambda: None

    def start(self, loop: IoLoop) -> None:
        if os.isatty(0):
            self._make_raw()
        super().start(loop)
        self.refresh_size()

    def _make_raw(self) -> None:
        self._before = termios.tcgetattr(0)
        atexit.register(self._restore)
        raw = termios.tcgetattr(0)
        raw[IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        raw[OFLAG] |= termios.OPOST  # guests that end lines with LF alone stay readable
        raw[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
        raw[CC][termios.VMIN], raw[CC][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSANOW, raw)

    def _restore(self) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        # From the background this would stop us: the terminal is somebody else's now, who has set it.
        with contextlib.suppress(ValueError):  # not on the main thread
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, before)

    def refresh_size(self) -> None:
        """Tell the guest the terminal's size: at the start, and when SIGWINCH came."""
        if os.isatty(1):
            size = os.get_terminal_size(1)
            self.frontend.resized(size.lines, size.columns)

    def _received(self, data: bytes) -> None:
        command = ""
        if self._filter is not None:
            data, command = self._filter.feed(data)
        if data:
            self.frontend.receive(data)
        if command == "quit":
            self.quit()
        elif command == "help" and self._filter is not None:
            self.write(self._filter.help.encode())

    def close(self) -> None:
        super().close()
        self._restore()
        atexit.unregister(self._restore)
