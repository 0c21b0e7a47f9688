"""A log of what has been written to a range of bytes: one mark per unit (page or block), taken and started afresh.

Guest memory (devices' writes, devices/memory.py) and disks (backends/block/logged.py) keep one each while somebody
copies them. Marks come from any thread, after the write that they tell of.
"""

from __future__ import annotations

import threading


class WriteLog:
    """Marks for `size` bytes in units of `unit` bytes; off until start()."""

    def __init__(self, size: int, unit: int) -> None:
        self.unit = unit
        self.units = -(-size // unit)
        self._marks: bytearray | None = None
        self._lock = threading.Lock()

    @property
    def on(self) -> bool:
        """Whether wrote() is remembered."""
        return self._marks is not None

    def wrote(self, offset: int, length: int) -> None:
        """[offset, offset + length) has been written; what lies beyond the end is ignored."""
        if self._marks is None or length <= 0:
            return
        first, end = offset // self.unit, min((offset + length - 1) // self.unit + 1, self.units)
        with self._lock:
            if self._marks is not None and first < end:
                self._marks[first:end] = b"\1" * (end - first)

    def start(self) -> None:
        """From now on writes are remembered."""
        with self._lock:
            self._marks = bytearray(self.units)

    def take(self) -> bytearray:
        """A byte per unit, 1 where something was written since start() or the last take(); empty when off."""
        with self._lock:
            taken = self._marks
            if taken is None:
                return bytearray()
            self._marks = bytearray(self.units)
            return taken

    def stop(self) -> None:
        """Remember nothing more."""
        with self._lock:
            self._marks = None
