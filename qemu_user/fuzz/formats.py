"""Files and streams that come from strangers, nearly right: each target makes one, damages it, and has our reader take it.

The damage is repaired where a checksum would hide what lies behind it. A reader may refuse with the errors that it documents
(the last column of TARGETS); anything else that is raised is a finding. Used by devices.py.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec

from protocol.codec.qmp import QmpReader
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.block.raw import BlockBackend
from qemu_user.backends.errors import BackendError
from qemu_user.config.machine_config import MachineConfig
from qemu_user.devices.device import encode_state
from qemu_user.images import deb
from qemu_user.images.errors import ImageError
from qemu_user.migration import sections, snapshot
from qemu_user.migration.machine_state import config_section
from qemu_user.migration.sections import Section

_MIB = 1 << 20
_EDGES = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 62), (1 << 63), (1 << 64) - 1)


def _damage(rng: Random, data: bytearray, most: int, start: int = 0, end: int = 0) -> None:
    """Numbers of 1 to 8 bytes, big- or little-endian, become edges; or bytes anything."""
    end = min(end or len(data), len(data))
    for _ in range(rng.randrange(1, most + 1)):
        size = rng.choice((1, 2, 4, 8))
        if end - start < size:
            return
        at = rng.randrange(start, end - size + 1)
        at -= at % size if rng.random() < 0.7 else 0
        flipped = int.from_bytes(data[at : at + size], "big") ^ 1 << rng.randrange(8 * size)
        value = rng.choice((*_EDGES, rng.getrandbits(64), flipped))
        data[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("big", "little")))


# -- disk images --------------------------------------------------------------------------------------------------------


def qcow2(rng: Random, directory: Path) -> None:
    """A small image with data in it, its header and tables damaged; then what a guest does to a disk."""
    path = directory / "image.qcow2"
    path.unlink(missing_ok=True)
    create_qcow2(path, _MIB)
    image = open_disk(str(path), "qcow2")
    for _ in range(rng.randrange(4)):
        image.write(512 * rng.randrange(1024), [memoryview(rng.randbytes(512 * rng.randrange(1, 64)))])
    image.close()
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5:
        _damage(rng, data, 3, 4, 104)
    else:
        _damage(rng, data, 6, 4, rng.choice((1 << 16, len(data))))
    path.write_bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
    os.truncate(path, rng.choice((len(data), path.stat().st_size)))
    disk = open_disk(str(path), "qcow2", readonly=rng.random() < 0.2)
    try:
        if disk.size > 1 << 50:
            return
        for _ in range(rng.randrange(1, 12)):
            _use(rng, disk)
    finally:
        disk.close()
    if path.stat().st_size > 1 << 32 and path.stat().st_blocks > 1 << 16:
        raise AssertionError("the file has grown without bounds")


def _use(rng: Random, disk: BlockBackend) -> None:
    size = disk.size
    length = min(size, 512 * rng.randrange(1, 200))
    offset = rng.randrange((size - length) // 512 + 1) * 512
    buffer = [memoryview(bytearray(rng.randbytes(8) * (length // 8)))]
    try:
        match rng.randrange(6):
            case 0 | 1:
                disk.read(offset, buffer)
            case 2:
                disk.write(offset, buffer)
            case 3:
                disk.punch(offset, length)
            case 4:
                disk.zero(offset, length, rng.random() < 0.5)
            case _:
                disk.flush()
    except OSError:
        pass  # what the guest gets as an I/O error


# -- migration streams and snapshots ------------------------------------------------------------------------------------


def stream(rng: Random, directory: Path) -> None:
    """A section of a migration stream with its body changed and its checksum right again."""
    whole = sections.encode(
        [Section(rng.choice(("vcpu/0", "x" * 40)), rng.getrandbits(16), rng.randbytes(rng.choice((0, 40, 3000))))]
    )
    head, body = whole[:16], bytearray(whole[20:-4])
    for _ in range(rng.randrange(1, 8)):
        body[rng.randrange(min(len(body), 64))] = rng.choice((0, 1, 0x7F, 0xFF, rng.getrandbits(8)))
    del body[rng.choice((len(body), rng.randrange(len(body) + 1))) :]
    sections.decode(head + struct.pack("<I", zlib.crc32(head)) + body + struct.pack("<I", zlib.crc32(body)))


def snapshot_folder(rng: Random, directory: Path) -> None:
    """A snapshot whose state says something else than it did, in the sections' own words; then it is opened and read."""
    folder = directory / "snapshot"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    memory = rng.randbytes(2000) + bytes(snapshot.CLUSTER - 2000) + bytes(_MIB - snapshot.CLUSTER)
    (folder / "memory").write_bytes(memory)
    sums = b"".join(
        struct.pack("<I", zlib.crc32(part) or 1) if any(part) else bytes(4)
        for part in (memory[at : at + snapshot.CLUSTER] for at in range(0, len(memory), snapshot.CLUSTER))
    )
    contents = snapshot.Contents(files={"memory": (_MIB, sums)})
    payloads = {
        "config": bytearray(config_section(MachineConfig(memory=_MIB)).payload),
        "contents": bytearray(encode_state(contents)),
    }
    damaged = rng.choice(list(payloads))
    _damage(rng, payloads[damaged], 4)
    parts = [Section(name, rng.choice((1, 1, 1, 0, 2)), bytes(payload)) for name, payload in payloads.items()]
    (folder / "state").write_bytes(sections.encode(parts))
    if rng.random() < 0.3:
        damage = bytearray(memory)
        _damage(rng, damage, 2, 0, 4096)
        (folder / "memory").write_bytes(damage)
    (folder / "meta.json").write_bytes(rng.choice((b"{}", b"{", b'{"name":1}', msgspec.json.encode({"name": "x" * 5}))))
    snapshot.listed(directory)
    opened = snapshot.Snapshot(folder)
    into = bytearray(opened.config.memory)
    opened.read("memory", memoryview(into))


