"""Character back ends: where the bytes of a serial port or a console port go and come from.

A device (the front end) is connected to one Chardev. Output is buffered here and leaves on the I/O thread,
many bytes to a system call; a full buffer is told by a short write and output_ready(). Input is read only as
far as the front end has room. Calls into the front end are made on the I/O thread, and never with the
chardev's lock held.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from qemu_user.backends.chardev.console_log import ConsoleLog
from qemu_user.backends.chardev.last_words import LastWords
from qemu_user.backends.io_loop import IoLoop

OUTPUT_LIMIT = 64 * 1024
"""Bytes that wait for the host side before the guest is made to wait."""
LAST_LIMIT = 1024 * 1024
"""The same for output whose source is about to go away: a console's ring before the guest resets it."""
GATHER_SECONDS = 0.001
"""A vCPU's bytes are gathered this long, and those of a console that writes and writes: one system call for many."""


class Frontend(Protocol):
    """What a chardev wants of the device."""

    def input_room(self) -> int:
        """How many bytes receive() would take now."""

    def receive(self, data: bytes) -> None:
        """Input, at most input_room() bytes."""

    def output_ready(self) -> None:
        """After a short write: there is room again."""

    def opened(self) -> None:
        """Somebody is at the other end now."""

    def closed(self) -> None:
        """Nobody will send any more (end of file, hang-up)."""

    def resized(self, rows: int, columns: int) -> None:
        """The terminal at the other end has this size."""


class NoFrontend:
    """Stands in until a device is connected: takes everything, keeps nothing."""

    def input_room(self) -> int:
        return 0

    def receive(self, data: bytes) -> None:
        pass

    def output_ready(self) -> None:
        pass

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass

    def resized(self, rows: int, columns: int) -> None:
        pass


class Chardev:
    """Base of the back ends: the output buffer. As it is, it is the `null` back end: what it gets is gone."""

    is_open = True
    """Whether somebody is at the other end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.frontend: Frontend = NoFrontend()
        self._loop: IoLoop | None = None
        self._lock = threading.Lock()
        self._output = bytearray()
        self._starved = False
        self._scheduled = False
        self.log: ConsoleLog | None = None
        """Gets all output as well; closed with the chardev."""
        self.last_words: LastWords | None = None

    # -- life --------------------------------------------------------------------------------------

    def connect(self, frontend: Frontend) -> None:
        """Join a device to this back end, before start()."""
        self.frontend = frontend

    def start(self, loop: IoLoop) -> None:
        """Open what there is to open and begin to read. BackendError with a sentence for the user."""
        self._loop = loop
        if self.log is not None:
            self.log.start(loop)
        if self._output:
            loop.call_soon(self._flush)

    def close(self) -> None:
        """Give everything back; terminals are put as they were. Idempotent."""
        if self.log is not None:
            self.log.close()

    def drain(self, seconds: float) -> None:
        """At the machine's end, the I/O thread being gone: write out what waits, for at most `seconds`."""
        until = time.monotonic() + seconds
        while self._output and self.connected and time.monotonic() < until:
            before = len(self._output)
            self._flush()
            if len(self._output) == before:
                self._wait_writable(min(0.2, max(0.0, until - time.monotonic())))

    # -- output ------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview, last: bool = False) -> int:
        """Take output; returns how many bytes were taken. `last`: it cannot be offered again. Any thread."""
        with self._lock:
            room = (LAST_LIMIT if last else OUTPUT_LIMIT) - len(self._output)
            taken = min(len(data), max(room, 0))
            self._starved |= taken < len(data)
            if taken:
                self._output += data[:taken]
                self._note(data[:taken])
            if self._scheduled or not taken:
                return taken
            self._scheduled = True
        self._schedule()
        return taken

    def _note(self, data: bytes | bytearray | memoryview) -> None:
        """Output that was taken, for those who only listen. The lock is held."""
        if self.log is not None:
            self.log.write(data)
        if self.last_words is not None:
            self.last_words.write(data)

    def room(self, last: bool = False) -> int:
        """Bytes that write() would take now. Any thread."""
        return max(0, (LAST_LIMIT if last else OUTPUT_LIMIT) - len(self._output)) if self.connected else LAST_LIMIT

    def await_room(self) -> None:
        """write() is called no more until output_ready(). Any thread."""
        with self._lock:
            self._starved = len(self._output) > OUTPUT_LIMIT // 2
            if self._starved:
                return
        self.poke()

    @property
    def connected(self) -> bool:
        """Whether somebody gets the output; if not, it is gone."""
        return self.is_open

    def poke(self) -> None:
        """Call output_ready() soon: for a front end that was restored with output of its own left over."""
        if self._loop is not None:
            self._loop.call_soon(lambda: self.frontend.output_ready())

    @property
    def pending(self) -> int:
        """Bytes of output that wait."""
        return len(self._output)

    def _schedule(self) -> None:
        if self._loop is not None:
            if self._loop.inside and not self._loop.poller.streaming:
                self._loop.call_soon(self._flush)
            else:
                self._loop.call_later(GATHER_SECONDS, self._flush)

    def _flush(self) -> None:
        """I/O thread: hand on what waits; what is not taken waits for _writable()."""
        with self._lock:
            self._scheduled = False
            data = bytes(self._output)
        if data:
            sent = self._emit(data) if self.connected else len(data)
            with self._lock:
                del self._output[:sent]
                again = bool(self._output) and not self._scheduled
                ready = self._starved and len(self._output) <= OUTPUT_LIMIT // 2
                if ready:
                    self._starved = False
                if again:
                    self._scheduled = True
            if again:
                self._await_writable()
            if ready:
                self.frontend.output_ready()

    def _emit(self, data: bytes) -> int:
        """Write what goes without blocking; returns how much went."""
        return len(data)

    def _await_writable(self) -> None:
        """Arrange for _flush() when the host side takes more."""
        if self._loop is not None:
            self._loop.call_later(0.01, self._flush)

    def _wait_writable(self, seconds: float) -> None:
        """Block until the host side takes more, at most `seconds`."""
        time.sleep(seconds)

    # -- input -------------------------------------------------------------------------------------

    def resume_input(self) -> None:
        """The front end has room again. Any thread."""
