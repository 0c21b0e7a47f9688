"""The memory balloon (virtio 1.2, section 5.5), with free page reporting: the guest's free pages go back to the host.

Pages that the driver puts into the balloon or reports as free are discarded from the guest_memfd; touched again they
are there again, as zeroes. The target is the user's (QMP's `balloon`), the driver follows as it can.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, Literal

from qemu_user.devices.device import require
from qemu_user.devices.memory import GuestMemory, OutOfRange
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import Queue, QueueError

F_MUST_TELL_HOST, F_DEFLATE_ON_OOM, F_PAGE_REPORTING = 1 << 0, 1 << 2, 1 << 5
INFLATE, DEFLATE = 0, 1
QUEUES = 5
"""Up to reporting_vq. Drivers that leave out queues of features which are not offered count it as 2 or 3 instead."""
QUEUE_SIZE = 128
PAGE = 4096
"""Of the balloon's page numbers, whatever the guest's pages are."""
MAX_PAGES = 1 << 16
"""Page numbers in one request."""
ACTUAL_OFFSET = 4


class BalloonState(VirtioState, frozen=True, tag="balloon", kw_only=True):
    """Target and actual size in pages."""

    version: Literal[1] = 1
    target: int
    actual: int


class VirtioBalloon(VirtioDevice):
    """`changed(pages)` is called when the driver tells a new actual size."""

    device_id = 5
    pci_class = 0x00FF00
    State = BalloonState

    def __init__(
        self, name: str, memory: GuestMemory, reporting: bool = True, deflate_on_oom: bool = True
    ) -> None:
        features = F_MUST_TELL_HOST | (F_PAGE_REPORTING if reporting else 0) | (F_DEFLATE_ON_OOM if deflate_on_oom else 0)
        super().__init__(name, features, [QUEUE_SIZE] * QUEUES)
        self._memory = memory
        self.changed: Callable[[int], None] = lambda pages: None
        self.target = self.actual = 0

    def config(self) -> bytes:
        return struct.pack("<IIII", self.target, self.actual, 0, 0)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == ACTUAL_OFFSET and len(data) == 4:
            self.actual = int.from_bytes(data, "little")
            self.changed(self.actual)
        else:
            super().write_config(offset, data)

    def set_target(self, pages: int) -> None:
        """How many pages the balloon should hold. Any thread."""
        with self.transport.lock:
            self.target = pages
            self.transport.notify_config()

    def on_queue(self, index: int) -> None:
        queue = self.queues[index]
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if index <= DEFLATE:
                numbers = chain.take(self._checked(chain.readable_bytes))
                if index == INFLATE:
                    for first, count in _runs(numbers):
                        self._discard(first * PAGE, count * PAGE)
            elif self.negotiated & F_PAGE_REPORTING:
                for address, length in chain.targets:
                    self._discard(address, length)
            queue.push(chain, 0)
        self._done(queue)

    def _done(self, queue: Queue) -> None:
        if queue.allow_kicks():
            self.transport.serve_later(queue.index)
        self.transport.notify_used(queue)

    @staticmethod
    def _checked(length: int) -> int:
        if length % 4 or length > 4 * MAX_PAGES:
            raise QueueError("virtio-balloon: a list of page numbers that cannot be")
        return length

    def _discard(self, address: int, length: int) -> None:
        try:
            self._memory.discard(address, length)
        except OutOfRange:
            self.counters.count("bad_pages")
        except OSError:  # memory that cannot be given back: nothing is lost but the saving
            self.counters.count("kept_bytes", length)
        else:
            self.counters.count("discarded_bytes", length)

    def save(self) -> Any:
        return BalloonState(target=self.target, actual=self.actual)

    def check(self, state: Any) -> None:
        require(0 <= state.target < 1 << 32 and 0 <= state.actual < 1 << 32, f"{self.name}: size out of range")

    def restore(self, state: Any) -> None:
        self.target, self.actual = state.target, state.actual

    def reset(self) -> None:
        self.actual = 0  # the target is the user's and stays


def _runs(numbers: bytes) -> Iterator[tuple[int, int]]:
    """(first page, count) of consecutive page numbers, in whichever direction they run."""
    pages = sorted({number for (number,) in struct.iter_unpack("<I", numbers)})
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[start], index - start
            start = index
