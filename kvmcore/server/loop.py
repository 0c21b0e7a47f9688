"""The I/O loop of a process: descriptors, calls from other threads, timers. One epoll, one thread.

Used by the daemon and by VM processes; kvmcore/vm sees it as objects.Loop. A callback that raises is logged and
the loop goes on: one client's fault must not stop the others. Callbacks must not block.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger("kvmcore.loop")

Callback = Callable[[], None]


class EventLoop:
    """run() until stop(). add_reader, remove_reader and call_later belong to the loop's thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callback] = {}
        self._calls: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._order = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._every_turn: list[Callable[[], bool]] = []
        self._running = False

    def add_reader(self, fd: int, callback: Callback) -> None:
        """Call `callback` whenever `fd` is readable or hung up (level triggered). One callback per fd."""
        known = fd in self._readers
        self._readers[fd] = callback
        if not known:
            self._epoll.register(fd, select.EPOLLIN)

    def remove_reader(self, fd: int) -> None:
        """Stop watching `fd`; harmless if it is not watched. Must come before os.close(fd)."""
        if self._readers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def add_every_turn(self, poll: Callable[[], bool]) -> None:
        """Call `poll` in every turn of the loop; True means that it has more to do. For edge-triggered ZeroMQ fds."""
        self._every_turn.append(poll)

    def call_soon_threadsafe(self, callback: Callback) -> None:
        """Run `callback` on the loop's thread soon. Any thread may call it."""
        self._calls.append(callback)
        try:
            os.eventfd_write(self._wake, 1)
        except BlockingIOError:
            pass  # the counter is full: the loop is awake already

    def call_later(self, seconds: float, callback: Callback) -> None:
        """Run `callback` in `seconds`, once."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def stop(self) -> None:
        """Make run() return after this turn. Loop's thread only."""
        self._running = False

    def run(self) -> None:
        """Serve until stop()."""
        self._running = True
        more = False
        while self._running:
            for fd, _ in self._epoll.poll(self._timeout(more), 64):
                if fd == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                reader = self._readers.get(fd)  # an earlier callback of this turn may have removed it
                if reader is not None:
                    self._call(reader)
            while self._calls:
                self._call(self._calls.popleft())
            while self._timers and self._timers[0][0] <= time.monotonic():
                self._call(heapq.heappop(self._timers)[2])
            more = False
            for poll in self._every_turn:
                more = poll() or more

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
        os.close(self._wake)

    def _timeout(self, more: bool) -> float:
        if more or self._calls:
            return 0.0
        if not self._timers:
            return -1.0
        return max(0.0, self._timers[0][0] - time.monotonic())

    @staticmethod
    def _call(callback: Callback) -> None:
        try:
            callback()
        except Exception:
            log.exception("internal error in %r", callback)
