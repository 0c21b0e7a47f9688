"""Character back ends over file descriptors: `-chardev fd`, and the base of stdio, pty, socket and file.

Descriptors that others share (a terminal, a pipe that we inherited) are never made non-blocking, for that
would show in the other processes: they are polled, and written in pieces that a ready pipe must take.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable

from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.io_loop import IoLoop

PIECE = 4096
"""PIPE_BUF: a pipe that polls writable takes so much without blocking."""
_INPUT = 64 * 1024
_BAD = select.POLLERR | select.POLLNVAL


class DescriptorChardev(Chardev):
    """Reads `input_fd`, writes `output_fd` (-1: none). `own`: close them at the end."""

    def __init__(self, name: str, input_fd: int = -1, output_fd: int = -1, own: bool = False) -> None:
        super().__init__(name)
        self._in, self._out_fd, self._own = input_fd, output_fd, own
        self._reading = False
        self._writer_set = False
        self.hung_up: Callable[[], None] = lambda: None
        """Called when nobody reads our output any more."""
        self.is_open = input_fd >= 0 or output_fd >= 0

    def start(self, loop: IoLoop) -> None:
        super().start(loop)
        self.resume_input()

    # -- input -------------------------------------------------------------------------------------

    def resume_input(self) -> None:
        with self._lock:
            if not self._reading and self._in >= 0 and self._loop is not None:
                self._reading = True
                self._loop.add_reader(self._in, self._readable)

    def _pause(self) -> None:
        with self._lock:
            if self._reading and self._loop is not None:
                self._reading = False
                self._loop.remove_reader(self._in)

    def _readable(self) -> None:
        room = self._input_room()
        if not room:
            self._pause()
            if self._input_room():  # it was made meanwhile, when we were not to be resumed yet
                self.resume_input()
            return
        try:
            data = os.read(self._in, min(room, _INPUT))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._received(data)
        else:
            self._end_of_input()

    def _input_room(self) -> int:
        return self.frontend.input_room()

    def _received(self, data: bytes) -> None:
        """Input came; subclasses may look into it first."""
        self.frontend.receive(data)

    def _end_of_input(self) -> None:
        self._pause()
        fd, self._in = self._in, -1
        if self._own and fd != self._out_fd:
            os.close(fd)
        self.is_open = False
        self.frontend.closed()

    @property
    def connected(self) -> bool:
        return self._out_fd >= 0  # output goes on when input has ended

    # -- output ------------------------------------------------------------------------------------

    def _emit(self, data: bytes) -> int:
        if self._out_fd < 0:
            return len(data)
        poll = select.poll()
        poll.register(self._out_fd, select.POLLOUT)
        sent = 0
        while sent < len(data):
            ready = poll.poll(0)
            if not ready:
                break
            if ready[0][1] & _BAD:
                return self._lost_reader(len(data))
            try:
                sent += os.write(self._out_fd, data[sent : sent + PIECE])
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                return self._lost_reader(len(data))
        return sent

    def _lost_reader(self, count: int) -> int:
        """Nobody reads any more: what is written is gone, as with a cable pulled."""
        if self._out_fd >= 0:
            self._stop_writer()
            if self._own and self._out_fd != self._in:
                os.close(self._out_fd)
            self._out_fd = -1
            self.hung_up()
        return count

    def _flush(self) -> None:
        self._stop_writer()
        super()._flush()

    def _await_writable(self) -> None:
        if self._loop is not None and self._out_fd >= 0:
            self._writer_set = True
            self._loop.add_writer(self._out_fd, self._flush)

    def _stop_writer(self) -> None:
        if self._writer_set and self._loop is not None:
            self._writer_set = False
            self._loop.remove_writer(self._out_fd)

    def _wait_writable(self, seconds: float) -> None:
        if self._out_fd >= 0:
            poll = select.poll()
            poll.register(self._out_fd, select.POLLOUT)
            poll.poll(seconds * 1000)

    def close(self) -> None:
        super().close()
        self._pause()
        self._stop_writer()
        for fd in {self._in, self._out_fd}:
            if fd >= 0 and self._own:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._in = self._out_fd = -1
        self.is_open = False
