"""softkvm bench io: what it makes of its runs, and the parts that need no guest."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from qemu_user.bench import exits, io, io_image


def test_figures_say_how_many_times_as_good_as_qemu() -> None:
    rows = io.figures(
        {
            "randread-qd1": {"softkvm": [6000.0, 5000.0, 5500.0], "qemu": [2500.0, 2750.0, 3000.0]},
            "ping": {"softkvm": [0.2], "qemu": [0.5]},
            "iperf-out": {"softkvm": [900.0]},
        }
    )
    assert list(rows) == ["randread-qd1", "iperf-out", "ping"]
    assert rows["randread-qd1"]["ratio_vs_qemu"] == 2.0
    assert rows["randread-qd1"]["spread"] == pytest.approx(1000 / 5500)
    assert rows["ping"]["ratio_vs_qemu"] == 2.5  # less is better
    assert rows["iperf-out"]["ratio_vs_qemu"] is None
    lines = io.table(rows).splitlines()
    assert len(lines) == 4
    assert "2.00" in lines[1]


def test_an_unknown_row_is_an_error_that_names_the_rows() -> None:
    with pytest.raises(io.IoBenchError, match="randread-qd1"):
        io.run(1, 1.0, "nonsense", lambda line: None)


def elf(needed: list[str], soname: str) -> bytes:
    """As much of an ELF file as there is to read: two program headers, a dynamic section, its strings."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in (*needed, soname))
    at, offsets = 1, []
    for name in (*needed, soname):
        offsets.append(at)
        at += len(name) + 1
    base, dynamic_at, strings_at = 0x10000, 64 + 2 * 56, 0x400
    entries = [(1, offset) for offset in offsets[:-1]] + [(14, offsets[-1]), (5, base + strings_at), (0, 0)]
    head = bytearray(64)
    struct.pack_into("<Q", head, 32, 64)
    struct.pack_into("<HH", head, 54, 56, 2)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, 0x1000, 0x1000, 0x1000)
    dynamic = struct.pack("<IIQQQQQQ", 2, 6, dynamic_at, base + dynamic_at, 0, 16 * len(entries), 16 * len(entries), 8)
    body = bytes(head) + load + dynamic + b"".join(struct.pack("<QQ", *entry) for entry in entries)
    return body.ljust(strings_at, b"\0") + strings


def test_needed_libraries_and_soname() -> None:
    file = elf(["libc.so.6", "libz.so.1"], "libfoo.so.3")
    assert io_image._needed(file) == ["libc.so.6", "libz.so.1"]
    assert io_image._soname(file) == "libfoo.so.3"


def test_the_guests_script_is_in_the_archive() -> None:
    assert b"BENCH" in io_image.script()


def test_a_guest_that_says_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="reported nothing"):
        exits.uart_read(lambda kernel: ["true"])


def test_the_report_is_read() -> None:
    def command(kernel: Path) -> list[str]:
        assert len(exits.program()) == kernel.stat().st_size
        return ["echo", "T0000:0?0"]  # 0xa0f0 ticks, as the guest prints them

    assert exits.uart_read(command, accesses=10) == 0xA0F0 / 10 / 10
