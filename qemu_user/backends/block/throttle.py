"""Limits on requests and bytes per second: token buckets. A request that has to wait holds up a worker of its disk, no vCPU.

Names and meaning of the limits are those of QEMU's throttling.* options: an average; a higher rate (`-max`) for at most
`-max-length` seconds; `iops-size`, the bytes that count as one request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from qemu_user.backends.block.filter import Filter
from qemu_user.backends.block.raw import BlockBackend

KINDS = tuple(f"{what}-{which}" for what in ("iops", "bps") for which in ("total", "read", "write"))
NAMES = (*KINDS, *(f"{kind}{more}" for kind in KINDS for more in ("-max", "-max-length")), "iops-size")
"""The limits there are."""
_SMOOTH = 0.1
"""Seconds' worth that may come at once without a burst being allowed."""


class Bucket:
    """Holds tokens: `rate` come per second, up to `room`. Taking may leave it in debt, which is waited off."""

    def __init__(self, rate: float, room: float, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._room, self._now = rate, room, now
        self._tokens, self._at = room, now()

    def take(self, amount: float) -> float:
        """Seconds to wait before what was taken may be used."""
        now = self._now()
        self._tokens = min(self._room, self._tokens + (now - self._at) * self._rate)
        self._at = now
        self._tokens -= amount
        return max(0.0, -self._tokens / self._rate)


class Throttled(Filter):
    """A disk within limits."""

    def __init__(
        self, image: BlockBackend, limits: dict[str, int], now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        """`limits`: of NAMES."""
        super().__init__(image)
        self._sleep, self._lock = sleep, threading.Lock()
        self._request_size = limits.get("iops-size", 0)
        self._buckets: dict[str, list[Bucket]] = {kind: _buckets(kind, limits, now) for kind in KINDS}

    def _wait(self, which: str, length: int) -> None:
        requests = max(1, -(-length // self._request_size)) if self._request_size else 1
        with self._lock:
            seconds = max(
                (
                    bucket.take(requests if what == "iops" else length)
                    for what in ("iops", "bps")
                    for scope in ("total", which)
                    for bucket in self._buckets[f"{what}-{scope}"]
                ),
                default=0.0,
            )
        if seconds:
            self._sleep(seconds)

    @property
    def waits(self) -> bool:
        return True

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        return False

    def read(self, offset: int, views: list[memoryview]) -> None:
        self._wait("read", sum(map(len, views)))
        self.image.read(offset, views)

    def write(self, offset: int, views: list[memoryview]) -> None:
        self._wait("write", sum(map(len, views)))
        self.image.write(offset, views)

    def punch(self, offset: int, length: int) -> None:
        self._wait("write", length)
        self.image.punch(offset, length)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self._wait("write", length)
        self.image.zero(offset, length, unmap)


def _buckets(kind: str, limits: dict[str, int], now: Callable[[], float]) -> list[Bucket]:
    average, most = limits.get(kind, 0), limits.get(f"{kind}-max", 0)
    if not average:
        return []
    if not most:
        return [Bucket(average, average * _SMOOTH, now)]
    seconds = limits.get(f"{kind}-max-length", 1)
    buckets = [Bucket(average, most * seconds, now)]
    return [*buckets, Bucket(most, most * _SMOOTH, now)] if seconds > 1 else buckets
