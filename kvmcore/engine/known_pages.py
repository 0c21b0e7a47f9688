"""The table by which native code finds what there is of a page when it decodes it (page_identity.py): Python's side.

Only added to; native code may read it meanwhile, so each step of it is one aligned store after what it leads to is there.
Called by hot_code.py, with the machine's gate held.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmcore.engine import machine_state
from kvmcore.engine.page_identity import KEY_BYTES, TABLE_HEAD, Entry, Region
from kvmcore.engine.translation import ENTRY, TEMPLATES

if TYPE_CHECKING:
    from kvmcore.engine.machine import Machine

_LEAST = 1024
"""Entries of a table; one that is two thirds full is replaced."""
_REGIONS = 512
"""Regions that memory is taken for at once."""
_ENTRY = ctypes.sizeof(Entry)
_WORDS = _ENTRY // 8
_NUMBERS = struct.Struct("<QQHxxI")
"""ENTRY, the identity as its two words."""


class KnownPages:
    """Of one machine. Empty, and unknown to native code, until begin()."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._table = (ctypes.c_uint64 * 0)()
        self._size = self._count = 0
        self._rooms: list[ctypes.Array[Region]] = []
        self._left = 0

    def begin(self, secret: bytes, index: bytes) -> None:
        """New memories, with this in them (ENTRY, one after the other). No hart is in native code."""
        state = self._machine.state
        state.known = 0
        assert len(secret) == KEY_BYTES
        key = ctypes.addressof(state) + machine_state.OFFSET["key"]
        ctypes.memset(key, 0, machine_state.KEY_BLOCK)
        ctypes.memmove(key, secret, KEY_BYTES)
        self._table = (ctypes.c_uint64 * 0)()
        self._left = self._size = self._count = 0
        self._replace(len(index) // ENTRY.size)
        self._fill(index[: len(index) // ENTRY.size * ENTRY.size])

    def _fill(self, index: bytes) -> None:
        """An empty table, on plain numbers: a VM's first page waits for it."""
        words, after = self._table[:], len(self._table)
        room = (Region * (len(index) // ENTRY.size))()
        self._rooms = [room]
        at_room, regions = ctypes.addressof(room), array("Q")
        for raw, second, head, place in _NUMBERS.iter_unpack(index):
            first = raw or 1
            at = TABLE_HEAD // 8 + (raw & (self._size - 1)) * _WORDS
            while words[at] and (words[at] != first or words[at + 1] != second):
                at = at + _WORDS if at + _WORDS < after else TABLE_HEAD // 8
            self._count += not words[at]
            words[at : at + 2] = first, second
            if head == TEMPLATES:
                words[at + 2] = place
            else:
                here = at_room + 8 * len(regions)
                regions.extend((words[at + 3], head, place))
                words[at + 3] = here
        ctypes.memmove(room, regions.tobytes(), 8 * len(regions))
        ctypes.memmove(self._table, array("Q", words).tobytes(), 8 * after)

    def template(self, identity: bytes, place: int) -> None:
        """There is template code, with its list of heads at `place`."""
        self._entry(identity).templates = place

    def region(self, identity: bytes, head: int, at: int) -> None:
        """There is a region that begins at offset `head` of the page, at `at` of the arena."""
        entry = self._entry(identity)
        if any(region.head == head for region in _chain(entry)):
            return
        if not self._left:
            self._rooms.append((Region * _REGIONS)())
            self._left = _REGIONS
        self._left -= 1
        region = self._rooms[-1][self._left]
        region.next, region.head, region.at = entry.regions, head, at
        entry.regions = ctypes.addressof(region)

    def place(self, identity: bytes) -> int:
        """Of the list of heads of its template code; 0: there is none."""
        entry = self._find(identity) if self._size else None
        return int(entry.templates) if entry is not None and entry.first else 0

    def heads(self, identity: bytes) -> list[int]:
        """Offsets of the heads of its regions."""
        entry = self._find(identity) if self._size else None
        return [int(region.head) for region in _chain(entry)] if entry is not None and entry.first else []

    def used(self) -> list[bytes]:
        """Pages with regions that have been decoded since the last time."""
        found = []
        for entry in self._entries():
            if entry.used and entry.regions:
                found.append(bytes(entry)[:16])
            entry.used = 0
        return found

    # -- the table ---------------------------------------------------------------------------------------------
    def _entries(self) -> Iterator[Entry]:
        """Those that are taken."""
        base = ctypes.addressof(self._table) + TABLE_HEAD
        for number, first in enumerate(self._table[TABLE_HEAD // 8 :: _WORDS]):
            if first:
                yield Entry.from_address(base + number * _ENTRY)

    def _entry(self, identity: bytes) -> Entry:
        """Made, if there is none."""
        if 3 * self._count > 2 * self._size:
            self._replace(2 * self._count)
        entry = self._find(identity)
        if not entry.first:
            self._count += 1
            entry.second = int.from_bytes(identity[8:], "little")
            entry.first = _first(identity)
        return entry

    def _find(self, identity: bytes) -> Entry:
        """Its entry, or the free one that it would get."""
        index, base = int.from_bytes(identity[:8], "little"), ctypes.addressof(self._table) + TABLE_HEAD
        first, second = _first(identity), int.from_bytes(identity[8:], "little")
        while True:
            entry = Entry.from_address(base + (index & (self._size - 1)) * _ENTRY)
            if not entry.first or (entry.first == first and entry.second == second):
                return entry
            index += 1

    def _replace(self, count: int) -> None:
        """A table that has room for `count` pages and some more."""
        taken = [bytes(entry) for entry in self._entries()]
        before, self._size = self._table, _LEAST
        while self._size < 2 * count:
            self._size *= 2
        self._table = (ctypes.c_uint64 * ((TABLE_HEAD + self._size * _ENTRY) // 8))()
        self._table[0] = self._size - 1
        for entry in taken:
            ctypes.memmove(ctypes.addressof(self._find(entry[:16])), entry, _ENTRY)
        with self._machine.quiesce():  # nobody reads the old one any more
            self._machine.state.known = ctypes.addressof(self._table)
        del before


def _chain(entry: Entry) -> Iterator[Region]:
    at = entry.regions
    while at:
        region = Region.from_address(at)
        yield region
        at = region.next


def _first(identity: bytes) -> int:
    """Never 0, so one of 2**64 pages is not found."""
    return int.from_bytes(identity[:8], "little") or 1
