"""Threads that wait for disks and networks, so that an I/O thread need not: requests of a disk overlap.

Of one device; started when they are first needed. Made by io_threads.py, which also sees to it that they have nothing in
hand while the machine stands.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

MOST = 16
"""Threads of one device: so many of its requests are on their way at once."""
Job = Callable[[], None]


class Workers:
    """`on_error`: what becomes of an exception of a job, which is the program's fault."""

    def __init__(self, name: str, on_error: Callable[[BaseException], None], most: int = MOST) -> None:
        self._name, self._on_error, self._most = name, on_error, most
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._unfinished = self._threads = 0

    def submit(self, job: Job) -> None:
        """Have `job` done; after stop() it is done here. Any thread."""
        if not self._most:
            job()
            return
        with self._idle:
            self._unfinished += 1
            more = self._threads < min(self._unfinished, self._most)
            self._threads += more
        self._jobs.put(job)
        if more:
            threading.Thread(target=self._work, name=f"{self._name}-worker", daemon=True).start()

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all jobs are done, at most so long; whether they are."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, seconds)

    def stop(self) -> None:
        """The threads end when they have done what there is to do."""
        with self._idle:
            for _ in range(self._threads):
                self._jobs.put(None)
            self._threads = self._most = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:
                self._on_error(error)
            finally:
                with self._idle:
                    self._unfinished -= 1
                    self._idle.notify_all()
