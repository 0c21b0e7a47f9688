"""Sets of pages: bitmaps, byte maps, runs. Arithmetic on bytes, no policy.

A *map* has one byte per unit (page or block), 1 for those in the set. Runs are (first unit, how many).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator

_SPREAD = [bytes(byte >> bit & 1 for bit in range(8)) for byte in range(256)]
_NONZERO = re.compile(rb"[^\0]+")
_FEW = 256
"""Units, of which it is quicker to set one after the other."""
_memcmp = ctypes.PyDLL(None).memcmp  # keeps the GIL: it takes less time than giving it back would
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ZERO_BYTES = 1 << 20
_zeroes = (ctypes.c_char * _ZERO_BYTES)()
_ZEROES = ctypes.addressof(_zeroes)


def from_bits(bits: bytes, units: int) -> bytearray:
    """The map of a bitmap, bit i of byte i // 8; bits beyond `units` are ignored."""
    result = bytearray(8 * len(bits))
    for match in _NONZERO.finditer(bits):
        result[8 * match.start() : 8 * match.end()] = b"".join([_SPREAD[byte] for byte in match.group()])
    del result[units:]
    result.extend(bytes(units - len(result)))
    return result


def union(one: bytes | bytearray, other: bytes | bytearray) -> bytearray:
    """Units that are in either map, both of one length (an empty one stands for the empty set); quicker if `other` has few."""
    if not one or not other:
        return bytearray(one or other)
    if count(other) <= _FEW:
        merged = bytearray(one)
        for unit in indices(other):
            merged[unit] = 1
        return merged
    both = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return bytearray(both.to_bytes(len(one), "little"))


def runs(units: bytes | bytearray, most: int) -> Iterator[tuple[int, int]]:
    """The runs of a map, in order, none longer than `most`. The guest may stand: find() passes over what is not in it as fast
    as memory is read."""
    at = units.find(1)
    while at >= 0:
        end = units.find(0, at)
        if end < 0:
            end = len(units)
        while at < end:
            count = min(most, end - at)
            yield at, count
            at += count
        at = units.find(1, end)


def count(units: bytes | bytearray) -> int:
    """How many units are in a map."""
    return len(units) - units.count(0)


def address_of(view: memoryview) -> int:
    """Where writable memory lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def divided(units: bytearray, first: Iterable[int], piece: int, most: int) -> tuple[bytearray, bytearray]:
    """(the others, those that go first): the units of a map that share a piece of `piece` units with one of `first`, in that
    order, piece by piece until they are `most`."""
    others, chosen, left = bytearray(units), bytearray(len(units)), most
    seen = set()
    for unit in first:  # which may be many, and the guest stands: no longer than need be
        start = unit // piece * piece
        if start in seen:
            continue
        seen.add(start)
        part = others[start : start + piece]
        left -= count(part)
        if left < 0:
            break
        chosen[start : start + piece] = part
        others[start : start + piece] = bytes(len(part))
    return others, chosen


def indices(units: bytes | bytearray) -> Iterator[int]:
    """The units of a map, in order."""
    at = units.find(1)
    while at >= 0:
        yield at
        at = units.find(1, at + 1)


def is_zero(data: bytes | memoryview) -> bool:
    """Whether these are all zeroes."""
    return not bytes(data[:64]).strip(b"\0") and not bytes(data).strip(b"\0")


def split_zeroes(address: int, first: int, length: int, unit: int) -> Iterator[tuple[bool, int, int]]:
    """(is zero, first unit, how many) for the units [first, first + length) of memory whose first unit is at
    `address`: alternating stretches, in order.
    """
    at, end, kind = first, first, False
    last = first + length
    while end < last:
        count, zero = _stretch(address, end, last, unit)
        if zero != kind and end > at:
            yield kind, at, end - at
            at = end
        kind = zero
        end += count
    if end > at:
        yield kind, at, end - at


def _stretch(address: int, unit_index: int, last: int, unit: int) -> tuple[int, bool]:
    """How many units from here on are alike, looked at as coarsely as possible, and whether they are zero."""
    where = address + unit_index * unit
    if _memcmp(where, _ZEROES, min(unit, 64)):
        return 1, False  # most pages that are not zero say so in their first bytes
    most = min(last - unit_index, _ZERO_BYTES // unit)
    if most > 1 and not _memcmp(where, _ZEROES, most * unit):
        return most, True
    return 1, not _memcmp(where, _ZEROES, unit)
