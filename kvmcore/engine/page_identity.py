"""What a decoded page is, and what there is of it already: found natively when the page is decoded.

A page's *identity* is BLAKE2b (RFC 7693) of its bytes, 16 bytes, with the host's secret as key: what translation.identity_of
makes in Python. The table of what is known (known_pages.py writes it) says by identity where template code and regions are;
the page's records are led there at once, so that a page that comes back to the pool costs some microseconds and no exit.
Written as softmmu.py is; collected by routines.py. Called with the lock of decoded pages held.
"""

from __future__ import annotations

import ctypes

from kvmcore.engine import machine_state
from kvmcore.engine.native_hart import FunctionHart, call, load, param, returns, store, tracer
from kvmcore.ir.value import Value, select, u64

_U64 = ctypes.c_uint64
KEY_BYTES, DIGEST_BYTES = 32, 16
_BLOCK, _PAGE = 128, 4096


class Entry(ctypes.Structure):
    """What is known of an identity, whose two words are `first` (0: a free entry) and `second`.

    templates: place of its list of heads in the memory for template code, or 0. regions: address of the first Region, or 0.
    used: 1 when a page has got what there is.
    """

    _fields_ = [("first", _U64), ("second", _U64), ("templates", _U64), ("regions", _U64), ("used", _U64)]


class Region(ctypes.Structure):
    """One region of a page: address of the next one or 0, offset of the head in the page, offset of the code in the arena."""

    _fields_ = [("next", _U64), ("head", _U64), ("at", _U64)]


TABLE_HEAD = 8
"""A table begins with a word: its number of entries, a power of 2, less 1."""

_IV = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
_SIGMA = (
    "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
)  # fmt: skip
_COLUMNS = tuple((i, 4 + i, 8 + i, 12 + i) for i in range(4))
_DIAGONALS = tuple((i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4) for i in range(4))


def _rotated(value: Value, bits: int) -> Value:
    return (value >> bits) | (value << (64 - bits))


def compress(h: FunctionHart) -> None:
    """(chained value, block, bytes so far, all ones if it is the last block): F of RFC 7693, 3.2."""
    state, block = param("p0"), param("p1")
    chained = [load(state + 8 * index) for index in range(8)]
    words = [load(block + 8 * index, 64, "plain", 1) for index in range(16)]
    v = [*chained, *(u64(word) for word in _IV)]
    v[12], v[14] = v[12] ^ param("p2"), v[14] ^ param("p3")
    for turn in range(12):
        order = [int(digit, 16) for digit in _SIGMA[turn % len(_SIGMA)]]
        for number, (a, b, c, d) in enumerate((*_COLUMNS, *_DIAGONALS)):
            for word, first, second in ((order[2 * number], 32, 24), (order[2 * number + 1], 16, 63)):
                v[a] = v[a] + v[b] + words[word]
                v[d] = _rotated(v[d] ^ v[a], first)
                v[c] = v[c] + v[d]
                v[b] = _rotated(v[b] ^ v[c], second)
    for index in range(8):
        store(state + 8 * index, chained[index] ^ v[index] ^ v[index + 8])
    returns(u64(0))


def digest(h: FunctionHart) -> None:
    """(chained value, address, bytes before it): the blocks of a page from there on."""
    state, at, before = param("p0"), param("p1"), param("p2")
    after = before + _BLOCK
    last = after == _BLOCK + _PAGE
    call("compress", state, at, after, select(last, u64((1 << 64) - 1), u64(0)))
    if last:
        returns(u64(0))
    returns(*call("digest", state, at + _BLOCK, after))


def know(h: FunctionHart) -> None:
    """(page, whose bytes are new): its identity; its records lead to the code that there is."""
    page = param("p1")
    h.set("fresh_page", page)
    table = load(h.machine("known"))
    if table == 0:
        returns(u64(0))
    state = h.machine("digest")
    for index, word in enumerate(_IV):
        store(state + 8 * index, u64(word ^ (0x01010000 | KEY_BYTES << 8 | DIGEST_BYTES if index == 0 else 0)))
    call("compress", state, h.machine("key"), u64(_BLOCK), u64(0))
    call("digest", state, page + machine_state.PAGE_COPY, u64(_BLOCK))
    first, second = load(state), load(state + 8)
    store(page + machine_state.PAGE_IDENTITY_END, second)
    store(page + machine_state.PAGE_IDENTITY, select(first == 0, u64(1), first))
    entry, _ = call("find_known", table, first, second, first)
    if entry == 0:
        returns(u64(0))
    store(entry + Entry.used.offset, u64(1))
    regions = load(h.machine("regions"))
    place = load(entry + Entry.templates.offset)
    if place != 0:
        relative = load(h.machine("templates")) + place
        base = tracer().pure("address", (), 64, ("decode",))
        call("template_install", page, base + relative, relative, regions)
        store(h.machine("templates_laid"), load(h.machine("templates_laid")) + 1)
    laid, _ = call("lay_regions", page, load(entry + Entry.regions.offset), regions, u64(0))
    store(h.machine("regions_laid"), load(h.machine("regions_laid")) + laid)
    returns(u64(0))


def find_known(h: FunctionHart) -> None:
    """(table, the identity's words, index to begin at) -> the entry, or 0."""
    table, first, second, index = (param(f"p{number}") for number in range(4))
    entry = table + TABLE_HEAD + (index & load(table)) * ctypes.sizeof(Entry)
    there = load(entry, 64, "volatile")
    if there == 0:
        returns(u64(0))
    if (there == first) & (load(entry + Entry.second.offset) == second):
        returns(entry)
    returns(*call("find_known", table, first, second, index + 1))


def lay_regions(h: FunctionHart) -> None:
    """(page, the first of its regions or 0, what their records are at least, how many before) -> how many there are."""
    page, region, regions, count = (param(f"p{index}") for index in range(4))
    if region == 0:
        returns(count)
    offset = load(region + Region.head.offset)
    raw = load(page + machine_state.PAGE_COPY + offset, 32, "plain", 1)
    record, _ = call("decode_word", select((raw & 3) == 3, raw, raw & 0xFFFF).zext(64), offset)
    target = (regions + load(region + Region.at.offset)) & 0xFFFFFFFF
    there = page + machine_state.PAGE_RECORDS + (offset << 2)
    store(there, (record & ~0xFFFFFFFF) | target, "volatile")
    returns(*call("lay_regions", page, load(region + Region.next.offset), regions, count + 1))


FUNCTIONS = {
    "compress": (4, compress),
    "digest": (3, digest),
    "know": (2, know),
    "find_known": (4, find_known),
    "lay_regions": (4, lay_regions),
}
