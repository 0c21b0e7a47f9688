"""Parallel NOR flash with the Intel command set (JESD68 Common Flash Interface, command set 0x0001): two banks of 32 MiB.

As QEMU's virt has it: each bank is two 16-bit chips side by side on a 32-bit bus, so commands and status stand in both halves
of a word. While a bank is read as memory ("read array") the machine shows it to the guest as a read-only memory slot, and only
stores come here; after a command that asks for something else, loads do too. EDK2 keeps its code in the first bank and its
variables in the second.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import msgspec

from qemu_user.devices.device import Device, FdtNode, Place, State, require

BANK_SIZE = 32 << 20
BANKS = 2
SECTOR = 256 << 10
"""Bytes that are erased at once: a block of 128 KiB of each chip."""
WIDTH, CHIP_WIDTH = 4, 2
BUFFER = 2048
"""Bytes of a buffered write."""
VENDOR, PART = 0x89, 0x18

READ_ARRAY, READ_ID, READ_STATUS, READ_QUERY = 0xFF, 0x90, 0x70, 0x98
CLEAR_STATUS, ERASE, CONFIRM = 0x50, 0x20, 0xD0
PROGRAM = (0x10, 0x40)
WRITE_BUFFER, LOCK, SET_LOCK = 0xE8, 0x60, 0x01
READY, ERASE_FAILED, PROGRAM_FAILED, PROTECTED = 0x80, 0x20, 0x10, 0x02


def _query() -> bytes:
    """The query table of one chip, by word (JESD68.01, 4; the vendor's table at 0x31)."""
    blocks, block = BANK_SIZE // SECTOR, SECTOR // (WIDTH // CHIP_WIDTH)
    chip = BANK_SIZE // (WIDTH // CHIP_WIDTH)
    table = bytearray(0x52)
    table[0x10:0x17] = b"QRY" + struct.pack("<HH", 0x0001, 0x31)
    table[0x1B:0x1D] = bytes((0x45, 0x55))  # supply: 4.5 to 5.5 V
    table[0x1F:0x27] = bytes((7, 7, 10, 0, 4, 4, 4, 0))  # typical times, powers of two, and how much longer at most
    table[0x27] = chip.bit_length() - 1
    struct.pack_into("<HH", table, 0x28, 2, (BUFFER // (WIDTH // CHIP_WIDTH)).bit_length() - 1)
    table[0x2C] = 1
    struct.pack_into("<HH", table, 0x2D, blocks - 1, block >> 8)
    table[0x31:0x36] = b"PRI10"
    return bytes(table)


QUERY = _query()


class FlashFile(Protocol):
    """Where a bank's content stays (a BlockBackend)."""

    readonly: bool

    def read(self, offset: int, views: list[memoryview]) -> None: ...

    def write(self, offset: int, views: list[memoryview]) -> None: ...

    def flush(self) -> None: ...

    def lock(self) -> None: ...


class BankState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of the command machine; the content goes its own way (machine/flash.py)."""

    command: int
    cycle: int
    status: int
    count: int
    start: int
    buffer: bytes
    filled: list[int]


class PflashState(State, frozen=True, tag="pflash", kw_only=True):
    """One for each bank that is there."""

    version: Literal[1] = 1
    banks: list[BankState]


class Bank:
    """A bank: `content`, what the guest sees as memory; `file`, where it stays (None: nowhere)."""

    def __init__(self, content: memoryview, file: FlashFile | None) -> None:
        self.content, self.file = content, file
        self.show: Callable[[bool], None] = lambda array: None
        """Whether the guest is to see the content as memory. Set by the machine."""
        self.changed: Callable[[int, int], None] = lambda offset, length: None
        """Called after a change of the content, with offset and length."""
        self.reset()

    @property
    def readonly(self) -> bool:
        return self.file is not None and self.file.readonly

    @property
    def array(self) -> bool:
        """It is read as memory."""
        return self.command == READ_ARRAY and not self.cycle

    def load(self) -> None:
        """The content as the file has it. OSError."""
        if self.file is not None:
            self.file.read(0, [self.content])

    def reset(self) -> None:
        self.command, self.cycle, self.status, self.count, self.start = READ_ARRAY, 0, READY, 0, 0
        self.buffer, self.filled = b"", list[int]()

    def read(self, offset: int, size: int) -> int:
        if self.array:
            return int.from_bytes(self.content[offset : offset + size], "little")
        if self.cycle or self.command not in (READ_ID, READ_QUERY):
            value = self.status
        elif self.command == READ_QUERY:
            index = offset // WIDTH
            value = QUERY[index] if index < len(QUERY) else 0
        else:  # vendor and part; nothing is locked
            value = {0: VENDOR, 1: PART}.get(offset // WIDTH & 0xFF, 0)
        word = value | value << 8 * CHIP_WIDTH
        return word >> 8 * (offset % WIDTH) & (1 << 8 * size) - 1 if size <= WIDTH else word | word << 32

    def write(self, offset: int, size: int, value: int) -> bool:
        """A bus cycle. False: it makes no sense here, and the bank is back in the array."""
        command = value & 0xFF
        if self.cycle == 0:
            return self._first(offset, command)
        if self.command in PROGRAM:
            self._program(offset, value.to_bytes(size, "little"))
        elif self.command == ERASE:
            if command != CONFIRM:
                return self._back()
            self._erase(offset // SECTOR * SECTOR)
        elif self.command == LOCK:
            if command not in (CONFIRM, SET_LOCK):
                return self._back()
            self.status |= READY  # locks are taken and have no effect, as QEMU's
        else:
            return self._buffered(offset, size, value)
        self.cycle = 0
        return True

    def _first(self, offset: int, command: int) -> bool:
        if command in (*PROGRAM, ERASE, LOCK, WRITE_BUFFER):
            self.command, self.cycle, self.status = command, 1, self.status | READY
        elif command in (READ_ARRAY, READ_ID, READ_STATUS, READ_QUERY):
            self.command = command
        elif command == CLEAR_STATUS:
            self.status, self.command = READY, READ_ARRAY
        else:
            return self._back()
        return True

    def _back(self) -> bool:
        self.command, self.cycle, self.buffer, self.filled = READ_ARRAY, 0, b"", []
        return False

    def _buffered(self, offset: int, size: int, value: int) -> bool:
        """WRITE_BUFFER: how many bus words (less one), the words, the confirmation."""
        if self.cycle == 1:
            self.count = (value & 0xFFFF) + 1
            if self.count * WIDTH > BUFFER:
                self.status |= PROGRAM_FAILED
                return self._back()
            self.start = offset // BUFFER * BUFFER
            self.buffer, self.filled, self.cycle = bytes(BUFFER), [], 2
        elif self.cycle == 2:
            at = offset - self.start
            if not 0 <= at <= BUFFER - size:
                self.status |= PROGRAM_FAILED
                return self._back()
            self.buffer = self.buffer[:at] + value.to_bytes(size, "little") + self.buffer[at + size :]
            self.filled += range(at, at + size)
            self.count -= 1
            self.cycle = 3 if self.count == 0 else 2
        else:
            if value & 0xFF != CONFIRM:
                self.status |= PROGRAM_FAILED
                return self._back()
            for first, end in _runs(sorted(set(self.filled))):
                self._program(self.start + first, self.buffer[first:end])
            self.cycle, self.buffer, self.filled = 0, b"", []
        return True

    def _program(self, offset: int, data: bytes) -> None:
        """Ones become zeroes; the other way round takes an erasure."""
        old = self.content[offset : offset + len(data)]
        self._change(offset, bytes(a & b for a, b in zip(old, data, strict=True)), PROGRAM_FAILED)

    def _erase(self, offset: int) -> None:
        self._change(offset, b"\xff" * SECTOR, ERASE_FAILED)

    def _change(self, offset: int, data: bytes, failed: int) -> None:
        self.status |= READY
        if self.readonly:
            self.status |= failed | PROTECTED
            return
        try:
            if self.file is not None:
                self.file.write(offset, [memoryview(data)])
                self.file.flush()
        except OSError:
            self.status |= failed
            return
        self.content[offset : offset + len(data)] = data
        self.changed(offset, len(data))

    def save(self) -> BankState:
        return BankState(
            command=self.command, cycle=self.cycle, status=self.status, count=self.count, start=self.start,
            buffer=self.buffer, filled=self.filled,
        )  # fmt: skip

    def restore(self, state: BankState) -> None:
        self.command, self.cycle, self.status = state.command, state.cycle, state.status
        self.count, self.start, self.buffer, self.filled = state.count, state.start, state.buffer, list(state.filled)


def _runs(places: list[int]) -> list[tuple[int, int]]:
    """[first, end) of what is side by side."""
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs


def check(state: BankState) -> None:
    """StateError unless a bank can be in this state."""
    known = (READ_ARRAY, READ_ID, READ_STATUS, READ_QUERY, *PROGRAM, ERASE, LOCK, WRITE_BUFFER)
    require(state.command in known, f"pflash: command {state.command:#x}")
    last = {WRITE_BUFFER: 3, ERASE: 1, LOCK: 1, **dict.fromkeys(PROGRAM, 1)}.get(state.command, 0)
    require(0 <= state.cycle <= last, "pflash: cycle")
    require(0 <= state.status <= 0xFF, "pflash: status")
    require(0 <= state.start <= BANK_SIZE - BUFFER and state.start % BUFFER == 0, "pflash: start")
    inside = state.command == WRITE_BUFFER and state.cycle >= 2
    require(len(state.buffer) == (BUFFER if inside else 0), "pflash: buffer")
    require(0 <= state.count <= BUFFER // WIDTH and (state.cycle != 2 or state.count > 0), "pflash: count")
    require(len(state.filled) <= BUFFER and all(0 <= place < BUFFER for place in state.filled), "pflash: filled")
    require(inside or not state.filled, "pflash: filled")


class Pflash(Device):
    """Both banks, one behind the other."""

    compatible: ClassVar[str | list[str]] = "cfi-flash"
    region_size: ClassVar[int] = BANKS * BANK_SIZE
    State = PflashState

    def __init__(self, name: str, banks: list[Bank]) -> None:
        super().__init__(name)
        self.banks = banks

    def read(self, offset: int, size: int) -> int:
        bank, at = self._bank(offset)
        if bank is None or at + size > BANK_SIZE:
            return self.bad_access(offset, size)
        with self.lock:
            return bank.read(at, size)

    def write(self, offset: int, size: int, value: int) -> None:
        bank, at = self._bank(offset)
        if bank is None or size > WIDTH or at % size:
            self.bad_access(offset, size)
            return
        value &= (1 << 8 * size) - 1
        with self.lock:
            was = bank.array
            if not bank.write(at, size, value):
                self.counters.count("bad_command")
            if was != bank.array:
                bank.show(bank.array)

    def _bank(self, offset: int) -> tuple[Bank | None, int]:
        number, at = divmod(offset, BANK_SIZE)
        return (self.banks[number] if number < len(self.banks) else None), at

    def fdt_node(self, place: Place) -> FdtNode:
        banks = [place._replace(base=place.base + number * BANK_SIZE, size=BANK_SIZE) for number in range(BANKS)]
        properties = place.properties(self.compatible)
        properties["reg"] = [cell for bank in banks for cell in bank.reg()]
        properties["bank-width"] = WIDTH
        return FdtNode(f"flash@{place.base:x}", properties)

    def save(self) -> PflashState:
        with self.lock:
            return PflashState(banks=[bank.save() for bank in self.banks])

    def restore(self, state: Any) -> None:
        require(len(state.banks) == len(self.banks), "pflash: another number of banks")
        for bank_state in state.banks:
            check(bank_state)
        with self.lock:
            for bank, bank_state in zip(self.banks, state.banks, strict=True):
                bank.restore(bank_state)
                bank.show(bank.array)

    def reset(self) -> None:
        with self.lock:
            for bank in self.banks:
                bank.reset()
                bank.show(True)
