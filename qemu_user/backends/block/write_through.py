"""cache=writethrough: a write is on the disk when it is done."""

from __future__ import annotations

from qemu_user.backends.block.filter import Filter


class WriteThrough(Filter):
    """A disk without a write cache."""

    @property
    def waits(self) -> bool:
        return True

    def write(self, offset: int, views: list[memoryview]) -> None:
        self.image.write(offset, views)
        self.image.flush()

    def punch(self, offset: int, length: int) -> None:
        self.image.punch(offset, length)
        self.image.flush()

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.image.zero(offset, length, unmap)
        self.image.flush()
