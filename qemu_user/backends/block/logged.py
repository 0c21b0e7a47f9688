"""A disk whose writes are logged while somebody copies it. Wraps any BlockBackend; costs one look when nobody does.

Put around every image by machine/build.py, read by migration/volumes.py.
"""

from __future__ import annotations

import errno

from qemu_user.backends.block.filter import Filter
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.write_log import WriteLog

BLOCK = 64 << 10
"""Bytes of one mark: small enough that a busy disk converges, large enough that the log stays small."""


class LoggedDisk(Filter):
    """A BlockBackend over `image`."""

    def __init__(self, image: BlockBackend) -> None:
        super().__init__(image)
        self.log = WriteLog(image.size, BLOCK)
        self.outlives = False
        """Whether the VM may lose this process and go on: then nothing that was written is held back here."""

    @property
    def descriptor(self) -> int | None:
        """The file that holds the disk's bytes at their own offsets, if there is one: its holes need no copying."""
        return self.image.descriptor

    def write(self, offset: int, views: list[memoryview]) -> None:
        length = sum(map(len, views))
        self.image.write(offset, views)
        self._wrote(offset, length)

    def _wrote(self, offset: int, length: int) -> None:
        self.log.wrote(offset, length)
        if self.outlives:
            self.image.hand_out()

    def punch(self, offset: int, length: int) -> None:
        self.image.punch(offset, length)
        self._wrote(offset, length)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self.image.zero(offset, length, unmap)
        self._wrote(offset, length)

    def resize(self, size: int) -> None:
        if self.log.on:
            raise OSError(errno.EBUSY, "the disk is being copied")
        self.image.resize(size)
        self.size, self.log = self.image.size, WriteLog(self.image.size, BLOCK)
