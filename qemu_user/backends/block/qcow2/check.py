"""Checking a qcow2 image: every reference is counted and compared with the counts that the image keeps.

`check` looks at a file that nobody writes; `rebuild_refcounts` makes the counts of an image that was not closed agree with its
references. Damage is reported, never followed: nothing is read outside the file.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from array import array
from dataclasses import dataclass, field

from qemu_user.backends.block.qcow2 import header as headers
from qemu_user.backends.block.qcow2.header import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Header
from qemu_user.backends.block.qcow2.mapping import Mapping
from qemu_user.backends.block.qcow2.refcounts import Refcounts, decode_counters
from qemu_user.backends.block.qcow2.store import Store
from qemu_user.backends.errors import BackendError

MAX_CLUSTERS = 1 << 28
_SNAPSHOT = struct.Struct(">QIHHIIQII")
_BITMAP = struct.Struct(">QIIBBHI")
_SHOWN = 100


@dataclass
class Findings:
    """What a check found."""

    corruptions: int = 0
    leaks: int = 0
    """Clusters that nobody references: lost space, no lost data."""
    messages: list[str] = field(default_factory=list)
    """The first hundred corruptions."""
    allocated: int = 0
    compressed: int = 0
    clusters: int = 0
    """Of the guest's disk."""
    end: int = 0
    """Bytes of the file up to the last cluster in use."""

    def corrupt(self, what: str) -> None:
        """Note a corruption."""
        self.corruptions += 1
        if len(self.messages) < _SHOWN:
            self.messages.append(what)


