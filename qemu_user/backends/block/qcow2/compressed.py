"""Compressed clusters: finding and inflating them. A few are kept, for guests read in smaller pieces than clusters."""

from __future__ import annotations

import errno
import threading
import zlib
from collections import OrderedDict

from qemu_user.backends.block.qcow2.header import SECTOR, ZSTD
from qemu_user.backends.block.qcow2.store import Store

try:
    import zstandard

    _ERRORS: tuple[type[Exception], ...] = (zlib.error, zstandard.ZstdError)
    HAVE_ZSTD = True
except ImportError:
    _ERRORS, HAVE_ZSTD = (zlib.error,), False

_KEPT_BYTES = 2 << 20


class Inflated:
    """The compressed clusters of one image. Any thread."""

    def __init__(self, store: Store) -> None:
        """OSError if this kind of compression cannot be read here."""
        self._store = store
        bits = store.header.cluster_bits
        self._shift = 62 - (bits - 8)
        self._zstd = store.header.compression == ZSTD
        if self._zstd and not HAVE_ZSTD:
            raise OSError(errno.EOPNOTSUPP, "its clusters are compressed by zstd: pip install softkvm[zstd]")
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._room = max(1, _KEPT_BYTES >> bits)
        self._lock = threading.Lock()

    def place(self, entry: int) -> tuple[int, int]:
        """Offset in the file and length of what an L2 entry names; at most the sectors that it counts. CorruptImage."""
        offset = entry & (1 << self._shift) - 1
        sectors = (entry >> self._shift & (1 << 62 - self._shift) - 1) + 1
        length = sectors * SECTOR - (offset & SECTOR - 1)
        if not offset or offset >> self._store.bits >= self._store.high:
            raise self._store.damaged(f"a compressed cluster at {offset:#x}")
        return offset, length

    def cluster(self, entry: int) -> bytes:
        """The content. OSError(EIO) when it is damaged."""
        with self._lock:
            found = self._kept.get(entry)
            if found is not None:
                self._kept.move_to_end(entry)
                return found
        offset, length = self.place(entry)
        packed = bytearray(min(length, self._store.file.end - offset))
        self._store.file.read(offset, [memoryview(packed)])
        content = self._inflate(bytes(packed), self._store.cluster)
        if len(content) != self._store.cluster:
            raise OSError(errno.EIO, "a compressed cluster is damaged")
        with self._lock:
            self._kept[entry] = content
            while len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return content

    def _inflate(self, packed: bytes, length: int) -> bytes:
        try:
            if self._zstd:
                with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
                    return bytes(reader.read(length))
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, length)
        except _ERRORS as error:
            raise OSError(errno.EIO, "a compressed cluster is damaged") from error
