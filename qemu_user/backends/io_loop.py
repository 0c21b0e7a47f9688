"""The I/O thread of a machine: one epoll over queue kicks, terminals, networks and timers.

Made by machine/machine.py, used by back ends and by virtio transports. Callbacks run on the loop's thread,
one at a time, and must not block for long. add/remove/call may be called from any thread. An exception in a
callback is the program's fault: it goes to `on_error`, and the loop goes on.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from protocol.channel.latency import woken_soon
from qemu_user.backends.polling import Poller, Watched

Callback = Callable[[], None]

READ, WRITE = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR, select.EPOLLOUT | select.EPOLLERR
_LOOKS = 8
"""Polls in a row between which file descriptors are not looked at."""


class _Stopped(BaseException):
    """Stopped while frozen: the rest of the turn is not served."""


class IoLoop:
    """run() is the thread's body; stop() ends it."""

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._lock = threading.Lock()
        self._readers: dict[int, Callback] = {}
        self._writers: dict[int, Callback] = {}
        self._always: set[int] = set()  # regular files: epoll refuses them, they are always ready
        self._soon: deque[Callback] = deque()
        self._timers: list[tuple[float, int, list[Callback]]] = []
        self._sequence = itertools.count()
        self._thread_id = 0
        self._sleeping = False
        self._stopping = False
        self.poller = Poller(None)
        """Of queues that this thread serves; set before run()."""
        self._looks = 0

    # -- registration, any thread ------------------------------------------------------------------

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call back while `fd` is readable, hung up or in error."""
        self._change(fd, self._readers, callback)

    def remove_reader(self, fd: int) -> None:
        self._change(fd, self._readers, None)

    def add_writer(self, fd: int, callback: Callback) -> None:
        """Call back while `fd` is writable or in error."""
        self._change(fd, self._writers, callback)

    def remove_writer(self, fd: int) -> None:
        self._change(fd, self._writers, None)

    def remove(self, fd: int) -> None:
        """Forget `fd`, before it is closed."""
        self.remove_reader(fd)
        self.remove_writer(fd)

    def _change(self, fd: int, table: dict[int, Callback], callback: Callback | None) -> None:
        with self._lock:
            before = self._mask(fd)
            if callback is None:
                table.pop(fd, None)
            else:
                table[fd] = callback
            after = self._mask(fd)
            if fd in self._always:
                if not after:
                    self._always.discard(fd)
            elif after != before:
                self._set(fd, before, after)
            wake = fd in self._always
        if wake:
            self._wake()

    def _mask(self, fd: int) -> int:
        return (READ if fd in self._readers else 0) | (WRITE if fd in self._writers else 0)

    def _set(self, fd: int, before: int, after: int) -> None:
        try:
            if not after:
                self._epoll.unregister(fd)
            elif not before:
                self._epoll.register(fd, after)
            else:
                self._epoll.modify(fd, after)
        except PermissionError:
            self._always.add(fd)
        except (FileNotFoundError, OSError):
            if after:
                raise

    # -- calls, any thread -------------------------------------------------------------------------

    @property
    def inside(self) -> bool:
        """Whether the caller is on the loop's thread."""
        return threading.get_ident() == self._thread_id

    def call_soon(self, callback: Callback) -> None:
        """Call back in the next turn."""
        self._soon.append(callback)
        self._wake()

    def watch(self, queue: Watched, address: int, known: int) -> bool:
        """The loop's thread: instead of waiting for a call, look whether the u16 at `address` is still `known`. False: it would
        not pay.
        """
        return self.inside and self.poller.watch(queue, address, known)

    def call_later(self, seconds: float, callback: Callback) -> Callback:
        """Call back in `seconds`; returns what cancels it."""
        cell = [callback]
        with self._lock:
            heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), cell))
            first = self._timers[0][2] is cell
        if first:
            self._wake()
        return cell.clear

    def freeze(self, leave: threading.Event) -> Callable[[], None]:
        """Another thread's: the loop is to stand between two callbacks and serve nothing until `leave` is set. Returns what
        waits until it stands. stop() meanwhile means that it never serves anything again.
        """
        arrived = threading.Event()

        def stand() -> None:
            arrived.set()
            leave.wait()
            if self._stopping:
                raise _Stopped

        def wait() -> None:
            while not arrived.wait(0.1) and not self._stopping:
                pass

        if not self._thread_id or self._stopping:
            return lambda: None
        self.call_soon(stand)
        return wait

    def stop(self) -> None:
        """Make run() return."""
        self._stopping = True
        self._wake(always=True)

    def _wake(self, always: bool = False) -> None:
        self.poller.ring()
        if always or (self._sleeping and not self.inside):
            try:
                os.eventfd_write(self._wake_fd, 1)
            except (OSError, ValueError):
                pass  # closed: nobody is there to wake

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stop()."""
        self._thread_id = threading.get_ident()
        woken_soon()
        with suppress(_Stopped):
            while not self._stopping:
                self.turn(None)

    def turn(self, longest: float | None) -> None:
        """One round: wait at most `longest` seconds for something, and serve it."""
        if not self.poller.watching or not self._look():
            self._serve_events(longest)
        for fd in tuple(self._always):
            for table in (self._readers, self._writers):
                if callback := table.get(fd):
                    self._guarded(callback)
        for _ in range(len(self._soon)):
            self._guarded(self._soon.popleft())
        self._run_timers()

    def _look(self) -> bool:
        """Poll the queues that were served last; whether that will do for this turn."""
        if not self._soon:
            for callback in self.poller.look():
                self._guarded(callback)
        self._looks = 0 if self.poller.drained else (self._looks + 1) % _LOOKS
        return self._looks != 0 and self.poller.watching

    def _serve_events(self, longest: float | None) -> None:
        # from here on others write to the eventfd: what they add is seen below or wakes us
        self._sleeping = True
        try:
            events = self._epoll.poll(self._wait(longest))
        except InterruptedError:
            events = []
        self._sleeping = False
        for fd, mask in events:
            if fd == self._wake_fd:
                os.eventfd_read(fd)
                continue
            if mask & READ and (callback := self._readers.get(fd)):
                self._guarded(callback)
            if mask & WRITE and (callback := self._writers.get(fd)):
                self._guarded(callback)

    def _wait(self, longest: float | None) -> float | None:
        if self._soon or self._stopping or self._always or self.poller.watching:
            return 0
        with self._lock:
            while self._timers and not self._timers[0][2]:
                heapq.heappop(self._timers)
            if not self._timers:
                return longest
            wait = max(0.0, self._timers[0][0] - time.monotonic())
        return wait if longest is None else min(wait, longest)

    def _run_timers(self) -> None:
        now = time.monotonic()
        while True:
            with self._lock:
                if not self._timers or self._timers[0][0] > now:
                    return
                cell = heapq.heappop(self._timers)[2]
            if cell:
                self._guarded(cell[0])

    def _guarded(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as error:
            self._on_error(error)

    def close(self) -> None:
        """After run() has returned."""
        self._epoll.close()
        os.close(self._wake_fd)
        self._wake_fd = -1
