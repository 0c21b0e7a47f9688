"""MSI-X: the vector table and the pending bits of a function (PCI Local Bus Specification 3.0, section 6.8.2).

The table is the guest's: address, data and mask of each vector. An MSI is delivered through an MsiVector that
machine/msi.py makes (an irqfd that is routed to the in-kernel IMSIC); one that is masked waits as a pending bit.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from qemu_user.devices.device import require

CAPABILITY = 0x11
ENTRY_SIZE = 16
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
"""Message control bits (6.8.2.3)."""
VECTOR_MASKED = 1
"""Vector control bit (6.8.2.9)."""
_ENTRY = struct.Struct("<QII")


class MsiVector(Protocol):
    """One deliverable message."""

    def route(self, address: int, data: int) -> None:
        """From now on fire() stores `data` to `address`. Cheap."""

    def fire(self) -> None:
        """Deliver. Any thread, one at a time."""

    def prepare(self) -> None:
        """fire() is to be quick the first time, too."""


MakeVector = Callable[[], MsiVector]


class MsixState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Table and pending bits as the guest reads them."""

    table: bytes
    pending: bytes


class Msix:
    """`count` vectors, at most 2048. `enabled` and `function_masked` follow the capability's message control."""

    def __init__(self, count: int, make: MakeVector) -> None:
        self.count = count
        self.table_size, self.pending_size = ENTRY_SIZE * count, 8 * -(-count // 64)
        self._make = make
        self._vectors: list[MsiVector | None] = [None] * count
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """All vectors masked, none pending (6.8.2.9)."""
        self.enabled = self.function_masked = self._live = False
        self._table = bytearray(_ENTRY.pack(0, 0, VECTOR_MASKED) * self.count)
        self._pending = bytearray(self.pending_size)

    # -- the guest's side --------------------------------------------------------------------------

    def capability(self, table_bar: int, table_offset: int, pending_offset: int) -> tuple[bytes, bytes]:
        """(body, mask) of the capability; both structures lie in one BAR."""
        body = struct.pack("<HII", self.count - 1, table_offset | table_bar, pending_offset | table_bar)
        return body, struct.pack("<H", ENABLE | FUNCTION_MASK)

    def control(self, value: int, live: bool) -> None:
        """Message control as it is now; `live`: the function may master the bus."""
        with self._lock:
            self.enabled, self._live = bool(value & ENABLE), live
            self.function_masked = bool(value & FUNCTION_MASK)
            for index in range(self.count):
                self._settle(index)

    def read_table(self, offset: int, size: int) -> int:
        return int.from_bytes(self._table[offset : offset + size], "little")

    def write_table(self, offset: int, size: int, value: int) -> None:
        """DWORDs and QWORDs, aligned (6.8.2); reserved bits of vector control stay zero."""
        with self._lock:
            self._table[offset : offset + size] = value.to_bytes(size, "little")
            index = offset // ENTRY_SIZE
            control = ENTRY_SIZE * index + 12
            self._table[control : control + 4] = bytes((self._table[control] & VECTOR_MASKED, 0, 0, 0))
            self._settle(index)

    def read_pending(self, offset: int, size: int) -> int:
        return int.from_bytes(self._pending[offset : offset + size], "little")

    def _open(self, index: int) -> bool:
        masked = self._table[ENTRY_SIZE * index + 12] & VECTOR_MASKED
        return self.enabled and self._live and not self.function_masked and not masked

    def _settle(self, index: int) -> None:
        """A vector that may be open now: route it, deliver what waited."""
        if not self._open(index):
            return
        vector = self._vectors[index]
        if vector is None:
            vector = self._vectors[index] = self._make()
        address, data, _ = _ENTRY.unpack_from(self._table, ENTRY_SIZE * index)
        vector.route(address, data)
        if self._pending[index >> 3] >> (index & 7) & 1:
            self._pending[index >> 3] &= ~(1 << (index & 7))
            vector.fire()

    # -- the function's side -----------------------------------------------------------------------

    def fire(self, index: int) -> None:
        """Signal a vector: at once, or when it is unmasked. Any thread."""
        with self._lock:
            vector = self._vectors[index]
            if vector is not None and self._open(index):
                vector.fire()
            else:
                self._pending[index >> 3] |= 1 << (index & 7)

    def prepare(self, indexes: Iterable[int]) -> None:
        """The function will signal these: what there is to set up for those that are open is set up now."""
        with self._lock:
            for index in indexes:
                vector = self._vectors[index]
                if vector is not None and self._open(index):
                    vector.prepare()

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> MsixState:
        return MsixState(table=bytes(self._table), pending=bytes(self._pending))

    def check(self, state: MsixState | None, name: str) -> None:
        """StateError unless restore() can take `state`."""
        require(state is not None and len(state.table) == len(self._table), f"{name}: an MSI-X table of another size")
        require(state is not None and len(state.pending) == len(self._pending), f"{name}: MSI-X pending bits of another size")
        assert state is not None
        spare = int.from_bytes(state.pending, "little") >> self.count
        controls = (state.table[ENTRY_SIZE * i + 12 : ENTRY_SIZE * (i + 1)] for i in range(self.count))
        require(not spare, f"{name}: pending MSI-X vectors that are not there")
        require(all(c[0] <= 1 and not any(c[1:]) for c in controls), f"{name}: reserved MSI-X vector control bits")

    def restore(self, state: MsixState) -> None:
        """Take over a checked state; control() follows."""
        with self._lock:
            self._table[:], self._pending[:] = state.table, state.pending
