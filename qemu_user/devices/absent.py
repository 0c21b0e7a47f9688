"""Guest memory that comes when it is touched: a bitmap of pages that are not there yet, and where they come from.

The bitmap is shared with kvmcore (KVM_MEM_USERFAULT), whose vCPUs leave when they touch such a page; devices come
through GuestMemory.view(). Both end in ensure(). fill() brings the rest in the background. A page is there before its
bit falls, and nothing but ensure() writes to one whose bit is set.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

from protocol.channel.shared_memory import PAGE, Mapping, create_memfd

PAGES_PER_BYTE = 8


class PageLost(Exception):
    """A page that was to come cannot be had: the VM cannot go on."""


class PageSource(Protocol):
    """Where the content is. `cluster`: bytes that come at once, a multiple of 8 pages."""

    cluster: int

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`, the cluster of memory at `offset`. Any exception: it cannot."""

    def close(self) -> None:
        """No more will be read."""


class AbsentPages:
    """For one region of RAM. `offsets`: the clusters that are to come; the rest is there."""

    def __init__(self, view: memoryview, source: PageSource, offsets: list[int]) -> None:
        self._view, self._source = view, source
        self._size = len(view)
        self._step = source.cluster // PAGE // PAGES_PER_BYTE
        """Bytes of the bitmap that a cluster has."""
        size = -(-(self._size // PAGE // 8) // PAGE) * PAGE
        self.fd = create_memfd("userfault-bitmap", size)
        self.bitmap_size = size
        self._mapping = Mapping([(self.fd, 0, size)])
        self._bits = self._mapping.view
        self._left = sorted(offsets)
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        """Held by who has touched a page until it is there: what comes by itself waits for him, not he for the next of it."""
        for offset in self._left:
            start = self._byte(offset)
            self._bits[start : start + self._width(offset)] = b"\xff" * self._width(offset)
        self.fetched = 0
        self.waits: list[float] = []
        """Seconds that somebody who touched a page waited for it, of the first 100,000."""

    def _byte(self, offset: int) -> int:
        return offset // self._source.cluster * self._step

    def _width(self, offset: int) -> int:
        return min(self._step, self._size // PAGE // 8 - self._byte(offset))

    def ensure(self, offset: int, length: int) -> None:
        """[offset, offset + length) is there when this returns. PageLost."""
        cluster = self._source.cluster
        for start in range(offset // cluster * cluster, offset + max(length, 1), cluster):
            if self._bits[self._byte(start)]:
                began = time.monotonic()
                with self._turn:
                    self._fetch(start)
                if len(self.waits) < 100_000:
                    self.waits.append(time.monotonic() - began)

    def _fetch(self, start: int) -> None:
        with self._lock:
            at, width = self._byte(start), self._width(start)
            if self._bits[at]:
                try:
                    self._source.read(start, self._view[start : min(start + self._source.cluster, self._size)])
                except Exception as error:
                    raise PageLost(f"a page of its memory cannot be had: {error}") from error
                self._bits[at : at + width] = bytes(width)
                self.fetched += 1

    def fill(self, stop: threading.Event | None = None, pause: float = 0.0) -> bool:
        """Bring everything that is left; False if `stop` came first. PageLost."""
        for start in self._left:
            if self._bits[self._byte(start)]:
                if stop is not None and stop.wait(pause):
                    return False
                with self._turn:
                    pass
                self._fetch(start)
        return True

    def close(self) -> None:
        """Everything is there, or nobody will touch it any more. The descriptor stays open for kvmcore's sake."""
        self._source.close()
