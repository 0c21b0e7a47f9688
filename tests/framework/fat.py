"""A FAT16 disk image with some files in its root directory: what UEFI firmware boots from."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

SECTOR, CLUSTER = 512, 2048
_RESERVED, _ROOT_ENTRIES = 4, 512
_ATTRIBUTE_ARCHIVE = 0x20


def write_fat16(path: Path, files: Mapping[str, bytes], clusters: int = 24_000) -> None:
    """Names as "NAME.EXT", upper case, 8 and 3 characters at most; each file in one run of clusters."""
    fat_sectors = -(-(clusters + 2) * 2 // SECTOR)
    total = _RESERVED + fat_sectors + _ROOT_ENTRIES * 32 // SECTOR + clusters * CLUSTER // SECTOR
    boot = struct.pack(
        "<3s8sHBHBHHBHHHIIBBBI11s8s", b"\xeb\x3c\x90", b"TEST    ", SECTOR, CLUSTER // SECTOR, _RESERVED, 1, _ROOT_ENTRIES,
        total if total < 65536 else 0, 0xF8, fat_sectors, 32, 2, 0, total if total >= 65536 else 0, 0x80, 0, 0x29, 1,
        b"NO NAME    ", b"FAT16   ",
    )  # fmt: skip
    table = [0xFFF8, 0xFFFF]
    root, data = b"", b""
    for name, content in files.items():
        stem, _, extension = name.partition(".")
        first, count = len(table), max(1, -(-len(content) // CLUSTER))
        table += [*range(first + 1, first + count), 0xFFFF]
        root += struct.pack("<8s3sB8xHHHHI", stem.ljust(8).encode(), extension.ljust(3).encode(), _ATTRIBUTE_ARCHIVE, 0, 0, 0,
                            first, len(content))  # fmt: skip
        data += content.ljust(count * CLUSTER, b"\0")
    assert len(table) <= clusters + 2
    with path.open("wb") as file:
        file.truncate(total * SECTOR)
        file.write(boot.ljust(510, b"\0") + b"\x55\xaa")
        file.seek(_RESERVED * SECTOR)
        file.write(struct.pack(f"<{len(table)}H", *table))
        file.seek((_RESERVED + fat_sectors) * SECTOR)
        file.write(root.ljust(_ROOT_ENTRIES * 32, b"\0") + data)
