"""The header of a qcow2 image: its fields, its extensions, and what is refused because nobody may trust an image file.

Parsing takes bytes and opens nothing. The specification is QEMU's docs/interop/qcow2; field names are its.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from qemu_user.backends.errors import BackendError

Demand = Callable[[bool, str], None]
MAGIC = b"QFI\xfb"
SECTOR = 512
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
"""Flags of L1 and L2 entries: the cluster's reference count is one; it is compressed; it reads as zeroes."""
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16
"""Incompatible features."""
LAZY_REFCOUNTS = 1
"""Compatible feature: reference counts may be behind in a dirty image."""
BITMAPS = 1
"""Autoclear feature: the bitmaps extension is up to date."""
END, BACKING_FORMAT, BITMAP_EXTENSION = 0, 0xE279_2ACA, 0x2385_2875
DEFLATE, ZSTD = 0, 1
MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES, MAX_BACKING_NAME = 32 << 20, 8 << 20, 1023
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
V2_LENGTH, V3_LENGTH = 72, 112
SIZE_AT, L1_AT, REFCOUNT_TABLE_AT, INCOMPATIBLE_AT, AUTOCLEAR_AT = 24, 36, 48, 72, 88
"""Offsets of fields that are written alone."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The fields, decoded; sizes and offsets in bytes."""

    version: int = 3
    backing_file: str = ""
    backing_format: str = ""
    cluster_bits: int = 16
    size: int
    l1_size: int
    """Entries."""
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression: int = DEFLATE
    extensions: tuple[tuple[int, bytes], ...] = field(default=())
    """Extensions but for the backing file's format, kept as they are."""

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def l2_bits(self) -> int:
        """Bits of the index into an L2 table."""
        return self.cluster_bits - 3

    @property
    def refcount_bits(self) -> int:
        """Bits of the index into a refcount block."""
        return self.cluster_bits + 3 - self.refcount_order

    def encode(self) -> bytes:
        """What stands at the beginning of the file, at most one cluster. ValueError if it does not fit."""
        extensions = b""
        if self.backing_format:
            extensions += _extension(BACKING_FORMAT, self.backing_format.encode())
        for kind, data in self.extensions:
            extensions += _extension(kind, data)
        extensions += _extension(END, b"")
        length = V2_LENGTH if self.version == 2 else V3_LENGTH
        name = self.backing_file.encode("utf-8", "surrogateescape")
        where = length + len(extensions) if name else 0
        head = _V2.pack(
            MAGIC, self.version, where, len(name), self.cluster_bits, self.size, 0, self.l1_size, self.l1_table_offset,
            self.refcount_table_offset, self.refcount_table_clusters, self.nb_snapshots, self.snapshots_offset,
        )  # fmt: skip
        if self.version >= 3:
            head += _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, V3_LENGTH)
            head += bytes([self.compression]) + bytes(7)
        whole = head + extensions + name
        if len(whole) > self.cluster_size or len(name) > MAX_BACKING_NAME:
            raise ValueError("the backing file's name is too long for the image's header")
        return whole

    def with_backing(self, name: str, format: str) -> Header:
        """The same header with another backing file."""
        return replace(self, backing_file=name, backing_format=format)


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)


