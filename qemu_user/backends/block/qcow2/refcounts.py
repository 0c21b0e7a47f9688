"""Reference counts of host clusters: a table of blocks of counters, 1 to 64 bits each; finding and taking free clusters.

Blocks are changed in memory and written by the image's flush, before anything that points to what they count. The
cache of blocks is bounded softly: dirty ones stay until they are written. The image's lock is held in every call.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections import OrderedDict
from typing import NamedTuple

from qemu_user.backends.block.qcow2 import header as headers
from qemu_user.backends.block.qcow2.store import REFCOUNT_BLOCK, REFCOUNT_TABLE, Store, encode

CACHE_BYTES = 4 << 20
_PAGE = 4096


class Block:
    """One refcount block: counters as numbers, and which 4 KiB of it changed."""

    __slots__ = ("dirty", "entries", "offset", "pinned")

    def __init__(self, offset: int, entries: array[int]) -> None:
        self.offset, self.entries = offset, entries
        self.dirty: set[int] = set()
        self.pinned = 0


class Pieces(NamedTuple):
    """What a flush has to write, taken at one instant."""

    blocks: list[tuple[int, bytes]]
    table: list[tuple[int, bytes]]
    held: list[Block]
    entries: list[int]


def decode_counters(data: bytes, order: int) -> array[int]:
    """The counters of a block, `2^order` bits each (in bytes, the first counter has the lowest bits)."""
    if order >= 3:
        counters = array({3: "B", 4: "H", 5: "I", 6: "Q"}[order], data)
        if sys.byteorder == "little" and order > 3:
            counters.byteswap()
        return counters
    width = 1 << order
    mask = (1 << width) - 1
    parts = [bytes(byte >> shift & mask for shift in range(0, 8, width)) for byte in range(256)]
    return array("B", b"".join([parts[byte] for byte in data]))


def encode_counters(counters: array[int], order: int) -> bytes:
    """The reverse."""
    if order >= 3:
        return encode(counters)
    width, per = 1 << order, 8 >> order
    packed = bytearray(len(counters) // per)
    for index, value in enumerate(counters):
        packed[index // per] |= value << index % per * width
    return bytes(packed)


class Refcounts:
    """The counts of one image."""

    def __init__(self, store: Store) -> None:
        """CorruptImage when the table contradicts other tables."""
        self._store, header = store, store.header
        self._order, self._bits = header.refcount_order, header.refcount_bits
        self.per_block = 1 << self._bits
        self.most = (1 << (1 << self._order)) - 1
        self.offset = header.refcount_table_offset
        self.table = store.read_table(self.offset, header.refcount_table_clusters * store.cluster // 8)
        store.claim(self.offset, 8 * len(self.table), REFCOUNT_TABLE)
        for entry in self.table:
            if entry:
                self._check_entry(entry)
                store.claim(entry, store.cluster, REFCOUNT_BLOCK)
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._room = max(2, CACHE_BYTES // store.cluster)
        self._new_entries: set[int] = set()
        self._hint = 0
        self.replaced: list[tuple[int, int]] = []
        """(offset, length) of tables that were outgrown: free once the new one is in force."""

    def _check_entry(self, entry: int) -> None:
        store = self._store
        if entry % store.cluster or entry >> store.bits >= store.high:
            raise store.damaged(f"a refcount block at {entry:#x}")

    @property
    def dirty(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._new_entries) or any(block.dirty for block in self._blocks.values())

    @property
    def crowded(self) -> bool:
        """Whether dirty blocks keep the cache from its bound."""
        return len(self._blocks) > self._room

    @property
    def cached(self) -> int:
        """Blocks in memory."""
        return len(self._blocks)

    def _block(self, index: int) -> Block | None:
        """Block `index` if it exists."""
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        if index >= len(self.table) or not self.table[index]:
            return None
        offset = self.table[index]
        block = Block(offset, decode_counters(self._store.read(offset, self._store.cluster), self._order))
        self._keep(index, block)
        return block

    def _keep(self, index: int, block: Block) -> None:
        self._blocks[index] = block
        self._trim(index)

    def _trim(self, needed: int = -1) -> None:
        """Forget what is on the disk, the least recently used first, until the bound is kept."""
        if len(self._blocks) > self._room:
            for index, candidate in list(self._blocks.items()):
                if len(self._blocks) <= self._room:
                    break
                if index != needed and not candidate.dirty and not candidate.pinned:
                    del self._blocks[index]

    def get(self, cluster: int) -> int:
        """How often a host cluster is referenced."""
        block = self._block(cluster >> self._bits)
        return block.entries[cluster & self.per_block - 1] if block else 0

    def set(self, cluster: int, value: int) -> None:
        """Change a count; its block is made if there is none."""
        block = self._made(cluster >> self._bits)
        block.entries[cluster & self.per_block - 1] = value
        self._touch(block, cluster & self.per_block - 1)
        if not value:
            self._hint = min(self._hint, cluster)

    def _touch(self, block: Block, entry: int) -> None:
        block.dirty.add((entry << self._order >> 3) // _PAGE)

    def release(self, cluster: int) -> bool:
        """One reference less; whether it was the last. CorruptImage if there was none."""
        count = self.get(cluster)
        if not count:
            raise self._store.damaged(f"a reference count below zero, of the cluster at {cluster << self._store.bits:#x}")
        self.set(cluster, count - 1)
        return count == 1

    def allocate(self, count: int, exactly: bool = False) -> tuple[int, int]:
        """(first cluster, how many) of up to `count` free clusters in a row, now with one reference each. OSError(ENOSPC)
        beyond what a file can hold."""
        start = self._hint
        while True:
            first, number = self._free_run(start, count)
            if number < count and exactly:
                start = first + number
                continue
            if first + number << self._store.bits > 1 << 62:
                raise OSError(errno.ENOSPC, "the image is too large")
            # a block that is missing is placed into the clusters that it counts
            before = len(self._store.metadata)
            for index in range(first >> self._bits, (first + number - 1 >> self._bits) + 1):
                self._made(index)
            if len(self._store.metadata) != before:
                continue
            break
        for cluster in range(first, first + number):
            if cluster in self._store.metadata:
                where = f"{self._store.metadata[cluster]} at {cluster << self._store.bits:#x}"
                raise self._store.damaged(f"the {where} counts as free")
            self.set(cluster, 1)
        if start == self._hint:
            self._hint = first + number
        self._store.high = max(self._store.high, first + number)
        return first, number

    def _free_run(self, cluster: int, count: int) -> tuple[int, int]:
        """The first free cluster from here on, and how many, up to `count`, are free from there."""
        while True:
            block = self._block(cluster >> self._bits)
            if block is None:
                break
            try:
                cluster = (cluster & -self.per_block) + block.entries.index(0, cluster & self.per_block - 1)
                break
            except ValueError:
                cluster = (cluster & -self.per_block) + self.per_block
        number = 1
        while number < count and not self.get(cluster + number):
            number += 1
        return cluster, number

    def _made(self, index: int) -> Block:
        """Block `index`, made if it does not exist: in the first of the clusters that it counts, which are all free."""
        block = self._block(index)
        if block is not None:
            return block
        if index >= len(self.table):
            self._grow(index)
            block = self._block(index)
            if block is not None:
                return block
        cluster = index << self._bits
        store = self._store
        store.claim(cluster << store.bits, store.cluster, REFCOUNT_BLOCK)
        return self._fresh(index, cluster)

    def _fresh(self, index: int, cluster: int) -> Block:
        """A new block at a cluster that it may count itself."""
        store = self._store
        block = Block(cluster << store.bits, decode_counters(bytes(store.cluster), self._order))
        block.dirty = set(range(-(-store.cluster // _PAGE)))
        self.table[index] = block.offset
        self._new_entries.add(index)
        self._keep(index, block)
        store.high = max(store.high, cluster + 1)
        if cluster >> self._bits == index:
            block.entries[cluster & self.per_block - 1] = 1
        return block

    def has_block(self, cluster: int) -> bool:
        """Whether there is a block that counts this cluster."""
        index = cluster >> self._bits
        return index < len(self.table) and bool(self.table[index])

    def place_block(self, cluster: int) -> None:
        """Make the block that counts a cluster, behind the end of the file: nothing is known to be free. OSError."""
        index, place = cluster >> self._bits, self._store.high
        if index >= len(self.table):
            raise OSError(errno.EIO, "the refcount table is too short")
        self._store.claim(place << self._store.bits, self._store.cluster, REFCOUNT_BLOCK)
        self._fresh(index, place)
        if not self.has_block(place):
            self.place_block(place)
        self.set(place, 1)

    def _grow(self, index: int) -> None:
        """Replace the table by a larger one, behind all clusters that the old one can count; in force at once, on the
        disk with nothing pointing to it before."""
        store, old = self._store, len(self.table)
        entries = max(index + 1, old + old // 2)
        first = old << self._bits
        while True:
            clusters = -(-8 * entries // store.cluster)
            # the table and the blocks which count it and themselves
            blocks = max(1, -(-clusters // max(self.per_block - 1, 1)))
            if old + blocks <= clusters * store.cluster // 8:
                break
            entries = old + blocks
        if clusters * store.cluster > headers.MAX_REFCOUNT_TABLE_BYTES:
            raise OSError(errno.ENOSPC, "the image is too large for its clusters")
        self.table.extend([0] * (clusters * store.cluster // 8 - old))
        where = first + blocks
        for number in range(blocks):
            store.claim((first + number) << store.bits, store.cluster, REFCOUNT_BLOCK)
            self._fresh(old + number, first + number)
        store.claim(where << store.bits, clusters * store.cluster, REFCOUNT_TABLE)
        for cluster in range(first, where + clusters):
            self.set(cluster, 1)
        store.high = max(store.high, where + clusters)
        # The table comes into force at once, so all that it points to has to be in the file before.
        for block in self._blocks.values():
            if block.dirty or block.pinned:
                store.write(block.offset, encode_counters(block.entries, self._order))
        store.write(where << store.bits, encode(self.table))
        store.file.flush()
        store.write(
            headers.REFCOUNT_TABLE_AT, (where << store.bits).to_bytes(8, "big") + clusters.to_bytes(4, "big")
        )
        store.file.flush()
        self._new_entries.clear()
        self.replaced.append((self.offset, old * 8))
        self.offset = where << store.bits

    # -- writing -----------------------------------------------------------------------------------

    def collect(self) -> Pieces:
        """What has to be written, marked as clean; the blocks stay in memory until done()."""
        pieces = Pieces([], [], [], sorted(self._new_entries))
        for block in self._blocks.values():
            if not block.dirty:
                continue
            data = encode_counters(block.entries, self._order)
            for page in sorted(block.dirty):
                pieces.blocks.append((block.offset + page * _PAGE, data[page * _PAGE : (page + 1) * _PAGE]))
            block.dirty.clear()
            block.pinned += 1
            pieces.held.append(block)
        for index in pieces.entries:
            pieces.table.append((self.offset + 8 * index, self.table[index].to_bytes(8, "big")))
        self._new_entries.clear()
        return pieces

    def done(self, pieces: Pieces, written: bool) -> None:
        """The pieces are on the disk; or they are not, and have to be written again."""
        for block in pieces.held:
            block.pinned -= 1
            if not written:
                block.dirty.update(range(-(-self._store.cluster // _PAGE)))
        if not written:
            self._new_entries.update(pieces.entries)
        self._trim()
