"""Records in shared memory: replaced as a whole, bounded, found again by who maps them."""

from __future__ import annotations

import os

import pytest

from protocol.channel.shared_memory import create_memfd
from qemu_user.machine.records import RecordError, Records


def test_replaced_and_found_by_another_mapping() -> None:
    records = Records.make({"uart": 4096, "blk": 100}, {"blk/0": 264})
    other = Records(records.fd, os.fstat(records.fd).st_size)
    assert other.read("uart") == b""
    for number in range(5):
        records.write("uart", b"state %d" % number)
        assert other.read("uart") == b"state %d" % number
    records.write("blk", b"x" * 4000)
    assert (other.read("blk"), other.read("uart")) == (b"x" * 4000, b"state 4")
    records.area("blk/0")[3] = 7
    assert other.area("blk/0")[3] == 7
    assert len(other.area("blk/0")) == 264


def test_what_is_too_long_leaves_the_old_one() -> None:
    records = Records.make({"uart": 4096}, {})
    records.write("uart", b"old")
    with pytest.raises(RecordError, match="there is room for 4092"):
        records.write("uart", bytes(4093))
    assert records.read("uart") == b"old"


def test_a_half_written_one_does_not_count() -> None:
    records = Records.make({"uart": 4096}, {})
    records.write("uart", b"old")
    at, capacity = records._directory.records["uart"]
    buffer = at + 4096 + (2 & 1) * capacity  # the one that the next write fills
    records._view[buffer : buffer + 7] = b"\3\0\0\0new"
    assert records.read("uart") == b"old"


def test_strange_memory_is_refused() -> None:
    fd = create_memfd("x", 1 << 17)
    os.pwrite(fd, b"\xff\0\0\0garbage", 0)
    with pytest.raises(RecordError):
        Records(fd, 1 << 17)
    records = Records.make({"uart": 4096}, {})
    with pytest.raises(RecordError):
        records.read("blk")
    with pytest.raises(RecordError):
        records.area("blk/0")