def parse(path: str, data: bytes, file_size: int) -> Header:
    """The header of image `path` out of its first bytes (one cluster, or all there is). BackendError says what is wrong."""

    def demand(condition: bool, what: str) -> None:
        if not condition:
            raise BackendError(f"disk image {path}: {what}")

    demand(data[:4] == MAGIC, "is not a qcow2 image; if it is a raw one, say format=raw")
    demand(len(data) >= V2_LENGTH, "is cut off within the header")
    (
        _, version, backing_offset, backing_length, cluster_bits, size, crypt, l1_size, l1_offset,
        table_offset, table_clusters, snapshots, snapshots_offset,
    ) = _V2.unpack_from(data)  # fmt: skip
    demand(version in (2, 3), f"is qcow2 version {version}; versions 2 and 3 can be used")
    sensible = MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS
    demand(sensible, f"clusters of 2^{cluster_bits} bytes: damaged (512 bytes to 2 MiB)")
    demand(crypt == 0, "is encrypted, which is not supported")
    cluster = 1 << cluster_bits
    incompatible = compatible = autoclear = compression = 0
    order, length = 4, V2_LENGTH
    if version == 3:
        demand(len(data) >= V2_LENGTH + _V3.size, "is cut off within the header")
        incompatible, compatible, autoclear, order, length = _V3.unpack_from(data, V2_LENGTH)
        sensible = V2_LENGTH + _V3.size <= length <= min(cluster, len(data)) and length % 8 == 0
        demand(sensible, f"header of {length} bytes: damaged")
        compression = data[104] if length > 104 else DEFLATE
    _check_features(demand, incompatible, compression)
    demand(order <= 6, f"reference counts of 2^{order} bits: damaged (1 to 64 bits)")
    demand(size <= 1 << 62, f"a disk of {size} bytes: damaged")
    _check_table(demand, "L1 table", l1_offset, 8 * l1_size, MAX_L1_BYTES, cluster, file_size)
    needed = -(-size // (cluster << cluster_bits - 3))
    demand(l1_size >= needed, f"the L1 table has {l1_size} entries, a disk of {size} bytes needs {needed}: damaged")
    demand(table_clusters > 0, "there is no refcount table: damaged")
    _check_table(
        demand, "refcount table", table_offset, table_clusters * cluster, MAX_REFCOUNT_TABLE_BYTES, cluster, file_size
    )
    demand(not snapshots or (snapshots <= 65536 and snapshots_offset % cluster == 0), "the table of snapshots is damaged")
    demand(not snapshots or snapshots_offset < file_size, "the table of snapshots lies beyond the end: cut off")
    demand(backing_length <= MAX_BACKING_NAME, f"a backing file's name of {backing_length} bytes: damaged")
    end = backing_offset if backing_offset and backing_offset >= length else cluster
    kept, backing_format = _extensions(demand, data, length, min(end, len(data)))
    name = ""
    if backing_offset and backing_length:
        inside = backing_offset + backing_length <= min(cluster, len(data))
        demand(inside, "the backing file's name is outside the header: damaged")
        name = data[backing_offset : backing_offset + backing_length].decode("utf-8", "surrogateescape")
        demand("\0" not in name, "the backing file's name has a NUL in it: damaged")
    return Header(
        version=version, backing_file=name, backing_format=backing_format, cluster_bits=cluster_bits, size=size,
        l1_size=l1_size, l1_table_offset=l1_offset, refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters, nb_snapshots=snapshots, snapshots_offset=snapshots_offset,
        incompatible=incompatible, compatible=compatible, autoclear=autoclear, refcount_order=order,
        compression=compression, extensions=kept,
    )  # fmt: skip


def _check_features(demand: Demand, incompatible: int, compression: int) -> None:
    demand(not incompatible & DATA_FILE, "keeps its data in another file (data_file), which is not supported")
    demand(not incompatible & EXTENDED_L2, "has extended L2 entries (subclusters), which is not supported")
    unknown = incompatible & ~(DIRTY | CORRUPT | COMPRESSION)
    demand(not unknown, f"needs features that are not known here ({unknown:#x}): made by a newer program")
    demand(compression in (DEFLATE, ZSTD), f"compression of type {compression} is not known here")
    demand((compression != DEFLATE) == bool(incompatible & COMPRESSION), "the type of compression is contradictory: damaged")


def _check_table(demand: Demand, what: str, offset: int, length: int, most: int, cluster: int, file_size: int) -> None:
    demand(length <= most, f"the {what} has {length} bytes: damaged (at most {most})")
    demand(offset % cluster == 0 and (offset >= cluster or not length), f"the {what} is at {offset:#x}: damaged")
    demand(offset + length <= file_size, f"the {what} lies beyond the end of the file: cut off, or damaged")


def _extensions(demand: Demand, data: bytes, at: int, end: int) -> tuple[tuple[tuple[int, bytes], ...], str]:
    kept, backing_format = [], ""
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(data, at)
        at += _EXTENSION.size
        if kind == END:
            break
        demand(at + length <= end, "a header extension is longer than the header: damaged")
        content = data[at : at + length]
        if kind == BACKING_FORMAT:
            demand(length < 16, "the backing file's format has an absurd name: damaged")
            backing_format = content.decode("ascii", "replace")
        else:
            kept.append((kind, content))
        at += -(-length // 8) * 8
    return tuple(kept), backing_format
