"""Making new qcow2 images: empty ones, and overlays over another image."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

from qemu_user.backends.block.qcow2 import header as headers
from qemu_user.backends.block.qcow2.header import Header
from qemu_user.backends.block.qcow2.refcounts import encode_counters
from qemu_user.backends.block.qcow2.store import encode
from qemu_user.backends.errors import BackendError


def create_qcow2(
    path: str | os.PathLike[str],
    size: int,
    backing: str = "",
    backing_format: str = "",
    cluster_bits: int = 16,
    refcount_order: int = 4,
    version: int = 3,
    replace: bool = False,
) -> None:
    """A new image of `size` bytes (a multiple of 512) at `path`, which appears whole or not at all. `backing` is stored as
    it is: relative names are relative to the image's folder. `replace`: over a file that is there. BackendError.
    """
    path = os.fspath(path)
    _check(path, size, cluster_bits, refcount_order, version)
    content = _metadata(path, size, backing, backing_format, cluster_bits, refcount_order, version)
    try:
        with _appearing(path, replace) as fd:
            for offset, data in content:
                os.pwrite(fd, data, offset)
            cluster = 1 << cluster_bits
            os.ftruncate(fd, max(-(-(offset + len(data)) // cluster) * cluster for offset, data in content))
    except FileExistsError as error:
        raise BackendError(f"disk image {path}: there is one already") from error
    except OSError as error:
        raise BackendError(f"disk image {path}: cannot be made: {error.strerror}") from error


def _check(path: str, size: int, cluster_bits: int, order: int, version: int) -> None:
    def demand(condition: bool, what: str) -> None:
        if not condition:
            raise BackendError(f"disk image {path}: {what}")

    demand(size > 0 and size % headers.SECTOR == 0, f"a size of {size} bytes: has to be a multiple of 512")
    demand(headers.MIN_CLUSTER_BITS <= cluster_bits <= headers.MAX_CLUSTER_BITS, "clusters are of 512 bytes to 2 MiB")
    demand(0 <= order <= 6 and (version == 3 or order == 4), "reference counts have 1 to 64 bits; in version 2, 16")
    entries = -(-size // (1 << 2 * cluster_bits - 3))
    demand(8 * entries <= headers.MAX_L1_BYTES, f"{size} bytes are too large for clusters of {1 << cluster_bits} bytes")


def _metadata(
    path: str, size: int, backing: str, backing_format: str, bits: int, order: int, version: int
) -> list[tuple[int, bytes]]:
    """(offset, content) of header, refcount table, refcount blocks and L1 table, in this order in the file."""
    cluster = 1 << bits
    l1_size = -(-size // (1 << 2 * bits - 3))
    l1_clusters = -(-8 * l1_size // cluster)
    per_block = 1 << bits + 3 - order
    blocks = table_clusters = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters
        needed = -(-total // per_block), -(-8 * blocks // cluster)
        if needed <= (blocks, table_clusters):
            break
        blocks, table_clusters = max(blocks, needed[0]), max(table_clusters, needed[1])
    first_block = 1 + table_clusters
    l1_at = first_block + blocks
    try:
        head = Header(
            version=version, backing_file=backing, backing_format=backing_format, cluster_bits=bits, size=size,
            l1_size=l1_size, l1_table_offset=l1_at << bits, refcount_table_offset=1 << bits,
            refcount_table_clusters=table_clusters, refcount_order=order,
        ).encode()  # fmt: skip
    except ValueError as error:
        raise BackendError(f"disk image {path}: {error}") from error
    table = array("Q", [first_block + block << bits for block in range(blocks)])
    code = {3: "B", 4: "H", 5: "I", 6: "Q"}.get(order, "B")
    counters = array(code, [1] * total + [0] * (blocks * per_block - total))
    return [
        (0, head), (1 << bits, encode(table)), (first_block << bits, encode_counters(counters, order)),
        (l1_at << bits, bytes(l1_clusters << bits)),
    ]  # fmt: skip


@contextmanager
def _appearing(path: str, replace: bool) -> Iterator[int]:
    """A descriptor of a new file, which is at `path` when the block ends, and nowhere if it fails. OSError."""
    if not replace and os.path.lexists(path):
        raise FileExistsError(path)
    fd, new = tempfile.mkstemp(prefix=".new-", dir=os.path.dirname(path) or ".")
    try:
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(fd, 0o666 & ~mask)
        yield fd
        os.fsync(fd)
        if replace:
            os.rename(new, path)
        else:
            os.link(new, path)
            os.unlink(new)
    except BaseException:
        if os.path.exists(new):
            os.unlink(new)
        raise
    finally:
        os.close(fd)
