"""How fast the host's cycle counter runs, measured against CLOCK_MONOTONIC.

Used by machine.py for the guest's time CSR. The counter must be constant and synchronous over cores, as on
every x86-64 host of the last decade; measured once per process, over at least 20 ms.
"""

from __future__ import annotations

import threading
import time
from typing import ClassVar, Protocol


class _Counter(Protocol):
    def ticks(self) -> int: ...


class HostClock:
    """Pairs of (cycle counter, nanoseconds); the first one is taken when the object is made."""

    _shared: ClassVar[HostClock | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, counter: _Counter) -> None:
        self._ticks = counter.ticks
        self._start = self._sample()
        self._hz: float | None = None

    @classmethod
    def shared(cls, counter: _Counter) -> HostClock:
        """The process's clock; the zygote makes it early, so that a VM need not wait for the measurement."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls(counter)
            return cls._shared

    def _sample(self) -> tuple[int, int]:
        best = None
        for _ in range(5):  # the tightest of five: a preemption in between would be measured too
            before = time.monotonic_ns()
            ticks = self._ticks()
            after = time.monotonic_ns()
            if best is None or after - before < best[0]:
                best = (after - before, ticks, (before + after) // 2)
        assert best is not None
        return best[1], best[2]

    def hz(self) -> float:
        """Ticks per second; waits until 20 ms have passed since the first sample."""
        if self._hz is None:
            remaining = 0.02 - (time.monotonic_ns() - self._start[1]) / 1e9
            if remaining > 0:
                time.sleep(remaining)
            ticks, ns = self._sample()
            self._hz = (ticks - self._start[0]) * 1e9 / (ns - self._start[1])
        return self._hz

    def multiplier(self, frequency: int) -> int:
        """Guest ticks per host tick, times 2**52."""
        return round(frequency * 2**52 / self.hz())
