"""The I/O threads of a machine: one for terminals, timers and small devices, one more for each disk, NIC and shared folder,
so that a slow folder holds up nobody else; and the workers of disks.

Made by machine/machine.py; machine/build.py gives each device its loop. frozen() stops them all between two callbacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protocol.channel.vdso import Vdso
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.polling import Poller
from qemu_user.backends.workers import Workers


class IoThreads:
    """`on_error` as IoLoop's."""

    def __init__(self, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._loops: list[IoLoop] = []
        self._threads: list[threading.Thread] = []
        self._workers: list[Workers] = []
        self._started = False
        self._code: Vdso | None = None
        self.main = self.add("io")

    def add(self, name: str) -> IoLoop:
        """One more thread, called `name`."""
        loop = IoLoop(self._on_error)
        loop.poller = Poller(self._code)
        thread = threading.Thread(target=loop.run, name=name, daemon=True)
        self._loops.append(loop)
        self._threads.append(thread)
        if self._started:
            thread.start()
        return loop

    def workers(self, name: str) -> Workers:
        """Of one more device, called `name`."""
        workers = Workers(name, self._on_error)
        self._workers.append(workers)
        return workers

    def poll_with(self, code: Vdso | None) -> None:
        """Before start(): what they poll with, if it can be had."""
        self._code = code
        for loop in self._loops:
            loop.poller = Poller(code)

    def start(self) -> None:
        """Let them serve."""
        self._started = True
        for thread in self._threads:
            thread.start()

    @contextmanager
    def frozen(self, meanwhile: Callable[[], None] | None = None) -> Iterator[None]:
        """Inside, none of them serves anything, and nothing that they have begun is under way. `meanwhile`: what else has to
        stop; whatever that waits for must not be theirs."""
        leave = threading.Event()
        try:
            waits = [loop.freeze(leave) for loop in self._loops]
            if meanwhile is not None:
                meanwhile()
            for wait in waits:
                wait()
            for workers in self._workers:
                workers.drain()
            yield
        finally:
            leave.set()

    def stop(self) -> None:
        """None of them serves anything any more."""
        for loop in self._loops:
            loop.stop()

    def join(self, seconds: float) -> None:
        """stop(), and wait for each so long."""
        self.stop()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(seconds)
        for workers in self._workers:
            workers.drain(seconds)
            workers.stop()

    def close(self) -> None:
        """After join()."""
        for loop in self._loops:
            loop.close()
