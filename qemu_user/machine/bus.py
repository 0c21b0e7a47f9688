"""The address map at work: which device answers a guest-physical address.

Filled by machine/machine.py before the vCPUs start, then only read: exits/mmio.py asks it on every MMIO exit.
An address with nobody behind it reads as zero, as QEMU's virt has it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple, Protocol

from qemu_user.devices.device import Counters, Device


class Answers(Protocol):
    """Who answers for a window: a Device, or a window of the PCI host."""

    name: str

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...

    def behind(self, offset: int, size: int) -> Device | None: ...


class Window(NamedTuple):
    """[start, end) belongs to `device`."""

    start: int
    end: int
    device: Answers


class Bus:
    """Windows, sorted and disjoint."""

    def __init__(self) -> None:
        self._windows: list[Window] = []
        self._starts: list[int] = []
        self.counters = Counters()

    def add(self, base: int, size: int, device: Answers) -> None:
        """Put a device in place. ValueError if something is there already."""
        window = Window(base, base + size, device)
        for other in self._windows:
            if other.start < window.end and window.start < other.end:
                raise ValueError(f"{device.name} at {base:#x} overlaps {other.device.name}")
        self._windows = sorted([*self._windows, window], key=lambda w: w.start)
        self._starts = [w.start for w in self._windows]

    def find(self, gpa: int, size: int) -> Window | None:
        """The window that holds all `size` bytes at `gpa`."""
        position = bisect_right(self._starts, gpa) - 1
        if position >= 0:
            window = self._windows[position]
            if gpa + size <= window.end:
                return window
        return None

    def device(self, gpa: int, size: int) -> Device | None:
        """Whose state an access there may change."""
        window = self.find(gpa, size)
        return window.device.behind(gpa - window.start, size) if window is not None else None

    def read(self, gpa: int, size: int) -> int:
        """A load's value."""
        position = bisect_right(self._starts, gpa) - 1  # find(), without its call: this is the hottest of the process
        if position >= 0:
            start, end, device = self._windows[position]
            if gpa + size <= end:
                return device.read(gpa - start, size)
        self.counters.count("unassigned_reads")
        return 0

    def write(self, gpa: int, size: int, value: int) -> None:
        """A store."""
        window = self.find(gpa, size)
        if window is None:
            self.counters.count("unassigned_writes")
        else:
            window.device.write(gpa - window.start, size, value)
