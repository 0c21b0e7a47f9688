"""An NBD export as a disk. Connects again when the server has gone, and nothing is lost by that: what was written and not
flushed is kept here and written again, for a server that comes back need not know it any more.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable

from qemu_user.backends.block.nbd import wire
from qemu_user.backends.block.nbd.connection import Address, Connection, Lost
from qemu_user.backends.block.nbd.wire import ProtocolError
from qemu_user.backends.block.raw import SECTOR, unheard
from qemu_user.backends.block.views import Cutter
from qemu_user.backends.errors import BackendError

RECONNECT_SECONDS = 10.0
_KEPT_BYTES = 32 << 20
"""Of writes that are not flushed; then we flush."""
_ZEROES = bytes(1 << 20)
_MOST_ZEROES = 1 << 30
_LEAST_PAUSE, _MOST_PAUSE = 0.02, 1.0


class _Write:
    """A change that a server which comes back has to be told again."""

    __slots__ = ("data", "done", "flags", "kind", "length", "offset")

    def __init__(self, kind: int, offset: int, length: int, flags: int, data: bytes) -> None:
        self.kind, self.offset, self.length, self.flags, self.data = kind, offset, length, flags, data
        self.done = False


class NbdDisk:
    """A BlockBackend. `stable`: a write is on the server's disk when it returns (FUA)."""

    def __init__(
        self, uri: str, readonly: bool = False, discard: bool = True, stable: bool = False,
        reconnect: float = RECONNECT_SECONDS,
    ) -> None:  # fmt: skip
        """`reconnect`: seconds for which requests wait for a server that has gone. BackendError."""
        self.path = uri
        self._address = Address(uri)
        self.readonly, self._stable, self._reconnect = readonly, stable, reconnect
        self.report: Callable[[str, str], None] = unheard
        try:
            self._connection: Connection | None = Connection(self._address)
        except (OSError, ProtocolError) as error:
            raise BackendError(f"disk {uri}: {_reason(error)}") from error
        self._export = self._connection.export
        self._flags = self._export.flags
        if self._flags & wire.READ_ONLY and not readonly:
            self._connection.close()
            raise BackendError(f"disk {uri}: the server allows reading only; use readonly=on")
        self.size = self._export.size // SECTOR * SECTOR
        self.discard = discard and not readonly and bool(self._flags & wire.SEND_TRIM)
        self._lock = threading.Lock()
        self._kept: list[_Write] = []
        self._kept_bytes = 0
        self._closed = False

    @property
    def descriptor(self) -> int | None:
        return None

    # -- the connection ----------------------------------------------------------------------------

    def _connected(self) -> Connection:
        """A connection that works as far as is known, with everything told again if it is a new one. OSError."""
        with self._lock:
            connection = self._connection
            if connection is not None and not connection.why:
                return connection
            if self._closed:
                raise OSError(errno.EIO, "the disk is closed")
            if connection is not None:
                self.report("BLOCK_CONNECTION_LOST", f"{self.path}: {connection.why}; trying to connect again")
                connection.close()
                self._connection = None
            self._connection = self._again()
            self.report("BLOCK_CONNECTION_RESTORED", f"{self.path}: connected again")
            return self._connection

    def _again(self) -> Connection:
        end, pause = time.monotonic() + self._reconnect, _LEAST_PAUSE
        while True:
            why = ""
            try:
                connection = Connection(self._address)
                if connection.export == self._export:
                    for write in self._kept:
                        data = [memoryview(write.data)] if write.data else None
                        connection.request(write.kind, write.offset, write.length, write.flags, data)
                    return connection
                why = "the disk is another one now"
                connection.close()
            except (OSError, ProtocolError, Lost) as error:
                why = _reason(error)
            if time.monotonic() + pause > end or self._closed:
                raise OSError(errno.EIO, f"the NBD server is gone: {why}")
            time.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE)

    def _do(
        self, kind: int, offset: int, length: int, flags: int = 0,
        data: list[memoryview] | None = None, into: list[memoryview] | None = None,
        extents: list[tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        while True:
            if extents is not None:
                extents.clear()
            try:
                self._connected().request(kind, offset, length, flags, data, into, extents)
                return
            except Lost:
                continue

    def _change(self, kind: int, offset: int, length: int, flags: int, data: list[memoryview] | None = None) -> None:
        """A request that changes the disk, remembered until it is flushed."""
        fua = wire.FUA if self._stable and self._flags & wire.SEND_FUA else 0
        write = _Write(kind, offset, length, flags, b"".join(data) if data else b"")
        if self._flags & wire.SEND_FLUSH and not fua:
            with self._lock:
                self._kept.append(write)
                self._kept_bytes += len(write.data)
        try:
            self._do(kind, offset, length, flags | fua, data)
            write.done = True
        except OSError:
            with self._lock:
                if write in self._kept:
                    self._kept.remove(write)
                    self._kept_bytes -= len(write.data)
            raise
        if self._kept_bytes > _KEPT_BYTES or len(self._kept) > 4096 or (self._stable and not fua):
            self.flush()

    # -- the disk ----------------------------------------------------------------------------------

    @property
    def waits(self) -> bool:
        return True

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        return False

    def read(self, offset: int, views: list[memoryview]) -> None:
        cutter, left = Cutter(views), sum(map(len, views))
        while left:
            part = min(left, self._export.most)
            self._do(wire.READ, offset, part, into=cutter.next(part))
            offset, left = offset + part, left - part

    def _demand_writable(self) -> None:
        if self.readonly:
            raise OSError(errno.EROFS, "the disk is open for reading only")

    def write(self, offset: int, views: list[memoryview]) -> None:
        self._demand_writable()
        cutter, left = Cutter(views), sum(map(len, views))
        while left:
            part = min(left, self._export.most)
            self._change(wire.WRITE, offset, part, 0, cutter.next(part))
            offset, left = offset + part, left - part

    def flush(self) -> None:
        if self.readonly or not self._flags & wire.SEND_FLUSH:
            return
        with self._lock:
            stable = {id(write) for write in self._kept if write.done}
        self._do(wire.FLUSH, 0, 0)
        with self._lock:
            self._kept = [write for write in self._kept if id(write) not in stable]
            self._kept_bytes = sum(len(write.data) for write in self._kept)

    def punch(self, offset: int, length: int) -> None:
        if not self.discard:
            return
        while length:
            part = min(length, _MOST_ZEROES)
            self._change(wire.TRIM, offset, part, 0)
            offset, length = offset + part, length - part

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        self._demand_writable()
        short = self._flags & wire.SEND_WRITE_ZEROES
        while length:
            part = min(length, _MOST_ZEROES if short else len(_ZEROES))
            if short:
                self._change(wire.WRITE_ZEROES, offset, part, 0 if unmap else wire.NO_HOLE)
            else:
                self._change(wire.WRITE, offset, part, 0, [memoryview(_ZEROES)[:part]])
            offset, length = offset + part, length - part

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        """A byte per `unit` bytes: 0 where the server says that they read as zeroes; where it says nothing, 1."""
        marks = bytearray(-(-self.size // unit))
        offset = 0
        while offset < self.size:
            extents: list[tuple[int, int]] = []
            if self._export.status:
                try:
                    self._do(wire.BLOCK_STATUS, offset, min(self.size - offset, _MOST_ZEROES), extents=extents)
                except OSError:
                    extents = []
            for length, flags in extents or [(0, 0)]:
                end = min(offset + (length or self.size), self.size)
                if not length or not flags & wire.READS_ZERO:
                    first, last = offset // unit, -(-end // unit)
                    marks[first:last] = b"\1" * (last - first)
                offset = end
        return marks

    def lock(self) -> None:
        """Who may write is the server's business."""

    def unlock(self) -> None:
        self.flush()

    def hand_out(self) -> None:
        pass  # all of it is the server's

    def locks(self) -> list[int]:
        return []

    def adopt_locks(self, take: Callable[[], int]) -> None:
        pass

    def resize(self, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "an NBD export has the size that it has")

    def close(self) -> None:
        """Flush, and take leave. Idempotent."""
        if self._closed:
            return
        connection = self._connection
        try:
            if connection is not None and not connection.why:
                self.flush()
        except OSError:
            pass
        self._closed = True
        if self._connection is not None:
            self._connection.close()


def _reason(error: Exception) -> str:
    if isinstance(error, ProtocolError):
        return f"the NBD server {error}"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
