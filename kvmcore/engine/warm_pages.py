"""Decoded pages that are made before the guest runs: those that it used where it ran before, so that it need not begin with
leaving native code for each.

A page is made from what is in memory now and is compared with it when a hart first enters it (code_pages.py), so that what
changes meanwhile does no harm. Called by hot_code.py with the machine quiesced.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvmcore.engine import hart_state, machine_state

if TYPE_CHECKING:
    from kvmcore.engine.machine import Machine

MOST = 768
"""Pages; decoded, each has 20 KB."""
_WORD = (1 << 64) - 1
_PAGE_MASK = 0xFFF


def in_use(machine: Machine) -> list[int]:
    """Guest-physical addresses of decoded pages, at most MOST, each once: those that fetch TLBs lead to, then the latest. Harts
    may run."""
    start, end = machine.state.pool, machine.state.pool + machine.state.pool_used
    entries = ctypes.c_uint64 * (2 * hart_state.FETCH_TLB_ENTRIES)
    found: dict[int, None] = {}
    for hart in machine.harts:
        blocks = hart.address + hart_state.offset("tlb_blocks") + hart_state.FETCH_TLB_OFFSET
        for block in range(hart_state.TLB_BANKS * hart_state.TLB_BLOCKS):
            words = list(entries.from_address(blocks + block * hart_state.TLB_BLOCK))
            for tag, ab in zip(words[::2], words[1::2], strict=True):
                page = ((tag << 2) + ab - machine_state.PAGE_RECORDS) & _WORD
                if start <= page < end and (page - start) % machine_state.PAGE_STRIDE == 0:
                    _note(found, page)
    for page in range(end - machine_state.PAGE_STRIDE, start - 1, -machine_state.PAGE_STRIDE):
        if len(found) >= MOST:
            break
        _note(found, page)
    return list(found)[:MOST]


def _note(found: dict[int, None], page: int) -> None:
    if _word(page + machine_state.PAGE_HOST).value:  # 0: it is used no more
        found[_word(page + machine_state.PAGE_GPA).value] = None


def make(machine: Machine, gpas: Iterable[int]) -> list[int]:
    """The decoded pages of these addresses, made if they are not there. What is no memory, or memory that has yet to come, is
    left out, and what the pool has no room for."""
    pages = []
    for gpa in gpas:
        slot = next((slot for slot in machine.slots if slot.start <= gpa < slot.end), None)
        if slot is None or slot.flags & machine_state.SLOT_ABSENT or slot.userfault or gpa & _PAGE_MASK:
            continue
        page = _made(machine, gpa, (gpa + slot.delta) & _WORD)
        if page:
            pages.append(page)
    for hart in machine.harts:
        hart.flush_icache()
    return pages


def _made(machine: Machine, gpa: int, host: int) -> int:
    state = machine.state
    bucket = (gpa >> 12) & (machine_state.PAGE_BUCKETS - 1)
    page = state.buckets[bucket]
    while page:
        if _word(page + machine_state.PAGE_GPA).value == gpa and _word(page + machine_state.PAGE_HOST).value == host:
            return int(page)
        page = _word(page + machine_state.PAGE_NEXT).value
    if state.pool_used + machine_state.PAGE_STRIDE > state.pool_size:
        return 0
    page = state.pool + state.pool_used
    state.pool_used += machine_state.PAGE_STRIDE
    ctypes.memmove(page + machine_state.PAGE_COPY, host, 4096)
    last = page + machine_state.PAGE_RECORDS + 2048 * machine_state.RECORD
    for at, value in (
        (page + machine_state.PAGE_GPA, gpa),
        (page + machine_state.PAGE_IDENTITY, 0),
        (page + machine_state.PAGE_USED, 1),
        (page + machine_state.PAGE_HOST, host),
        (page + machine_state.PAGE_NEXT, state.buckets[bucket]),
        (page + machine_state.PAGE_CHECKED, 0),  # before any fence.i: it is compared first
        (last, machine.image.functions["page_end"]),
    ):
        _word(at).value = value
    state.buckets[bucket] = page
    return int(page)


def _word(address: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(address)
