"""Configuration space of a function: the bytes, which of them may be written, and the list of capabilities.

PCI Local Bus Specification 3.0, chapter 6, and PCI Express Base Specification, section 7.5. Type 0 headers only.
The write masks stand in HEADER once; function.py gives meaning to what is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from qemu_user.devices.device import require

SIZE = 4096
"""Bytes of a function in the ECAM; those behind 256 are PCI Express's extended space, empty here."""
LEGACY_SIZE = 256
VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
CACHE_LINE_SIZE, HEADER_TYPE, BARS, SUBSYSTEM_VENDOR, SUBSYSTEM = 0x0C, 0x0E, 0x10, 0x2C, 0x2E
CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 0x34, 0x3C, 0x3D
BAR_COUNT = 6

IO_ENABLE, MEMORY_ENABLE, BUS_MASTER, PARITY, SERR, INTX_DISABLE = 1, 2, 4, 0x40, 0x100, 0x400
"""Command register bits (6.2.2)."""
INTX_STATUS, HAS_CAPABILITIES = 0x08, 0x10
"""Status register bits (6.2.3)."""

HEADER: tuple[tuple[int, int, int], ...] = (
    # offset, bytes, bits that software may write
    (COMMAND, 2, IO_ENABLE | MEMORY_ENABLE | BUS_MASTER | PARITY | SERR | INTX_DISABLE),
    (CACHE_LINE_SIZE, 1, 0xFF),
    (INTERRUPT_LINE, 1, 0xFF),
)
"""What is writable in every type 0 header, apart from the BARs. The error bits of STATUS are never set, so that
writing 1 to clear them changes nothing.
"""


class Identity(NamedTuple):
    """Who a function says it is. `class_code`: base class, subclass, interface as 24 bits."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True)
class Bar:
    """A base address register. `size` is a power of two, at least 16 bytes; a 64-bit one takes the next index too."""

    index: int
    size: int
    kind: Literal["memory32", "memory64", "io"] = "memory32"
    prefetchable: bool = False

    @property
    def flags(self) -> int:
        """The read-only low bits."""
        if self.kind == "io":
            return 1
        return (4 if self.kind == "memory64" else 0) | (8 if self.prefetchable else 0)

    @property
    def bits(self) -> int:
        return 64 if self.kind == "memory64" else 32


class ConfigSpace:
    """The registers of one function, as bytes with a mask of writable bits."""

    def __init__(self, identity: Identity, bars: list[Bar], interrupt_pin: int) -> None:
        self._data, self._mask = bytearray(LEGACY_SIZE), bytearray(LEGACY_SIZE)
        self.bars = {bar.index: bar for bar in bars}
        for offset, size, value in (
            (VENDOR_ID, 2, identity.vendor),
            (DEVICE_ID, 2, identity.device),
            (REVISION, 1, identity.revision),
            (CLASS, 3, identity.class_code),
            (SUBSYSTEM_VENDOR, 2, identity.subsystem_vendor),
            (SUBSYSTEM, 2, identity.subsystem),
            (INTERRUPT_PIN, 1, interrupt_pin),
        ):
            self._declare(offset, size, value, 0)
        for offset, size, mask in HEADER:
            self._declare(offset, size, 0, mask)
        for bar in bars:
            # Sizing (6.2.5.1): all ones written read back with the bits below the size as zeroes and flags.
            address = ~(bar.size - 1) & (1 << bar.bits) - 1
            self._declare(BARS + 4 * bar.index, bar.bits // 8, bar.flags, address)
        self._last_pointer, self._room = CAPABILITIES, 0x40
        self._initial = bytes(self._data)

    def _declare(self, offset: int, size: int, value: int, mask: int) -> None:
        self._data[offset : offset + size] = value.to_bytes(size, "little")
        self._mask[offset : offset + size] = mask.to_bytes(size, "little")

    def add_capability(self, identifier: int, body: bytes, mask: bytes = b"") -> int:
        """Append a capability (6.7): `body` follows id and next pointer, `mask` are its writable bits.

        Returns its offset. ValueError if there is no room.
        """
        at, length = self._room, 2 + len(body)
        if at + length > LEGACY_SIZE:
            raise ValueError(f"no room for capability {identifier:#x}")
        self._data[self._last_pointer] = at
        self._data[STATUS] |= HAS_CAPABILITIES
        self._data[at] = identifier
        self._data[at + 2 : at + length] = body
        self._mask[at + 2 : at + 2 + len(mask)] = mask
        self._last_pointer, self._room = at + 1, (at + length + 3) & ~3
        self._initial = bytes(self._data)
        return at

    def read(self, offset: int, size: int) -> int:
        """Registers that are not there read as zero."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Bits that may not be written keep their value."""
        for position, byte in enumerate(value.to_bytes(size, "little"), offset):
            if position < LEGACY_SIZE:
                mask = self._mask[position]
                self._data[position] = self._data[position] & ~mask | byte & mask

    def set(self, offset: int, size: int, value: int) -> None:
        """The function's own way to change a register, whatever the mask."""
        self._data[offset : offset + size] = value.to_bytes(size, "little")

    @property
    def command(self) -> int:
        return self.read(COMMAND, 2)

    def bar_address(self, index: int) -> int:
        """Where the guest put a BAR, flags aside."""
        bar = self.bars[index]
        return self.read(BARS + 4 * index, bar.bits // 8) & ~(bar.size - 1)

    def reset(self) -> None:
        self._data[:] = self._initial

    def save(self) -> bytes:
        return bytes(self._data)

    def check(self, data: bytes, name: str) -> None:
        """StateError unless `data` differs from ours in nothing but what software may write."""
        require(len(data) == LEGACY_SIZE, f"{name}: configuration space of {len(data)} bytes")
        fixed = [at for at in range(LEGACY_SIZE) if (data[at] ^ self._initial[at]) & ~self._mask[at] & ~_LIVE.get(at, 0)]
        require(not fixed, f"{name}: saved from a PCI function of another kind (offset {fixed[:1]})")

    def restore(self, data: bytes) -> None:
        self._data[:] = data


_LIVE = {STATUS: INTX_STATUS}
"""Read-only bits that change while the function works."""
