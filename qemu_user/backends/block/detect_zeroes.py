"""detect-zeroes=on|unmap: a write of nothing but zeroes is not written but noted."""

from __future__ import annotations

from qemu_user.backends.block.filter import Filter
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.block.views import is_zero


class DetectZeroes(Filter):
    """`unmap`: zeroes need take no space."""

    def __init__(self, image: BlockBackend, unmap: bool) -> None:
        super().__init__(image)
        self._unmap = unmap

    def write(self, offset: int, views: list[memoryview]) -> None:
        if is_zero(views):
            self.image.zero(offset, sum(map(len, views)), self._unmap)
        else:
            self.image.write(offset, views)
