"""Guest memory as devices see it: the mapped guest_memfd, by guest-physical address.

Made by machine/machine.py, given to whatever does DMA. Every address comes from the guest and is checked
here; OutOfRange is for the device to turn into the answer that its specification gives. What devices write is
logged here while somebody migrates: kvmcore's dirty log knows only of vCPUs.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable

PAGE = 4096


class OutOfRange(Exception):
    """A guest-physical range that does not lie wholly in one region of guest RAM."""

    def __init__(self, gpa: int, length: int) -> None:
        super().__init__(f"guest address {gpa:#x}, {length:#x} bytes: not in RAM")


class GuestMemory:
    """Regions of RAM: (first guest-physical address, its bytes as a writable memoryview or mmap)."""

    def __init__(self, regions: Iterable[tuple[int, memoryview]]) -> None:
        self._regions = sorted(
            ((gpa, gpa + len(view), view.cast("B")) for gpa, view in regions), key=lambda r: r[0]
        )
        self._starts = [start for start, _, _ in self._regions]
        self._logs: list[bytearray] | None = None
        """While logging: for each region a byte per page, not zero where a device has written."""
        self._log_lock = threading.Lock()

    def view(self, gpa: int, length: int) -> memoryview:
        """The bytes themselves (no copy). OutOfRange."""
        position = bisect_right(self._starts, gpa) - 1
        if position >= 0 and length >= 0:
            start, end, view = self._regions[position]
            if gpa + length <= end:
                return view[gpa - start : gpa - start + length]
        raise OutOfRange(gpa, length)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of guest memory. OutOfRange."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `gpa`. OutOfRange."""
        self.view(gpa, len(data))[:] = data
        self.wrote(gpa, len(data))

    # -- the log of what devices write -------------------------------------------------------------

    def wrote(self, gpa: int, length: int) -> None:
        """A device has written [gpa, gpa + length), through a view. To be called after the write."""
        if self._logs is None or length <= 0:
            return
        with self._log_lock:
            position = bisect_right(self._starts, gpa) - 1
            if self._logs is not None and position >= 0:
                first = (gpa - self._starts[position]) // PAGE
                last = (gpa + length - 1 - self._starts[position]) // PAGE
                log = self._logs[position]
                log[first : last + 1] = b"\1" * (min(last + 1, len(log)) - first)

    @property
    def logging(self) -> bool:
        """Whether wrote() is remembered."""
        return self._logs is not None

    def start_log(self) -> None:
        """From now on wrote() is remembered."""
        with self._log_lock:
            self._logs = [bytearray((end - start) // PAGE) for start, end, _ in self._regions]

    def take_log(self) -> list[bytearray]:
        """A byte per page and region of what was written since the last call; the log starts afresh."""
        with self._log_lock:
            taken = self._logs
            if taken is None:
                return []
            self._logs = [bytearray(len(log)) for log in taken]
            return taken

    def stop_log(self) -> None:
        """Remember nothing more."""
        with self._log_lock:
            self._logs = None

    @property
    def regions(self) -> list[tuple[int, memoryview]]:
        """(first guest-physical address, its bytes), in order."""
        return [(start, view) for start, _, view in self._regions]

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(end - start for start, end, _ in self._regions)

    def release(self) -> None:
        """Let go of the mappings (the views handed out must be gone)."""
        for _, _, view in self._regions:
            view.release()
        self._regions, self._starts = [], []
