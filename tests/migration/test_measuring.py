"""`softkvm bench migration`: what it measures with."""

from __future__ import annotations

import struct
import time

import pytest

from qemu_user.bench.migration import Place

_BLOCK, _OTHER = 4096, 5


@pytest.mark.net
@pytest.mark.slow
def test_a_move_is_seen_from_inside_and_from_outside(busybox: None) -> None:
    with Place() as place:
        place.one.boot("bench", 256 << 20, place.disk, place.wire, f"/tmp/probe sample /dev/vda {_OTHER}")
        row = place.there_and_back("bench")
        assert row["converged"] == 1
        assert row["inside"] > 0
        assert row["outside"] > 0
        assert row["downtime"] == max(row["inside"], row["outside"])

        def windows(block: int) -> int:
            data = place.disk.read_bytes()[block * _BLOCK :]
            return int(struct.unpack_from("<Q", data)[0])

        before, end = windows(_OTHER), time.monotonic() + 60
        assert before > 0  # the program reports to the disk and the block that it is told
        while windows(_OTHER) == before:
            assert time.monotonic() < end, "the guest does not report after it has moved"
            time.sleep(0.05)
