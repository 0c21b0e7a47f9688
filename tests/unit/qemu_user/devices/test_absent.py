"""Memory that comes when it is touched: as much of it as was asked for, once, and never over what the guest has written."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from protocol.channel.shared_memory import PAGE, Mapping
from qemu_user.devices.absent import AbsentPages, PageLost
from qemu_user.migration import increments
from qemu_user.migration.left_memory import LeftSnapshot, SnapshotMemory, decoded, snapshot_memory
from qemu_user.migration.snapshot import CLUSTER, Clusters

SIZE = 4 * CLUSTER
PAGES = CLUSTER // PAGE


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Clusters]:
    """A file whose second cluster is a hole; each page elsewhere begins with its number + 1."""
    content = b"".join(bytes([page + 1]) * PAGE for page in range(SIZE // PAGE))
    content = content[:CLUSTER] + bytes(CLUSTER) + content[2 * CLUSTER :]
    (tmp_path / "memory").write_bytes(content)
    sums = array("I", (zlib.crc32(content[at : at + CLUSTER]) for at in range(0, SIZE, CLUSTER)))
    sums[1] = 0
    clusters = Clusters(tmp_path / "memory", SIZE, sums.tobytes())
    yield clusters
    clusters.close()


def pages_of(memory: bytearray) -> list[int]:
    return list(memory[::PAGE])


def bits_of(absent: AbsentPages) -> list[int]:
    view = Mapping([(absent.fd, 0, absent.bitmap_size)]).view
    return [page for page in range(SIZE // PAGE) if view[page // 8] >> page % 8 & 1]


@pytest.mark.parametrize("piece", [PAGE, 4 * PAGE, 8 * PAGE, CLUSTER])
def test_what_is_touched_comes_and_no_more(saved: Clusters, piece: int) -> None:
    memory = bytearray(SIZE)
    absent = AbsentPages(memoryview(memory), saved, list(saved.offsets()), piece)
    before = bits_of(absent)
    assert before == [*range(PAGES), *range(2 * PAGES, 4 * PAGES)]
    touched = 2 * PAGES + 5
    absent.ensure(touched * PAGE + 100, 8)
    first = touched * PAGE // piece * piece // PAGE
    came = set(range(first, first + piece // PAGE))
    assert pages_of(memory) == [page + 1 if page in came else 0 for page in range(SIZE // PAGE)]
    assert bits_of(absent) == [page for page in before if page not in came]
    absent.ensure(CLUSTER - 1, 2)  # over the end of a cluster, into what was there from the start
    assert memory[CLUSTER - 1] == PAGES
    assert memory[CLUSTER] == 0


@pytest.mark.parametrize("piece", [PAGE, CLUSTER])
def test_the_rest_leaves_what_has_come_alone(saved: Clusters, piece: int) -> None:
    memory = bytearray(SIZE)
    absent = AbsentPages(memoryview(memory), saved, list(saved.offsets()), piece)
    absent.ensure(0, 1)
    memory[0] = 99  # the guest's
    absent.ensure(PAGE - 1, 1)
    assert absent.fill()
    assert bits_of(absent) == []
    assert pages_of(memory) == [99, *range(2, PAGES + 1), *[0] * PAGES, *range(2 * PAGES + 1, 4 * PAGES + 1)]


def test_a_page_of_a_damaged_cluster_is_not_had(saved: Clusters) -> None:
    with saved.path.open("r+b") as file:
        file.seek(3 * CLUSTER + 7 * PAGE)
        file.write(b"x")
    memory = bytearray(SIZE)
    absent = AbsentPages(memoryview(memory), saved, list(saved.offsets()), PAGE)
    absent.ensure(2 * CLUSTER, 1)
    for _ in range(2):
        with pytest.raises(PageLost, match="damaged"):
            absent.ensure(3 * CLUSTER, 1)
    assert memory[3 * CLUSTER] == 0


@pytest.mark.parametrize("piece", [PAGE, CLUSTER])
def test_another_process_goes_on_where_one_died(saved: Clusters, piece: int) -> None:
    """With the bitmap and the source that were left, the file's name being gone; the guest's writes stay."""
    memory = bytearray(SIZE)
    first = AbsentPages(memoryview(memory), SnapshotMemory(saved), list(saved.offsets()), piece)
    first.ensure(2 * CLUSTER + PAGE, 1)
    memory[2 * CLUSTER + PAGE] = 0xEE
    data, fds = first.source.left()
    Path(saved.path).unlink()
    left = decoded(data)
    assert isinstance(left, LeftSnapshot)
    source = snapshot_memory(left, [os.dup(fd) for fd in fds])
    with pytest.raises(ValueError, match="other memory"):
        AbsentPages(memoryview(bytearray(64 * SIZE << 4)), source, None, first.piece, os.dup(first.fd))
    second = AbsentPages(memoryview(memory), source, None, first.piece, os.dup(first.fd))
    assert bits_of(second) == bits_of(first)
    assert second.fill()
    second.close()
    expected = [0 if page // PAGES == 1 else page + 1 for page in range(SIZE // PAGE)]
    expected[2 * PAGES + 1] = 0xEE
    assert pages_of(memory) == expected
    assert bits_of(first) == []


def test_what_was_left_is_checked(saved: Clusters) -> None:
    data, fds = SnapshotMemory(saved).left()
    left = decoded(data)
    assert isinstance(left, LeftSnapshot)
    (file,) = left.files
    bitmap = msgspec.structs.replace(file, inherited=bytes(increments.bitmap_size(SIZE) + 1))
    for files in ([], [bitmap, file], [msgspec.structs.replace(file, size=SIZE + 1)], [msgspec.structs.replace(file, sums=b"")],
                  [msgspec.structs.replace(file, inherited=b"\1")], [file, file]):  # fmt: skip
        given = [os.dup(fds[0]) for _ in files] or [os.dup(fds[0])]
        with pytest.raises(ValueError, match="left"):
            snapshot_memory(LeftSnapshot(files), given)
        for fd in given:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
    with pytest.raises(ValueError, match="truncated"):
        decoded(data[:-1])
