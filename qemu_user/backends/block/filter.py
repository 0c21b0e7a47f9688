"""Disks made of other disks, one file each: this is what those that change little about one disk begin with."""

from __future__ import annotations

from collections.abc import Callable

from qemu_user.backends.block.raw import BlockBackend


class Filter:
    """A BlockBackend that does everything as `image` does."""

    def __init__(self, image: BlockBackend) -> None:
        self.image = image
        self.size, self.readonly, self.discard = image.size, image.readonly, image.discard

    @property
    def report(self) -> Callable[[str, str], None]:
        """The image's."""
        return self.image.report

    @report.setter
    def report(self, report: Callable[[str, str], None]) -> None:
        self.image.report = report

    @property
    def descriptor(self) -> int | None:
        return None  # nobody goes past this one

    @property
    def waits(self) -> bool:
        return self.image.waits

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        return self.image.read_now(offset, views)

    def read(self, offset: int, views: list[memoryview]) -> None:
        self.image.read(offset, views)

    def write(self, offset: int, views: list[memoryview]) -> None:
        self.image.write(offset, views)

    def flush(self) -> None:
        self.image.flush()

    def punch(self, offset: int, length: int) -> None:
        self.image.punch(offset, length)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.image.zero(offset, length, unmap)

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        return self.image.with_data(unit, chain)

    def lock(self) -> None:
        self.image.lock()

    def unlock(self) -> None:
        self.image.unlock()

    def hand_out(self) -> None:
        self.image.hand_out()

    def locks(self) -> list[int]:
        return self.image.locks()

    def adopt_locks(self, take: Callable[[], int]) -> None:
        self.image.adopt_locks(take)

    def resize(self, size: int) -> None:
        self.image.resize(size)
        self.size = self.image.size

    def close(self) -> None:
        self.image.close()
