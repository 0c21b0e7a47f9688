"""Where guest clusters are: the L1 table, and L2 tables in a bounded cache. Changes are made in memory and handed to the
image's flush, which writes them after the reference counts of what they point to.

The image's lock is held in every call.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from typing import NamedTuple

from qemu_user.backends.block.qcow2.header import COPIED, OFFSET_MASK
from qemu_user.backends.block.qcow2.refcounts import Refcounts
from qemu_user.backends.block.qcow2.store import L1, L2, Store, encode

CACHE_BYTES = 16 << 20
_PAGE_ENTRIES = 512
"""Entries of 4 KiB, the unit that is written."""


class Table:
    """An L2 table. Change entries through set() and fill() only."""

    __slots__ = ("dirty", "entries", "fresh", "offset", "pinned")

    def __init__(self, offset: int, entries: array[int], fresh: bool) -> None:
        self.offset, self.entries = offset, entries
        self.dirty: set[int] = set()
        self.fresh = fresh
        """Nothing on the disk points to it yet."""
        self.pinned = 0

    def set(self, index: int, entry: int) -> None:
        """Change one entry."""
        self.entries[index] = entry
        self.dirty.add(index // _PAGE_ENTRIES)

    def all_dirty(self) -> None:
        """All of it has to be written."""
        self.dirty.update(range(-(-len(self.entries) // _PAGE_ENTRIES)))


class Pieces(NamedTuple):
    """What a flush has to write, taken at one instant: tables that nothing points to yet, then what is in force."""

    fresh: list[tuple[int, bytes]]
    current: list[tuple[int, bytes]]
    tables: list[Table]
    l1_indices: list[int]


class Mapping:
    """The tables of one image."""

    def __init__(self, store: Store, refcounts: Refcounts) -> None:
        """CorruptImage when tables lie over each other."""
        self._store, self._refcounts = store, refcounts
        header = store.header
        self.offset = header.l1_table_offset
        self.l1 = store.read_table(self.offset, header.l1_size) if header.l1_size else array("Q")
        self.bits = header.l2_bits
        self.per_table = 1 << self.bits
        if header.l1_size:
            store.claim(self.offset, 8 * header.l1_size, L1)
        for entry in self.l1:
            if entry & OFFSET_MASK:
                offset = entry & OFFSET_MASK
                if offset % store.cluster or offset >> store.bits >= store.high:
                    raise store.damaged(f"an L2 table at {offset:#x}")
                store.claim(offset, store.cluster, L2)
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._room = max(2, CACHE_BYTES // store.cluster)
        self._l1_dirty: set[int] = set()

    @property
    def dirty(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._l1_dirty) or any(table.dirty for table in self._tables.values())

    @property
    def l1_dirty(self) -> bool:
        """Whether the L1 table in memory differs from the one on the disk."""
        return bool(self._l1_dirty)

    @property
    def crowded(self) -> bool:
        """Whether dirty tables keep the cache from its bound."""
        return len(self._tables) > self._room

    @property
    def cached(self) -> int:
        """Tables in memory."""
        return len(self._tables)

    def known(self, index: int) -> bool:
        """Whether table(index) need not read."""
        return index in self._tables or not self.l1[index] & OFFSET_MASK

    def table(self, index: int) -> Table | None:
        """The L2 table that L1 entry `index` names; None where there is none."""
        table = self._tables.get(index)
        if table is not None:
            self._tables.move_to_end(index)
            return table
        offset = self.l1[index] & OFFSET_MASK
        if not offset:
            return None
        table = Table(offset, self._store.read_table(offset, self.per_table), fresh=False)
        self._keep(index, table)
        return table

    def writable(self, index: int) -> tuple[Table, int]:
        """The L2 table, made or copied if need be, and the offset of the one that it replaces (0: none): that one has to be
        released once the change is on the disk."""
        table, old = self.table(index), self.l1[index]
        if table is not None and old & COPIED:
            return table, 0
        first, _ = self._refcounts.allocate(1)
        store = self._store
        entries = array("Q", table.entries) if table is not None else array("Q", bytes(store.cluster))
        table = Table(first << store.bits, entries, fresh=True)
        table.all_dirty()
        store.claim(table.offset, store.cluster, L2)
        self.l1[index] = table.offset | COPIED
        self._l1_dirty.add(index)
        self._keep(index, table)
        return table, old & OFFSET_MASK

    def _keep(self, index: int, table: Table) -> None:
        self._tables[index] = table
        self._tables.move_to_end(index)
        self._trim(index)

    def _trim(self, needed: int = -1) -> None:
        """Forget what is on the disk, the least recently used first, until the bound is kept."""
        if len(self._tables) > self._room:
            for index, candidate in list(self._tables.items()):
                if len(self._tables) <= self._room:
                    break
                if index != needed and not candidate.dirty and not candidate.pinned:
                    del self._tables[index]

    def move(self, offset: int, table: array[int]) -> None:
        """The L1 table is another one, at another place: written and in force already."""
        self.offset, self.l1 = offset, table
        self._l1_dirty.clear()

    def collect(self) -> Pieces:
        """What has to be written, marked as clean; the tables stay in memory until done()."""
        pieces = Pieces([], [], [], sorted(self._l1_dirty))
        for table in self._tables.values():
            if not table.dirty:
                continue
            into = pieces.fresh if table.fresh else pieces.current
            for page in sorted(table.dirty):
                part = table.entries[page * _PAGE_ENTRIES : (page + 1) * _PAGE_ENTRIES]
                into.append((table.offset + 8 * _PAGE_ENTRIES * page, encode(part)))
            table.dirty.clear()
            table.pinned += 1
            pieces.tables.append(table)
        for index in pieces.l1_indices:
            pieces.current.append((self.offset + 8 * index, self.l1[index].to_bytes(8, "big")))
        self._l1_dirty.clear()
        return pieces

    def done(self, pieces: Pieces, written: bool) -> None:
        """The pieces are on the disk; or they are not, and have to be written again."""
        for table in pieces.tables:
            table.pinned -= 1
            if written:
                table.fresh = False
            else:
                table.all_dirty()
        if not written:
            self._l1_dirty.update(pieces.l1_indices)
        self._trim()
