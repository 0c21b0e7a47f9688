"""The block device (virtio 1.2, section 5.2): read, write, flush, discard, write zeroes, identify; several queues.

Data moves between the disk and guest memory by preadv and pwritev on the guest's own pages, with no copy
here. A request that cannot be done answers IOERR or UNSUPP in its status byte; one without room for that byte
breaks the device. What the page cache can do is done on the I/O thread; requests that have to wait for a disk or a network
go to workers, and overlap. They end in any order: a driver that cares waits, or flushes what has been answered.
"""

from __future__ import annotations

import struct
import threading
from functools import partial
from typing import Any, Literal, NamedTuple

from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.workers import Workers
from qemu_user.devices.device import require
from qemu_user.devices.virtio.device import VirtioDevice, VirtioState
from qemu_user.devices.virtio.queue import Chain, Queue, QueueError, split

F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY = 1 << 2, 1 << 5, 1 << 6, 1 << 9, 1 << 10
F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = 1 << 11, 1 << 12, 1 << 13, 1 << 14
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
QUEUE_SIZE = 256
MAX_RANGE_SECTORS = 1 << 22
"""Sectors of one discard or write-zeroes segment (2 GiB)."""
MAX_RANGES = 32
ID_BYTES = 20
UNMAP = 1
WRITEBACK_OFFSET = 32
"""Of the one writable byte of the configuration space."""
_COUNTERS = {IN: "reads", OUT: "writes", FLUSH: "flushes", DISCARD: "discards", WRITE_ZEROES: "zeroes"}
_HEADER = struct.Struct("<I4xQ")
_RANGE = struct.Struct("<QII")


class BlkState(VirtioState, frozen=True, tag="blk", kw_only=True):
    """The size is kept to refuse a disk of another size."""

    version: Literal[1] = 1
    capacity: int
    writeback: bool


class Request(NamedTuple):
    """One of the driver's; `length`: bytes that it reads or writes."""

    chain: Chain
    kind: int
    sector: int
    length: int
    status: memoryview