# -- what else comes from outside ---------------------------------------------------------------------------------------


def qmp(rng: Random, directory: Path) -> None:
    """A QMP client's bytes: nearly JSON, nested, cut, of any size."""
    reader = QmpReader()
    piece = rng.choice((b'{"execute":"stop"}', b'{"a":' * rng.randrange(2000), b"[" * rng.randrange(5000), b'{"x":"\\ud800"}'))
    data = bytearray(piece * rng.randrange(1, 4))
    if data:
        _damage(rng, data, 6)
    for at in range(0, len(data), 997):
        for message in reader.feed(bytes(data[at : at + 997])):
            if not isinstance(message, (dict, ValueError)):
                raise AssertionError(f"QMP: {message!r}")


def package(rng: Random, directory: Path) -> None:
    """A Debian package with its ar headers and its tar damaged."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as made:
        entry = tarfile.TarInfo("./bin/busybox")
        entry.size = rng.randrange(2000)
        made.addfile(entry, io.BytesIO(bytes(entry.size)))
    data = bytearray(b"!<arch>\n")
    for name, content in ((b"debian-binary", b"2.0\n"), (b"data.tar", tar.getvalue())):
        size = rng.choice((len(content), len(content), -60, -1, 10**9))
        data += name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) * 2 + b"100644".ljust(8) + str(size).encode().ljust(10) + b"`\n"
        data += content
    _damage(rng, data, 5, 8, rng.choice((140, 800, len(data))))
    path = directory / "package.deb"
    path.write_bytes(data)
    for _ in deb.members(path):
        pass


Target = Callable[[Random, Path], None]

TARGETS: dict[str, tuple[Target, tuple[type[Exception], ...]]] = {
    "qcow2": (qcow2, (BackendError,)),
    "migration-stream": (stream, (sections.SectionError,)),
    "snapshot": (snapshot_folder, (snapshot.SnapshotError,)),
    "qmp": (qmp, ()),
    "deb": (package, (ImageError,)),
}
"""Name -> (makes, damages and reads one; how it may be refused)."""
