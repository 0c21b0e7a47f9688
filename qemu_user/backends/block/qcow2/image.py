"""A qcow2 image as a disk: reads through the chain of backing files, allocates on write, frees on discard.

Any number of threads. The lock covers tables in memory only; data moves outside it. What keeps the image whole wherever
the process is killed or the power fails is the order of a flush (docs/disks.md): counts of references and new tables,
then what points to them, then the freeing of what is not pointed to any more. A freed cluster is used again only when that
is on the disk and no request from before is on its way.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from qemu_user.backends.block.qcow2 import header as headers
from qemu_user.backends.block.qcow2.compressed import Inflated
from qemu_user.backends.block.qcow2.header import COMPRESSED, COPIED, OFFSET_MASK, ZERO, Header
from qemu_user.backends.block.qcow2.mapping import Mapping
from qemu_user.backends.block.qcow2.refcounts import Refcounts
from qemu_user.backends.block.qcow2.store import HEADER, SNAPSHOTS, CorruptImage, Store, encode
from qemu_user.backends.block.raw import BlockBackend, RawImage, unheard
from qemu_user.backends.block.views import Cutter, fill_zero
from qemu_user.backends.errors import BackendError

_ZEROES, _DATA, _BACKING, _PACKED = range(4)
_HEADER_PAGE = 4096
_ZERO_BYTES = bytes(headers.SECTOR << 12)


class _Run(NamedTuple):
    """A stretch of the disk that lies in one piece. `where`: in the file (_DATA), or the L2 entry (_PACKED)."""

    kind: int
    where: int
    length: int


class _Allocation(NamedTuple):
    """Guest clusters [cluster, cluster + clusters) that are being written to new places, from `host` on."""

    cluster: int
    clusters: int
    host: int
    fresh_from: int
    """Host offset from which on the file is known to hold zeroes."""
    blank: tuple[bool, bool]
    """Whether what the first and the last cluster held before is zeroes."""
    taken: bool
    """Whether the host clusters are newly allocated."""


class Qcow2Image:
    """A BlockBackend."""

    def __init__(self, file: RawImage, backing: BlockBackend | None, discard: bool = True, locked: bool = True) -> None:
        """`file` is closed with this one, `backing` too. Not `locked`: nothing is written before lock(). BackendError."""
        self.file, self.backing, self.path = file, backing, file.path
        self.readonly, self.discard = file.readonly, discard and not file.readonly
        self.report: Callable[[str, str], None] = unheard
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._flushing = threading.Lock()
        self._active = self._closed = False
        self._busy: set[int] = set()
        self._epoch = 0
        self._inflight: dict[int, int] = {}
        self._pending: list[tuple[int, int]] = []
        """(first host cluster, how many) that the tables in memory point to no more."""
        self._freed: list[tuple[int, list[tuple[int, int]]]] = []
        """The same once the disk agrees, with the first epoch whose requests cannot know them."""
        self._take_header()
        if locked:
            self._activate()

    # -- opening and closing -----------------------------------------------------------------------

    def _take_header(self) -> None:
        self._header = read_header(self.file)
        if self._header.size == 0:
            raise BackendError(f"disk image {self.path}: is a disk of no size")
        self.size = -(-self._header.size // headers.SECTOR) * headers.SECTOR
        self._bits, self._cluster = self._header.cluster_bits, self._header.cluster_size

    def _activate(self) -> None:
        """Begin to use the image, whose file is locked."""
        header = self._header
        if header.incompatible & headers.CORRUPT and not self.readonly:
            raise BackendError(f"disk image {self.path}: is marked as damaged; `qemu-img check -r all` may repair it")
        try:
            self._store = Store(self.file, header)
            self._store.told = self._tell
            self._store.claim(0, 1, HEADER)
            if header.nb_snapshots:
                self._store.claim(header.snapshots_offset, 1, SNAPSHOTS)
            self._refcounts = Refcounts(self._store)
            self._mapping = Mapping(self._store, self._refcounts)
            self._inflated = Inflated(self._store)
        except OSError as error:
            raise BackendError(f"disk image {self.path}: {error.strerror}; see softkvm image check") from error
        self._store.active = self._active = True
        if not self.readonly:
            if header.incompatible & headers.DIRTY:
                self._repair()
            if header.autoclear:
                self._store.write_number(headers.AUTOCLEAR_AT, 8, 0)
            self._header = self._store.header = replace(self._header, autoclear=0)

    def _tell(self, text: str) -> None:
        self.report("BLOCK_IMAGE_CORRUPTED", text)

    def _repair(self) -> None:
        """Whoever wrote the image last let reference counts fall behind and did not close it."""
        from qemu_user.backends.block.qcow2.check import rebuild_refcounts

        try:
            rebuild_refcounts(self._store, self._refcounts, self._mapping)
            self._write_out()
            self._header = replace(self._header, incompatible=self._header.incompatible & ~headers.DIRTY)
            self._store.write_number(headers.INCOMPATIBLE_AT, 8, self._header.incompatible)
            self.file.flush()
        except OSError as error:
            raise BackendError(f"disk image {self.path}: was not closed, and cannot be repaired: {error.strerror}") from error

    @property
    def header(self) -> Header:
        """As it was when the image was opened."""
        return self._header

    @property
    def descriptor(self) -> int | None:
        return None

    def lock(self) -> None:
        """One writer or many readers; what others wrote before is seen from then on. BackendError. Idempotent."""
        self.file.lock()
        if not self._active:
            self._take_header()
            self._activate()

    def unlock(self) -> None:
        if self._active:
            self._settle()
            self._active = False
        self.file.unlock()

    def locks(self) -> list[int]:
        return self.file.locks()

    def adopt_locks(self, take: Callable[[], int]) -> None:
        self.file.adopt_locks(take)

    def hand_out(self) -> None:
        if self._active and (self._refcounts.dirty or self._mapping.dirty):
            self.flush()

    def _settle(self) -> None:
        """Write everything, and the counts of what that frees."""
        if self.readonly or self._store.corrupt:
            return
        self.flush()
        while self._pending or self._refcounts.dirty or self._mapping.dirty:
            self.flush()

    def close(self) -> None:
        """Write what is left, let go of the file and its lock. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._active:
                self._settle()
        except OSError:
            pass  # the flush before, if there was one, has told
        finally:
            self._active = False
            self.file.close()
            if self.backing is not None:
                self.backing.close()

    @property
    def waits(self) -> bool:
        """Whether a write is slow."""
        return self.file.waits

    # -- reading -----------------------------------------------------------------------------------

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        """Fill `views` as far as tables and data are in memory."""
        end = offset + sum(map(len, views))
        shift = self._bits + self._header.l2_bits
        with self._lock:
            if offset >= end or not all(map(self._mapping.known, range(offset >> shift, (end - 1 >> shift) + 1))):
                return False
            host = self._data_at(offset) if offset >> self._bits == end - 1 >> self._bits else 0
            runs = self._runs(offset, end) if not host else []
            epoch = self._enter()
        try:
            return self.file.read_now(host, views) if host else self._runs_now(runs, offset, views)
        finally:
            self._leave(epoch)

    def _runs_now(self, runs: list[_Run], offset: int, views: list[memoryview]) -> bool | None:
        cutter, answers = Cutter(views), set[bool | None]()
        for run in runs:
            part = cutter.next(run.length)
            if run.kind == _DATA:
                answers.add(self.file.read_now(run.where, part))
            elif run.kind == _ZEROES:
                fill_zero(part)
            elif run.kind == _BACKING and self.backing is not None and offset + run.length <= self.backing.size:
                answers.add(self.backing.read_now(offset, part))
            else:
                return False
            offset += run.length
        return False if False in answers else None if None in answers else True

    def read(self, offset: int, views: list[memoryview]) -> None:
        """Fill `views` from `offset` on."""
        end = offset + sum(map(len, views))
        if offset >= end:
            return
        with self._lock:
            # Most reads are of data within one cluster.
            host = self._data_at(offset) if offset >> self._bits == end - 1 >> self._bits else 0
            runs = self._runs(offset, end) if not host else []
            epoch = self._enter()
        try:
            if host:
                self.file.read(host, views)
                return
            if len(runs) == 1:
                self._read_run(runs[0], offset, views)
                return
            cutter = Cutter(views)
            for run in runs:
                self._read_run(run, offset, cutter.next(run.length))
                offset += run.length
        finally:
            self._leave(epoch)

    def _data_at(self, offset: int) -> int:
        """Where in the file a byte of the disk is, if it is in a plain data cluster; 0 if not."""
        if not self._active:
            return 0
        table = self._mapping.table(offset >> self._bits + self._mapping.bits)
        if table is None:
            return 0
        entry = table.entries[offset >> self._bits & self._mapping.per_table - 1]
        if entry & COMPRESSED or (entry & ZERO and self._header.version >= 3) or not entry & OFFSET_MASK:
            return 0
        return self._host(entry) + (offset & self._cluster - 1)

    def _read_run(self, run: _Run, offset: int, views: list[memoryview]) -> None:
        if run.kind == _DATA:
            self.file.read(run.where, views)
        elif run.kind == _ZEROES:
            fill_zero(views)
        elif run.kind == _PACKED:
            content = memoryview(self._inflated.cluster(run.where))[offset & self._cluster - 1 :]
            for view in views:
                view[:] = content[: len(view)]
                content = content[len(view) :]
        else:
            assert self.backing is not None
            there = max(0, min(run.length, self.backing.size - offset))
            cutter = Cutter(views)
            self.backing.read(offset, cutter.next(there))
            fill_zero(cutter.next(run.length - there))

    def _runs(self, offset: int, end: int) -> list[_Run]:
        """The stretches of [offset, end)."""
        if not self._active:
            raise OSError(errno.EBUSY, "the image is another process's for now")
        runs: list[_Run] = []
        bits, cluster, table_bits = self._bits, self._cluster, self._bits + self._header.l2_bits
        while offset < end:
            table = self._mapping.table(offset >> table_bits)
            if table is None:
                run = self._hole(offset, min(end, (offset >> table_bits) + 1 << table_bits) - offset)
            else:
                entry = table.entries[offset >> bits & self._mapping.per_table - 1]
                length = min(end, (offset & -cluster) + cluster) - offset
                if entry & COMPRESSED:
                    run = _Run(_PACKED, entry, length)
                elif entry & ZERO and self._header.version >= 3:
                    run = _Run(_ZEROES, 0, length)
                elif entry & OFFSET_MASK:
                    run = _Run(_DATA, self._host(entry) + (offset & cluster - 1), length)
                else:
                    run = self._hole(offset, length)
            offset += run.length
            if runs:
                last = runs[-1]
                joined = last.where + last.length == run.where if run.kind == _DATA else run.kind != _PACKED
                if last.kind == run.kind and joined:
                    runs[-1] = _Run(last.kind, last.where, last.length + run.length)
                    continue
            runs.append(run)
        return runs

    def _hole(self, offset: int, length: int) -> _Run:
        beneath = self.backing is not None and offset < self.backing.size
        return _Run(_BACKING if beneath else _ZEROES, 0, length)

    def _host(self, entry: int) -> int:
        """The host offset of an L2 entry of a plain cluster, checked."""
        host = entry & OFFSET_MASK
        if host & self._cluster - 1 or host >> self._bits >= self._store.high:
            raise self._store.damaged(f"a data cluster at {host:#x}")
        return host

    # -- requests on their way ---------------------------------------------------------------------

    def _enter(self) -> int:
        epoch = self._epoch
        self._inflight[epoch] = self._inflight.get(epoch, 0) + 1
        return epoch

    def _leave(self, epoch: int) -> None:
        with self._lock:
            self._inflight[epoch] -= 1
            if not self._inflight[epoch]:
                del self._inflight[epoch]
                if self._freed:
                    self._reap()

    def _reap(self) -> None:
        """Give clusters back that no request on its way can know."""
        oldest = min(self._inflight, default=self._epoch)
        while self._freed and self._freed[0][0] <= oldest:
            _, ranges = self._freed.pop(0)
            gone = []
            for first, count in ranges:
                for cluster in range(first, first + count):
                    if self._refcounts.release(cluster):
                        self._store.metadata.pop(cluster, None)
                        gone.append(cluster)
            if self.discard:
                self._punch_file(gone)

    def _punch_file(self, clusters: list[int]) -> None:
        clusters.sort()
        first = 0
        for index, cluster in enumerate(clusters):
            if index + 1 == len(clusters) or clusters[index + 1] != cluster + 1:
                start = clusters[first]
                try:
                    self.file.punch(start << self._bits, cluster + 1 - start << self._bits)
                except OSError:
                    pass  # they are free all the same
                first = index + 1

    # -- writing -----------------------------------------------------------------------------------

    def write(self, offset: int, views: list[memoryview]) -> None:
        """Put `views` at `offset`."""
        end = offset + sum(map(len, views))
        cutter = Cutter(views)
        while offset < end:
            with self._lock:
                plan = self._plan(offset, end)
                epoch = self._enter()
            try:
                if isinstance(plan, _Run):
                    length = plan.length
                    self.file.write(plan.where, cutter.next(length))
                else:
                    length = min(end, plan.cluster + plan.clusters << self._bits) - offset
                    self._write_new(plan, offset, length, cutter.next(length))
            finally:
                self._leave(epoch)
            offset += length
        if self._mapping.crowded or self._refcounts.crowded:
            self._write_out()

    def _demand_writable(self) -> None:
        if self.readonly or not self._active:
            raise OSError(errno.EROFS, "the image is open for reading only")
        if self._store.corrupt:
            raise OSError(errno.EIO, "the image is damaged")

    def _entry(self, cluster: int) -> int:
        table = self._mapping.table(cluster >> self._mapping.bits)
        return table.entries[cluster & self._mapping.per_table - 1] if table is not None else 0

    def _in_place(self, cluster: int) -> int:
        """The host offset of a cluster that may be overwritten where it is; 0 if it may not."""
        entry = self._entry(cluster)
        zero = ZERO if self._header.version >= 3 else 0
        if entry & (COPIED | COMPRESSED | zero) != COPIED or not self.l1_copied(cluster):
            return 0
        return self._host(entry)

    def l1_copied(self, cluster: int) -> bool:
        """Whether the L2 table of a cluster is this image's alone, and not a snapshot's too."""
        return bool(self._mapping.l1[cluster >> self._mapping.bits] & COPIED)

    def _plan(self, offset: int, end: int) -> _Run | _Allocation:
        """How the first piece of a write is done: over what is there, or to new clusters, which are busy from now on."""
        bits, cluster = self._bits, offset >> self._bits
        while cluster in self._busy:
            self._idle.wait()
        self._demand_writable()
        last = end - 1 >> bits
        host = self._in_place(cluster)
        if host:
            count = 1
            while cluster + count <= last and cluster + count not in self._busy:
                if self._in_place(cluster + count) != host + (count << bits):
                    break
                count += 1
            length = min(end, cluster + count << bits) - offset
            where = host + (offset & self._cluster - 1)
            self._store.check_data(where, length)
            return _Run(_DATA, where, length)
        entry = self._entry(cluster)
        if entry & COPIED and entry & OFFSET_MASK and not entry & COMPRESSED and self.l1_copied(cluster):
            host = self._host(entry)  # zero, but with a place of its own
            self._store.check_data(host, self._cluster)
            self._busy.add(cluster)
            return _Allocation(cluster, 1, host, 1 << 63, (True, True), False)
        count = 1
        while cluster + count <= last and cluster + count & self._mapping.per_table - 1:
            if cluster + count in self._busy or self._entry(cluster + count) & COPIED:
                break
            count += 1
        fresh = self._store.high
        first, count = self._refcounts.allocate(count)
        self._busy.update(range(cluster, cluster + count))
        blank = self._blank(cluster), self._blank(cluster + count - 1)
        # Blocks of counters may have been placed in between; what they took lies before `first`.
        return _Allocation(cluster, count, first << bits, fresh << bits, blank, True)

    def _blank(self, cluster: int) -> bool:
        """Whether a cluster reads as zeroes, as far as the tables tell."""
        start = cluster << self._bits
        return all(run.kind == _ZEROES for run in self._runs(start, start + self._cluster))

    def _write_new(self, plan: _Allocation, offset: int, length: int, views: list[memoryview]) -> None:
        """Write a piece to new clusters, with what surrounds it in the first and last of them; then point to them."""
        start, end = plan.cluster << self._bits, plan.cluster + plan.clusters << self._bits
        try:
            before = self._surroundings(start, offset, plan.blank[0], plan.host >= plan.fresh_from)
            last = plan.host + (plan.clusters - 1 << self._bits)
            after = self._surroundings(offset + length, end, plan.blank[1], last >= plan.fresh_from)
            self.file.write(plan.host + offset - start - len(before), [memoryview(before), *views, memoryview(after)])
            with self._lock:
                self._demand_writable()
                self._point(plan)
        except BaseException:
            with self._lock:
                if plan.taken:
                    for cluster in range(plan.clusters):
                        self._refcounts.release((plan.host >> self._bits) + cluster)
            raise
        finally:
            with self._lock:
                self._busy.difference_update(range(plan.cluster, plan.cluster + plan.clusters))
                self._idle.notify_all()

    def _surroundings(self, start: int, end: int, blank: bool, fresh: bool) -> bytes | bytearray:
        """What has to be written beside the data for [start, end) to stay as it is."""
        if start >= end or (blank and fresh):
            return b""
        if blank:
            return bytes(end - start)
        content = bytearray(end - start)
        there = min(end, self.size) - start
        if there > 0:
            self.read(start, [memoryview(content)[:there]])
        return content

    def _point(self, plan: _Allocation) -> None:
        """The tables name the new clusters."""
        table, replaced = self._mapping.writable(plan.cluster >> self._mapping.bits)
        if replaced:
            self._pending.append((replaced >> self._bits, 1))
        index = plan.cluster & self._mapping.per_table - 1
        for number in range(plan.clusters):
            if plan.taken:
                self._drop(table.entries[index + number])
            table.set(index + number, plan.host + (number << self._bits) | COPIED)

    def _drop(self, entry: int) -> None:
        """Nothing points to what this L2 entry named any more."""
        if entry & COMPRESSED:
            start, length = self._inflated.place(entry)
            first = start >> self._bits
            self._pending.append((first, (start + length - 1 >> self._bits) - first + 1))
        elif entry & OFFSET_MASK:
            self._pending.append((self._host(entry) >> self._bits, 1))

    # -- discarding and zeroing --------------------------------------------------------------------

    def punch(self, offset: int, length: int) -> None:
        """Free the clusters that lie wholly within."""
        if self.discard and length:
            self._clear(*self._whole(offset, offset + length), keep=False)

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """Make the range read as zeroes; with `unmap` it takes no space afterwards where whole clusters are concerned."""
        if not length:
            return
        end = offset + length
        first, last = self._whole(offset, end)
        if first >= last or (self._header.version < 3 and (self.backing is not None or not unmap)):
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, first << self._bits)
        self._clear(first, last, keep=not unmap)
        self._write_zeroes(last << self._bits, end)

    def _whole(self, offset: int, end: int) -> tuple[int, int]:
        """The clusters that lie wholly in [offset, end), the disk's last one also if it is only a part."""
        return -(-offset >> self._bits), (-(-end >> self._bits) if end >= self.size else end >> self._bits)

    def _write_zeroes(self, offset: int, end: int) -> None:
        zeroes = memoryview(_ZERO_BYTES)
        while offset < end:
            with self._lock:
                run = self._runs(offset, end)[0]
            length = min(run.length, len(zeroes))
            if run.kind != _ZEROES:
                self.write(offset, [zeroes[:length]])
            else:
                length = run.length
            offset += length

    def _clear(self, first: int, last: int, keep: bool) -> None:
        """Clusters [first, last) read as zeroes. `keep`: those that have a place keep it."""
        while first < last:
            index = first >> self._mapping.bits
            end = min(last, index + 1 << self._mapping.bits)
            with self._lock:
                while any(first <= cluster < end for cluster in self._busy):
                    self._idle.wait()
                self._demand_writable()
                if self._mapping.table(index) is not None or self.backing is not None:
                    self._clear_entries(index, first, end, keep)
            first = end
            if self._mapping.crowded or self._refcounts.crowded:
                self._write_out()

    def _clear_entries(self, index: int, first: int, end: int, keep: bool) -> None:
        zero = ZERO if self._header.version >= 3 else 0
        if not zero and self.backing is not None:
            return  # version 2 cannot say "zero": what is beneath would show
        table, replaced = self._mapping.writable(index)
        if replaced:
            self._pending.append((replaced >> self._bits, 1))
        beneath = self.backing is not None
        for position in range(first & self._mapping.per_table - 1, (end - 1 & self._mapping.per_table - 1) + 1):
            entry = table.entries[position]
            place = entry & OFFSET_MASK and not entry & COMPRESSED
            if keep and place and entry & COPIED:
                new = entry | zero
            elif entry or beneath:
                new = zero
            else:
                continue
            if new == entry:
                continue
            table.set(position, new)
            if not new & OFFSET_MASK:
                self._drop(entry)

    # -- flushing ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """What was written before is on the disk when this returns."""
        if self._active and not self.readonly:
            self._write_out()

    def _write_out(self) -> None:
        file, store = self.file, self._store
        with self._flushing:
            with self._lock:
                if store.corrupt:
                    raise OSError(errno.EIO, "the image is damaged")
                freed, self._pending = self._pending, []
                for offset, length in self._refcounts.replaced:
                    freed.append((offset >> self._bits, -(-length >> self._bits)))
                self._refcounts.replaced = []
                counts, tables = self._refcounts.collect(), self._mapping.collect()
            written = False
            try:
                for place, data in [*counts.blocks, *tables.fresh]:
                    store.write(place, data)
                if counts.table:
                    file.flush()
                    for place, data in counts.table:
                        store.write(place, data)
                if tables.current:
                    file.flush()
                    for place, data in tables.current:
                        store.write(place, data)
                file.flush()
                written = True
            finally:
                with self._lock:
                    self._refcounts.done(counts, written)
                    self._mapping.done(tables, written)
                    if not written:
                        self._pending = freed + self._pending
                    elif freed:
                        self._epoch += 1
                        self._freed.append((self._epoch, freed))
                        self._reap()

    # -- size --------------------------------------------------------------------------------------

    def resize(self, size: int) -> None:
        """The disk has `size` bytes from now on; new ones read as zeroes. OSError."""
        with self._lock:
            self._demand_writable()
            if self._header.nb_snapshots:
                raise OSError(errno.EOPNOTSUPP, "the image has internal snapshots")
            while self._busy:
                self._idle.wait()
        old = self.size
        if size < old:
            whole, end = -(-size >> self._bits), -(-old >> self._bits)
            self._write_zeroes(size, min(old, whole << self._bits))
            self._clear(whole, end, keep=False)
        else:
            self._grow_l1(size)
            self.size = size
            covered = max(-(-old // self._cluster) * self._cluster, self.backing.size if self.backing else 0)
            if min(size, covered) > old:
                self.zero(old, min(size, covered) - old, unmap=True)
        self.flush()
        self._store.write_number(headers.SIZE_AT, 8, size)
        self.file.flush()
        self.size = size
        self._header = self._store.header = replace(
            self._header, size=size, l1_size=len(self._mapping.l1), l1_table_offset=self._mapping.offset
        )

    def _grow_l1(self, size: int) -> None:
        """An L1 table that is long enough, in force."""
        needed = -(-size // (self._cluster << self._header.l2_bits))
        if 8 * needed > headers.MAX_L1_BYTES:
            raise OSError(errno.EFBIG, "too large for the image's clusters")
        if needed <= len(self._mapping.l1):
            return
        with self._lock:
            clusters = -(-8 * needed >> self._bits)
            first, _ = self._refcounts.allocate(clusters, exactly=True)
            self._store.claim(first << self._bits, 8 * needed, "L1 table")
        while not self._move_l1(first, clusters, needed):
            pass

    def _move_l1(self, first: int, clusters: int, needed: int) -> bool:
        """False if somebody has changed the table meanwhile."""
        self.flush()  # the old table is complete, and the new one's place is counted
        with self._flushing, self._lock:
            if self._mapping.l1_dirty:
                return False
            old, length = self._mapping.offset, len(self._mapping.l1)
            table = self._mapping.l1[:]
            table.extend([0] * (needed - length))
            self._store.write(first << self._bits, encode(table) + bytes((clusters << self._bits) - 8 * needed))
            self.file.flush()
            self._store.write(headers.L1_AT, needed.to_bytes(4, "big") + (first << self._bits).to_bytes(8, "big"))
            self.file.flush()
            self._mapping.move(first << self._bits, table)
            if length:
                self._pending.append((old >> self._bits, -(-8 * length >> self._bits)))
            return True

    def set_backing(self, name: str, format: str) -> None:
        """The header names another backing file, which is not opened. OSError."""
        header = replace(
            self._header, l1_size=len(self._mapping.l1), l1_table_offset=self._mapping.offset,
            refcount_table_offset=self._refcounts.offset,
            refcount_table_clusters=8 * len(self._refcounts.table) >> self._bits,
        ).with_backing(name, format)  # fmt: skip
        try:
            data = header.encode()
        except ValueError as error:
            raise OSError(errno.ENAMETOOLONG, str(error)) from error
        self.flush()
        with self._lock:
            self._demand_writable()
            self._store.write(0, data.ljust(min(self._cluster, _HEADER_PAGE), b"\0"))
            self._header = self._store.header = header
        self.file.flush()

    # -- for copies --------------------------------------------------------------------------------

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        """A byte per `unit` bytes of the disk: 1 where it may hold something else than zeroes; without `chain`, where it may
        differ from its backing file."""
        marks = bytearray(-(-self.size // unit))
        beneath = self.backing.with_data(unit) if self.backing is not None and chain else b""
        step = 1 << 30
        for start in range(0, self.size, step):
            offset = start
            with self._lock:
                runs = self._runs(start, min(self.size, start + step))
            for run in runs:
                first, end = offset // unit, (offset + run.length - 1) // unit + 1
                if run.kind in (_DATA, _PACKED) or (run.kind == _ZEROES and not chain and self.backing is not None):
                    marks[first:end] = b"\1" * (end - first)
                elif run.kind == _BACKING and chain:
                    for index in range(first, min(end, len(beneath))):
                        marks[index] |= beneath[index]
                offset += run.length
        return marks


def read_header(file: RawImage) -> Header:
    """The header of an open file. BackendError."""
    probe = bytearray(1 << headers.MAX_CLUSTER_BITS)
    length = min(file.end, len(probe))
    view = memoryview(probe)[:length]
    try:
        file.read(0, [view])
    except OSError as error:
        raise BackendError(f"disk image {file.path}: {error.strerror}") from error
    bits = int.from_bytes(view[20:24], "big") if length >= 24 else 0
    return headers.parse(file.path, bytes(view[: 1 << bits] if headers.MIN_CLUSTER_BITS <= bits <= 21 else view[:72]), file.end)


__all__ = ["CorruptImage", "Qcow2Image", "read_header"]