class VirtioBlk(VirtioDevice):
    """One disk. `block` and `physical_block`: bytes, powers of two from 512 on, what the guest is told of the disk."""

    device_id = 2
    pci_class = 0x010000
    own_thread = True
    State = BlkState

    def __init__(
        self,
        name: str,
        disk: BlockBackend,
        serial: str = "",
        queues: int = 1,
        queue_size: int = QUEUE_SIZE,
        block: int = SECTOR,
        physical_block: int = 4096,
    ) -> None:
        features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE
        if queues > 1:
            features |= F_MQ
        if disk.readonly:
            features |= F_RO
        else:
            features |= F_WRITE_ZEROES | (F_DISCARD if disk.discard else 0)
        super().__init__(name, features, [queue_size] * queues)
        self._disk, self._serial = disk, serial.encode()[:ID_BYTES]
        self._sectors = disk.size // SECTOR
        self._block, self._exponent = block, (max(physical_block, block) // block).bit_length() - 1
        self._writeback = True
        self.workers: Workers | None = None
        """Who waits for the disk; machine/build.py sets it. Without them everything is done where it is asked for."""
        self._under_way = 0
        self._ended = threading.Condition()
        self._lives = [0] * queues
        """Counts each queue's resets: what began before one is not answered after it."""

    def config(self) -> bytes:
        block_sectors = self._block // SECTOR
        return struct.pack(
            "<QIIHBBIBBHIBBHIIIIIB3x",
            self._sectors,
            0,  # size_max: not offered
            self.queues[0].max_size - 2,  # seg_max: the chain without header and status
            0,  # geometry: not offered
            0,
            0,
            self._block,
            self._exponent,  # topology: a physical block is 2^exponent logical ones
            0,
            1,
            0,
            int(self._writeback),
            0,
            len(self.queues),
            MAX_RANGE_SECTORS,
            MAX_RANGES,
            max(8, block_sectors),  # discard_sector_alignment
            MAX_RANGE_SECTORS,
            MAX_RANGES,
            1,  # write_zeroes_may_unmap
        )

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == WRITEBACK_OFFSET and len(data) == 1 and self.negotiated & F_CONFIG_WCE:
            self._writeback = bool(data[0])
        else:
            super().write_config(offset, data)

    def activate(self) -> None:
        # 5.2.5.1: with CONFIG_WCE the cache starts as it is; without FLUSH nothing may stay in a cache.
        self._writeback = bool(self.negotiated & F_FLUSH) if not self.negotiated & F_CONFIG_WCE else self._writeback

    def resize(self, size: int) -> None:
        """The disk has `size` bytes from now on, and the driver is told. OSError: the image cannot."""
        with self.transport.lock:
            self._disk.resize(size)
            self._sectors = self._disk.size // SECTOR
            self.transport.notify_config()

    def on_queue(self, index: int) -> None:
        queue = self.queues[index]
        queue.suppress_kicks()
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            request = self._parse(chain)
            outcome = self._attempt(request, alone=not queue.has_requests)
            if outcome is not None:
                self._answer(queue, request, *outcome)
            else:
                self._hand_over(queue, request)
        if queue.allow_kicks():
            self.transport.serve_later(index)
        self.transport.notify_used(queue)

    @staticmethod
    def _parse(chain: Chain) -> Request:
        kind, sector = _HEADER.unpack(chain.take(_HEADER.size))
        writable = chain.writable
        if not writable:
            raise QueueError("virtio-blk: a request without a status byte")
        if len(writable[-1]) == 1:  # as drivers do it
            status = writable.pop()
        else:
            chain.writable, [status] = split(writable, chain.writable_bytes - 1)
        return Request(chain, kind, sector, chain.writable_bytes if kind == IN else chain.readable_bytes, status)

    def _attempt(self, request: Request, alone: bool) -> tuple[int, int] | None:
        """(status, bytes written into the driver's buffers) of a request that need not wait; None of others. `alone`: none
        waits behind it.
        """
        kind = request.kind
        if self.workers is None or kind == GET_ID:
            return self._perform(request)
        if kind == IN and self._inside(request.sector, request.length):
            try:
                now = self._disk.read_now(request.sector * SECTOR, request.chain.writable)
            except OSError:
                return IOERR, 0
            if now:
                return OK, request.length
            return self._perform(request) if now is None and alone else None
        if kind == OUT and (self._disk.waits or not self._writeback):
            return None
        return self._perform(request) if kind not in (FLUSH, DISCARD, WRITE_ZEROES) else None

    def _perform(self, request: Request) -> tuple[int, int]:
        """Any thread."""
        kind, chain = request.kind, request.chain
        try:
            if kind == IN:
                return self._read(request)
            if kind == OUT:
                return self._write(request), 0
            if kind == FLUSH:
                self._disk.flush()
                return OK, 0
            if kind == GET_ID:
                return OK, chain.fill(self._serial.ljust(ID_BYTES, b"\0"))
            if kind in (DISCARD, WRITE_ZEROES):
                return self._ranges(request), 0
        except OSError:
            return IOERR, 0
        return UNSUPP, 0

    def _answer(self, queue: Queue, request: Request, status: int, written: int) -> None:
        """Under the transport's lock."""
        request.status[0] = status
        count = self.counters.count
        if status != OK:
            count("errors" if status == IOERR else "unsupported")
        elif name := _COUNTERS.get(request.kind):
            count(name)
            if request.kind in (IN, OUT):
                count("bytes_read" if request.kind == IN else "bytes_written", request.length)
        # The status byte is the last one: with less data than room, the bytes between are not written.
        queue.push(request.chain, written + 1)

    # -- requests that wait ------------------------------------------------------------------------

    def _hand_over(self, queue: Queue, request: Request) -> None:
        assert self.workers is not None
        with self._ended:
            self._under_way += 1
        self.workers.submit(partial(self._work, queue, request, self._lives[queue.index]))

    def _work(self, queue: Queue, request: Request, life: int) -> None:
        """A worker's thread."""
        try:
            status, written = self._perform(request)
        finally:
            with self._ended:
                self._under_way -= 1
                self._ended.notify_all()

        def answer() -> None:
            if life == self._lives[queue.index]:
                self._answer(queue, request, status, written)
                self.transport.notify_used(queue)

        self.transport.run(answer)

    def _await_workers(self) -> None:
        """Nothing that was begun before touches the driver's memory any more. The transport's lock may be held."""
        with self._ended:
            self._ended.wait_for(lambda: not self._under_way)

    def queue_reset(self, index: int) -> None:
        self._await_workers()
        self._lives[index] += 1

    def _inside(self, sector: int, length: int) -> bool:
        return length % SECTOR == 0 and sector + length // SECTOR <= self._sectors

    def _read(self, request: Request) -> tuple[int, int]:
        if not self._inside(request.sector, request.length):
            return IOERR, 0
        self._disk.read(request.sector * SECTOR, request.chain.writable)
        return OK, request.length

    def _write(self, request: Request) -> int:
        if self._disk.readonly or not self._inside(request.sector, request.length):
            return IOERR
        self._disk.write(request.sector * SECTOR, request.chain.readable)
        self._settle()
        return OK

    def _ranges(self, request: Request) -> int:
        kind, chain, length = request.kind, request.chain, request.length
        offered = F_DISCARD if kind == DISCARD else F_WRITE_ZEROES
        if not self.features & offered:
            return UNSUPP
        if not length or length % _RANGE.size or length > MAX_RANGES * _RANGE.size:
            return IOERR
        ranges = list(_RANGE.iter_unpack(chain.take(length)))
        for sector, count, flags in ranges:
            if flags & ~UNMAP or (kind == DISCARD and flags):
                return UNSUPP  # 5.2.6.2: unknown flags, or unmap on a discard
            if count > MAX_RANGE_SECTORS or not self._inside(sector, count * SECTOR):
                return IOERR
        for sector, count, flags in ranges:
            if kind == DISCARD:
                self._disk.punch(sector * SECTOR, count * SECTOR)
            else:
                self._disk.zero(sector * SECTOR, count * SECTOR, unmap=bool(flags & UNMAP))
        self._settle()
        return OK

    def _settle(self) -> None:
        # A driver that cannot flush, or that switched the cache off, expects completed writes to be stable (5.2.6.2).
        if not self._writeback:
            self._disk.flush()

    def save(self) -> Any:
        return BlkState(capacity=self._sectors, writeback=self._writeback)

    def check(self, state: Any) -> None:
        require(
            state.capacity == self._sectors,
            f"{self.name}: saved with a disk of {state.capacity} sectors, this one has {self._sectors}",
        )

    def restore(self, state: Any) -> None:
        self._writeback = state.writeback

    def reset(self) -> None:
        self._await_workers()
        self._lives = [life + 1 for life in self._lives]
        self._writeback = True
