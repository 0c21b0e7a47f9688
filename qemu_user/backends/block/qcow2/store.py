"""The file below a qcow2 image, as its tables see it: big-endian tables in and out, and which clusters are metadata.

`Store` knows where each table lies, so that neither a damaged nor a hostile image can make one be overwritten: data goes
to clusters that are none of them. CorruptImage marks the image (incompatible feature bit 1) and ends all writing.
"""

from __future__ import annotations

import errno
import os
import sys
from array import array
from collections.abc import Callable

from qemu_user.backends.block.qcow2 import header as headers
from qemu_user.backends.block.qcow2.header import Header
from qemu_user.backends.block.raw import RawImage

HEADER, L1, REFCOUNT_TABLE, REFCOUNT_BLOCK, L2, SNAPSHOTS = (
    "header", "L1 table", "refcount table", "refcount block", "L2 table", "snapshot table",
)  # fmt: skip


class CorruptImage(OSError):
    """Metadata contradicts itself. EIO for the guest; the text is for the user."""

    def __init__(self, what: str) -> None:
        super().__init__(errno.EIO, f"the image is damaged: {what}")


class Store:
    """A qcow2 file. Not locked: the image's lock is held."""

    def __init__(self, file: RawImage, header: Header) -> None:
        self.file, self.header = file, header
        self.bits, self.cluster = header.cluster_bits, header.cluster_size
        self.fd = file.descriptor if file.descriptor is not None else -1
        self.length = os.fstat(self.fd).st_size or os.lseek(self.fd, 0, os.SEEK_END)
        self.high = -(-self.length // self.cluster)
        """Clusters of the file that have ever been used: those beyond read as zeroes."""
        self.metadata: dict[int, str] = {}
        """Which table a cluster is part of."""
        self.active = False
        """Whether the file is locked, so that it may be written."""
        self.corrupt = bool(header.incompatible & headers.CORRUPT)
        self.told: Callable[[str], None] = lambda text: None
        """Called once with what is wrong when an image turns out to be damaged."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; CorruptImage where it ends before."""
        end = self.file.end
        if offset + length > end:
            raise self.damaged(f"the file is cut off at {end:#x}")
        data = bytearray(length)
        self.file.read(offset, [memoryview(data)])
        return bytes(data)

    def read_table(self, offset: int, entries: int) -> array[int]:
        """64-bit entries."""
        table = array("Q", self.read(offset, 8 * entries))
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put metadata into the file."""
        self.file.write(offset, [memoryview(data)])

    def write_number(self, offset: int, size: int, value: int) -> None:
        """One big-endian field."""
        self.write(offset, value.to_bytes(size, "big"))

    def claim(self, offset: int, length: int, what: str) -> None:
        """These clusters are `what` from now on. CorruptImage if they are something else already."""
        first, last = offset >> self.bits, offset + max(length, 1) - 1 >> self.bits
        for cluster in range(first, last + 1):
            other = self.metadata.get(cluster)
            if other is not None:
                raise self.damaged(f"the {what} at {offset:#x} lies over the {other}")
            self.metadata[cluster] = what

    def forget(self, offset: int, length: int) -> None:
        """These clusters are no metadata any more."""
        for cluster in range(offset >> self.bits, (offset + max(length, 1) - 1 >> self.bits) + 1):
            self.metadata.pop(cluster, None)

    def check_data(self, host: int, length: int) -> None:
        """CorruptImage unless data may be written to [host, host + length)."""
        for cluster in range(host >> self.bits, (host + length - 1 >> self.bits) + 1):
            if cluster in self.metadata or cluster >= self.high:
                where = self.metadata.get(cluster, "end of the file")
                raise self.damaged(f"a data cluster at {cluster << self.bits:#x} lies over the {where}")

    def damaged(self, what: str) -> CorruptImage:
        """The error to raise; the image is marked, and nothing is written any more."""
        if not self.corrupt:
            self.corrupt = True
            if self.active and not self.file.readonly:
                if self.header.version >= 3:
                    self.write_number(headers.INCOMPATIBLE_AT, 8, self.header.incompatible | headers.CORRUPT)
                self.told(f"{self.file.path}: {what}; it is not written any more (qemu-img check, softkvm image check)")
        return CorruptImage(what)


def encode(table: array[int]) -> bytes:
    """A table's bytes as they stand in the file."""
    if sys.byteorder == "little" and table.itemsize > 1:
        table = array(table.typecode, table)
        table.byteswap()
    return table.tobytes()
