"""The flash, by JESD68 and Intel's command set: both halves of a word, erase before ones, buffered writes, what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_user.backends.block.raw import RawImage
from qemu_user.devices.pflash import BANK_SIZE, BUFFER, SECTOR, Bank, Pflash

BOTH = 0x00010001
READY = 0x80 * BOTH


class Flash:
    """A flash with bank 0 read-only and bank 1 on a file of zeroes, and what the guest is shown."""

    def __init__(self, folder: Path) -> None:
        self.files: list[RawImage] = []
        for number in range(2):
            with (folder / f"bank{number}").open("wb") as file:
                file.truncate(BANK_SIZE)
                file.write(b"code" if number == 0 else b"")
            self.files.append(RawImage(str(folder / f"bank{number}"), readonly=number == 0))
        self.banks = [Bank(memoryview(bytearray(BANK_SIZE)), file) for file in self.files]
        self.shown: list[tuple[int, bool]] = []
        for number, bank in enumerate(self.banks):
            bank.load()
            bank.show = lambda array, number=number: self.shown.append((number, array))  # type: ignore[misc]
        self.device = Pflash("flash", self.banks)

    def say(self, command: int, at: int = BANK_SIZE) -> None:
        self.device.write(at, 4, command * BOTH)

    def read(self, at: int = BANK_SIZE, size: int = 4) -> int:
        return self.device.read(at, size)

    def program(self, value: int, at: int = BANK_SIZE) -> int:
        """The status."""
        self.say(0x40, at)
        self.device.write(at, 4, value)
        status = self.read(at)
        self.say(0xFF)
        return status

    def erase(self, at: int = BANK_SIZE) -> int:
        self.say(0x20, at)
        self.say(0xD0, at)
        status = self.read(at)
        self.say(0xFF, at)
        return status


@pytest.fixture
def flash(tmp_path: Path) -> Iterator[Flash]:
    flash = Flash(tmp_path)
    with contextlib.ExitStack() as stack:
        for file in flash.files:
            stack.callback(file.close)
        yield flash


def test_the_content_is_read_as_it_is(flash: Flash) -> None:
    assert flash.read(0) == int.from_bytes(b"code", "little")
    assert flash.read(1, 2) == int.from_bytes(b"od", "little")
    assert flash.read(0, 8) == int.from_bytes(b"code\0\0\0\0", "little")


def test_the_query_table_of_both_chips(flash: Flash) -> None:
    flash.say(0x98, BANK_SIZE + 0x55 * 4)
    found = [flash.read(BANK_SIZE + 4 * index) for index in range(0x36)]
    assert all(word & 0xFFFF == word >> 16 for word in found)
    table = bytes(word & 0xFF for word in found)
    assert table[0x10:0x13] == b"QRY"
    assert table[0x13] | table[0x14] << 8 == 1
    assert 2 << table[0x27] == BANK_SIZE
    assert (table[0x2D] + (table[0x2E] << 8) + 1) * 2 * 256 * (table[0x2F] | table[0x30] << 8) == BANK_SIZE
    assert 2 << table[0x2A] == BUFFER
    assert table[0x31:0x34] == b"PRI"
    assert flash.read(BANK_SIZE + 4 * 0x11, 1) == ord("R")


def test_the_identity(flash: Flash) -> None:
    flash.say(0x90)
    assert [flash.read(BANK_SIZE + 4 * index) for index in range(3)] == [0x89 * BOTH, 0x18 * BOTH, 0]


def test_ones_become_zeroes_and_only_an_erasure_brings_them_back(flash: Flash) -> None:
    at = BANK_SIZE + SECTOR + 8
    assert flash.program(0x12345678, at) == READY
    assert flash.read(at) == 0, "what is zero stays zero"
    assert flash.erase(at) == READY
    assert flash.read(at) == 0xFFFFFFFF
    assert flash.read(BANK_SIZE + SECTOR - 4) == 0
    assert flash.read(BANK_SIZE + 2 * SECTOR) == 0
    flash.program(0x12345678, at)
    flash.program(0xFF00FFFF, at)
    assert flash.read(at) == 0x12005678


def test_what_is_written_is_in_the_file(flash: Flash, tmp_path: Path) -> None:
    flash.erase()
    flash.program(0x11223344, BANK_SIZE + 16)
    with (tmp_path / "bank1").open("rb") as file:
        assert file.read(24) == b"\xff" * 16 + b"\x44\x33\x22\x11" + b"\xff" * 4


def test_a_buffered_write(flash: Flash) -> None:
    flash.erase()
    at = BANK_SIZE + BUFFER
    flash.say(0xE8, at)
    assert flash.read(at) == READY
    flash.say(1, at)
    flash.device.write(at + 8, 4, 0xAABBCCDD)
    flash.device.write(at + 4, 4, 0x01020304)
    flash.say(0xD0, at)
    assert flash.read(at) == READY
    flash.say(0xFF)
    assert [flash.read(at + offset) for offset in (0, 4, 8, 12)] == [0xFFFFFFFF, 0x01020304, 0xAABBCCDD, 0xFFFFFFFF]


@pytest.mark.parametrize("wrong", ["count", "address", "confirmation"])
def test_a_buffered_write_that_is_none_changes_nothing(flash: Flash, wrong: str) -> None:
    flash.erase()
    before = bytes(flash.banks[1].content)
    flash.say(0xE8)
    flash.say(0xFFFF if wrong == "count" else 0)
    if wrong != "count":
        flash.device.write(BANK_SIZE + (BUFFER if wrong == "address" else 0), 4, 0)
    if wrong == "confirmation":
        flash.say(0x12)
    flash.say(0x70)
    assert flash.read() & 0x10
    assert flash.banks[1].content == before
    flash.say(0x50)
    flash.say(0x70)
    assert flash.read() == READY


def test_a_readonly_bank_says_so(flash: Flash) -> None:
    assert flash.program(0, 0) & 0x12
    flash.say(0xFF, 0)
    assert flash.erase(0) & 0x22
    assert flash.read(0) == int.from_bytes(b"code", "little")


def test_the_guest_sees_memory_only_while_it_reads_the_array(flash: Flash) -> None:
    flash.say(0x70)
    flash.say(0xFF)
    assert flash.shown == [(1, False), (1, True)]
    flash.erase()
    assert flash.shown[2:] == [(1, False), (1, True)]
    flash.say(0x55)  # no command
    assert len(flash.shown) == 4
    assert flash.device.counters["bad_command"] == 1


def test_a_full_disk_is_a_failed_write(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(offset: int, views: list[memoryview]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(flash.files[1], "write", full)
    assert flash.erase() & 0x20
    assert flash.read() == 0
