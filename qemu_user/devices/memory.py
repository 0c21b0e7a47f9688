"""Guest memory as devices see it: the mapped guest_memfd, by guest-physical address.

Made by machine/machine.py, given to whatever does DMA. Every address comes from the guest and is checked
here; OutOfRange is for the device to turn into the answer that its specification gives. What devices write is
logged here while somebody migrates: kvmcore's dirty log knows only of vCPUs.
"""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Iterable

from qemu_user.devices.absent import AbsentPages
from qemu_user.write_log import WriteLog

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
        self._only = self._regions[0] if len(self._regions) == 1 else None
        self._bases = [ctypes.addressof(ctypes.c_char.from_buffer(view)) for _, _, view in self._regions]
        self.absent: AbsentPages | None = None
        """Of the first region: pages that come when they are touched."""
        self._logs = [WriteLog(end - start, PAGE) for start, end, _ in self._regions]

    @property
    def flat(self) -> tuple[int, int, memoryview] | None:
        """(first address, end, bytes) of RAM when it is one region and all of it is there: for those who look themselves."""
        return self._only if self.absent is None else None

    def view(self, gpa: int, length: int) -> memoryview:
        """The bytes themselves (no copy). OutOfRange."""
        position = bisect_right(self._starts, gpa) - 1
        if position >= 0 and length >= 0:
            start, end, view = self._regions[position]
            if gpa + length <= end:
                absent = self.absent
                if absent is not None and position == 0:
                    absent.ensure(gpa - start, length)
                return view[gpa - start : gpa - start + length]
        raise OutOfRange(gpa, length)

    def address(self, gpa: int) -> int:
        """Where in this process the byte at `gpa` is, for code that is not Python. OutOfRange."""
        position = bisect_right(self._starts, gpa) - 1
        if position >= 0 and gpa < self._regions[position][1]:
            return self._bases[position] + gpa - self._starts[position]
        raise OutOfRange(gpa, 1)

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of guest memory. OutOfRange."""
        return bytes(self.view(gpa, length))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `gpa`. OutOfRange."""
        self.view(gpa, len(data))[:] = data
        self.wrote(gpa, len(data))

    def arrive(self, gpa: int) -> bool:
        """A vCPU has touched a page that was not there: bring it, if nobody has meanwhile. False: it is not RAM."""
        absent = self.absent
        if not self._regions or not self._starts[0] <= gpa < self._regions[0][1]:
            return False
        if absent is not None:  # else all have come between the vCPU's look and ours
            absent.ensure(gpa - self._starts[0], PAGE)
        return True

    def discard(self, gpa: int, length: int) -> None:
        """Give the whole pages in [gpa, gpa + length) back to the host: they read as zeroes from now on. OutOfRange."""
        position = bisect_right(self._starts, gpa) - 1
        if position < 0 or length < 0 or gpa + length > self._regions[position][1]:
            raise OutOfRange(gpa, length)
        start, _, view = self._regions[position]
        first, end = -(-(gpa - start) // PAGE) * PAGE, (gpa + length - start) // PAGE * PAGE
        if first < end:
            mapping = view.obj
            assert isinstance(mapping, mmap.mmap)
            mapping.madvise(mmap.MADV_REMOVE, first, end - first)
            self.wrote(start + first, end - first)

    # -- the log of what devices write -------------------------------------------------------------

    @property
    def logging(self) -> bool:
        """Whether wrote() is remembered."""
        return bool(self._logs) and self._logs[0].on

    def wrote(self, gpa: int, length: int) -> None:
        """A device has written [gpa, gpa + length), through a view. To be called after the write."""
        position = bisect_right(self._starts, gpa) - 1
        if position >= 0:
            self._logs[position].wrote(gpa - self._starts[position], length)

    @property
    def logs(self) -> list[WriteLog]:
        """The log of each region, in the order of `regions`."""
        return self._logs

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
        self._regions, self._starts, self._only = [], [], None
