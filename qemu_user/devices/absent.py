"""Guest memory that comes when it is touched: a bitmap of pages that are not there yet, and where they come from.

The bitmap is shared with kvmcore (KVM_MEM_USERFAULT), whose vCPUs leave when they touch such a page; devices come
through GuestMemory.view(). Both end in ensure(). fill() brings the rest in the background. A page is there before its
bit falls, and nothing but ensure() writes to one whose bit is set.
"""

from __future__ import annotations

import os
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

    def left(self) -> tuple[bytes, list[int]]:
        """What another process needs to go on reading when this one has died: bytes, and descriptors, which stay ours."""

    def close(self) -> None:
        """No more will be read."""


class AbsentPages:
    """For one region of RAM. `offsets`: the clusters that are to come; the rest is there. `piece`: bytes that come when one of
    them is touched, a power of two of at least a page; all of the cluster if it is not given."""

    def __init__(
        self, view: memoryview, source: PageSource, offsets: list[int] | None = None, piece: int = 0, fd: int = -1
    ) -> None:
        """Instead of `offsets` the bitmap `fd`, ours from now on, of a process that has died. ValueError: it is another
        memory's."""
        self._view, self._source = view, source
        self._size = len(view)
        self._piece = piece or source.cluster
        self._cluster = memoryview(bytearray(source.cluster if self._piece < source.cluster else 0))
        self._held = -1
        """Which cluster that is."""
        size = -(-(self._size // PAGE // 8) // PAGE) * PAGE
        self.fd = create_memfd("userfault-bitmap", size) if fd < 0 else fd
        if os.fstat(self.fd).st_size != size:
            raise ValueError("a bitmap of other memory than the machine's")
        self.bitmap_size = size
        self._mapping = Mapping([(self.fd, 0, size)])
        self._bits = self._mapping.view
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        """Held by who has touched a page until it is there: what comes by itself waits for him, not he for the next of it."""
        step = source.cluster // PAGE // PAGES_PER_BYTE
        if offsets is None:
            bits = bytes(self._bits)
            offsets = [at // step * source.cluster for at in range(0, len(bits), step) if any(bits[at : at + step])]
        else:
            for offset in offsets:
                start = offset // source.cluster * step
                width = min(step, self._size // PAGE // PAGES_PER_BYTE - start)
                self._bits[start : start + width] = b"\xff" * width
        self._left = sorted(offsets)
        self.fetched = 0
        """How often something has come."""
        self.waits: list[float] = []
        """Seconds that somebody who touched a page waited for it, of the first 100,000."""

    @property
    def piece(self) -> int:
        """Bytes that come when one of them is touched."""
        return self._piece

    @property
    def source(self) -> PageSource:
        """Where they come from."""
        return self._source

    @property
    def comes_whole(self) -> bool:
        """Whether all of it is to come, not only what is touched."""
        return self._piece == self._source.cluster

    def _is_absent(self, page: int) -> bool:
        return bool(self._bits[page // PAGES_PER_BYTE] >> page % PAGES_PER_BYTE & 1)

    def _arrive(self, page: int, count: int) -> None:
        """The bits of so many pages fall; the lock is held. Nobody else writes to them."""
        at = page // PAGES_PER_BYTE
        if count < PAGES_PER_BYTE:
            self._bits[at] &= ~(((1 << count) - 1) << page % PAGES_PER_BYTE)
        else:
            self._bits[at : at + count // PAGES_PER_BYTE] = bytes(count // PAGES_PER_BYTE)

    def ensure(self, offset: int, length: int) -> None:
        """[offset, offset + length) is there when this returns. PageLost."""
        piece = self._piece
        for start in range(offset // piece * piece, offset + max(length, 1), piece):
            if self._is_absent(start // PAGE):
                began = time.monotonic()
                with self._turn:
                    self._fetch(start, piece)
                if len(self.waits) < 100_000:
                    self.waits.append(time.monotonic() - began)

    def _fetch(self, start: int, size: int) -> None:
        """The pieces from `start` on that are not there, of one cluster."""
        with self._lock:
            end = min(start + size, self._size)
            absent = [at for at in range(start, end, self._piece) if self._is_absent(at // PAGE)]
            if not absent:
                return
            first = start // self._source.cluster * self._source.cluster
            try:
                if self._cluster:
                    self._hold(first)
                else:
                    self._source.read(first, self._view[start:end])
            except Exception as error:
                raise PageLost(f"a page of its memory cannot be had: {error}") from error
            for at in absent:
                upto = min(at + self._piece, end)
                if self._cluster:
                    self._view[at:upto] = self._cluster[at - first : upto - first]
                self._arrive(at // PAGE, (upto - at) // PAGE)
            self.fetched += 1

    def _hold(self, first: int) -> None:
        if self._held != first:
            self._held = -1
            self._source.read(first, self._cluster[: min(self._source.cluster, self._size - first)])
            self._held = first

    def fill(self, stop: threading.Event | None = None, pause: float = 0.0) -> bool:
        """Bring everything that is left; False if `stop` came first. PageLost."""
        for start in self._left:
            pages = range(start // PAGE, min(start + self._source.cluster, self._size) // PAGE, self._piece // PAGE)
            if any(map(self._is_absent, pages)):
                if stop is not None and stop.wait(pause):
                    return False
                with self._turn:
                    pass
                self._fetch(start, self._source.cluster)
        return True

    def close(self) -> None:
        """Everything is there, or nobody will touch it any more. The descriptor stays open for kvmcore's sake."""
        self._source.close()