class _Count:
    """Counts the references of one file."""

    def __init__(self, fd: int, header: Header, findings: Findings) -> None:
        self._fd, self._header, self._findings = fd, header, findings
        self._bits, self._cluster = header.cluster_bits, header.cluster_size
        self.length = os.lseek(fd, 0, os.SEEK_END)
        clusters = -(-self.length // self._cluster)
        if clusters > MAX_CLUSTERS:
            raise BackendError(f"a file of {clusters} clusters is too large to be checked")
        self.references = array("I", bytes(4 * clusters))

    def _table(self, offset: int, entries: int, what: str) -> array[int]:
        """Big-endian 64-bit entries; those that cannot be read are missing."""
        if offset % self._cluster or offset + 8 * entries > self.length:
            self._findings.corrupt(f"{what} at {offset:#x} lies beyond the end of the file or is not aligned")
            return array("Q")
        self.add(offset, 8 * entries, what)
        data = os.pread(self._fd, 8 * entries, offset)
        table = array("Q", data[: len(data) & -8])
        if sys.byteorder == "little":
            table.byteswap()
        return table

    def add(self, offset: int, length: int, what: str) -> None:
        """One more reference to each cluster of [offset, offset + length)."""
        if length <= 0:
            return
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        if last >= len(self.references):
            self._findings.corrupt(f"{what} at {offset:#x} lies beyond the end of the file")
            last = len(self.references) - 1
        for cluster in range(first, last + 1):
            self.references[cluster] += 1

    def everything(self) -> None:
        """All references there are."""
        header = self._header
        self.add(0, 1, "header")
        self._tree(header.l1_table_offset, header.l1_size, active=True)
        if header.nb_snapshots:
            self._snapshots()
        for kind, data in header.extensions:
            if kind == headers.BITMAP_EXTENSION and header.autoclear & headers.BITMAPS and len(data) >= 24:
                self._bitmaps(*struct.unpack_from(">I4xQQ", data))
        entries = header.refcount_table_clusters * self._cluster // 8
        for entry in self._table(header.refcount_table_offset, entries, "refcount table"):
            if entry:
                if entry % self._cluster:
                    self._findings.corrupt(f"refcount block at {entry:#x} is not aligned")
                else:
                    self.add(entry, self._cluster, "refcount block")

    def _tree(self, offset: int, entries: int, active: bool) -> None:
        for entry in self._table(offset, entries, "L1 table") if entries else ():
            if entry & OFFSET_MASK:
                for l2_entry in self._table(entry & OFFSET_MASK, self._cluster // 8, "L2 table"):
                    if l2_entry:
                        self._data(l2_entry, active)

    def _data(self, entry: int, active: bool) -> None:
        if entry & COMPRESSED:
            shift = 62 - (self._bits - 8)
            offset = entry & (1 << shift) - 1
            sectors = (entry >> shift & (1 << 62 - shift) - 1) + 1
            length = sectors * headers.SECTOR - (offset & headers.SECTOR - 1)
            self.add(offset, min(length, max(self.length - offset, 1)), "compressed cluster")
        elif entry & OFFSET_MASK:
            if entry & OFFSET_MASK & self._cluster - 1:
                self._findings.corrupt(f"data cluster at {entry & OFFSET_MASK:#x} is not aligned")
                return
            self.add(entry & OFFSET_MASK, self._cluster, "data cluster")
        if active:
            plain = entry & OFFSET_MASK and not (entry & ZERO and self._header.version >= 3)
            self._findings.allocated += bool(plain or entry & COMPRESSED)
            self._findings.compressed += bool(entry & COMPRESSED)

    def _snapshots(self) -> None:
        at = start = self._header.snapshots_offset
        for _ in range(self._header.nb_snapshots):
            data = os.pread(self._fd, _SNAPSHOT.size, at)
            if len(data) < _SNAPSHOT.size:
                self._findings.corrupt("snapshot table is cut off")
                break
            offset, entries, id_length, name_length, *_, extra = _SNAPSHOT.unpack(data)
            at += -(-(_SNAPSHOT.size + extra + id_length + name_length) // 8) * 8
            if 8 * entries > headers.MAX_L1_BYTES or extra > 1024:
                self._findings.corrupt(f"snapshot with an L1 table of {entries} entries")
                break
            self._tree(offset, entries, active=False)
        self.add(start, at - start, "snapshot table")

    def _bitmaps(self, number: int, length: int, at: int) -> None:
        directory = os.pread(self._fd, min(length, 1 << 24), at)
        self.add(at, length, "bitmap directory")
        position = 0
        for _ in range(number):
            if position + _BITMAP.size > len(directory):
                self._findings.corrupt("bitmap directory is cut off")
                return
            offset, entries, _, _, _, name_length, extra = _BITMAP.unpack_from(directory, position)
            position += -(-(_BITMAP.size + extra + name_length) // 8) * 8
            if 8 * entries > headers.MAX_L1_BYTES:
                self._findings.corrupt(f"bitmap table of {entries} entries")
                return
            for entry in self._table(offset, entries, "bitmap table"):
                if entry & OFFSET_MASK:
                    self.add(entry & OFFSET_MASK, self._cluster, "bitmap")


def check(fd: int, header: Header) -> Findings:
    """Compare references with counts. BackendError if the file is absurdly large."""
    findings = Findings(clusters=-(-header.size // header.cluster_size))
    count = _Count(fd, header, findings)
    count.everything()
    counts = _Counts(fd, header)
    used = 0
    for cluster, references in enumerate(count.references):
        kept = counts.get(cluster)
        if kept > references:
            findings.leaks += 1
        elif kept < references:
            findings.corrupt(f"cluster {cluster}: counted {kept} times, referenced {references} times")
        if kept or references:
            used = cluster + 1
    findings.end = used * header.cluster_size
    _check_copied(fd, header, counts, findings)
    return findings


def _check_copied(fd: int, header: Header, counts: _Counts, findings: Findings) -> None:
    bits = header.cluster_bits
    reader = _Count(fd, header, Findings())  # what is wrong with these tables has been told
    for entry in reader._table(header.l1_table_offset, header.l1_size, "L1 table") if header.l1_size else ():
        offset = entry & OFFSET_MASK
        if not offset:
            continue
        if bool(entry & COPIED) != (counts.get(offset >> bits) == 1):
            findings.corrupt(f"L2 table at {offset:#x}: the flag COPIED is wrong")
        for l2_entry in reader._table(offset, header.cluster_size // 8, "L2 table"):
            host = l2_entry & OFFSET_MASK
            wrong = bool(l2_entry & COPIED) != (counts.get(host >> bits) == 1)
            if host and not l2_entry & COMPRESSED and wrong:
                findings.corrupt(f"data cluster at {host:#x}: the flag COPIED is wrong")


class _Counts:
    """The counts as they stand in a file, block by block."""

    def __init__(self, fd: int, header: Header) -> None:
        self._fd, self._header = fd, header
        length = header.refcount_table_clusters * header.cluster_size
        data = os.pread(fd, length, header.refcount_table_offset)
        self._table = array("Q", data[: len(data) & -8])
        if sys.byteorder == "little":
            self._table.byteswap()
        self._index = -1
        self._block = array("B")

    def get(self, cluster: int) -> int:
        header = self._header
        index = cluster >> header.refcount_bits
        if index != self._index:
            entry = self._table[index] if index < len(self._table) else 0
            data = os.pread(self._fd, header.cluster_size, entry) if entry and not entry >> 62 else b""
            self._block = decode_counters(data.ljust(header.cluster_size, b"\0"), header.refcount_order)
            self._index = index
        return self._block[cluster & (1 << header.refcount_bits) - 1]


def rebuild_refcounts(store: Store, refcounts: Refcounts, mapping: Mapping) -> None:
    """Give every cluster the count of its references, in memory. OSError(EIO) when the tables are damaged."""
    findings = Findings()
    count = _Count(store.fd, store.header, findings)
    count.everything()
    if findings.corruptions:
        raise OSError(errno.EIO, findings.messages[0])
    references = count.references
    for cluster, wanted in enumerate(references):
        if wanted and not refcounts.has_block(cluster):
            refcounts.place_block(cluster)
    for cluster, wanted in enumerate(references):
        if refcounts.get(cluster) != wanted:
            refcounts.set(cluster, wanted)
