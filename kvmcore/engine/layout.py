"""Sizes and offsets of what native code keeps beside HartState: TLBs, code pages, slots, the machine.

Imported by the emitters and by machine.py; the image records a hash of these sources, so both always agree.
"""

from __future__ import annotations

import ctypes

from kvmcore.engine import hart_state
from kvmcore.engine.hart_state import Field

# -- data TLB: entries {read tag, write tag, addend, superpage mask}, one block per way of looking at memory ------
DATA_ENTRIES = 512
DATA_ENTRY = 32
TAG_READ, TAG_WRITE, ADDEND, SUPERPAGE = 0, 8, 16, 24
NO_TAG = (1 << 64) - 1
"""Is no page address: an entry that never matches."""
DATA_BLOCK = DATA_ENTRIES * DATA_ENTRY
BLOCK_U, BLOCK_S, BLOCK_SUM = 0, 1, 2
"""U-mode; S-mode; S-mode with SUM."""

# -- fetch TLB: entries {tag, abase} -------------------------------------------------------------------------------
FETCH_ENTRIES = 512
FETCH_ENTRY = 16
FETCH_BLOCK = FETCH_ENTRIES * FETCH_ENTRY

# -- a bank: everything that is known of one value of satp ------------------------------------------------------------
BANKS = 4
BANK_HEADER = 64
BANK_SATP, BANK_STALE, BANK_MXR, BANK_SUPERPAGES = 0, 8, 16, 24
BANK_DATA = BANK_HEADER
BANK_FETCH = BANK_DATA + 3 * DATA_BLOCK
BANK_SIZE = BANK_FETCH + 2 * FETCH_BLOCK + 4096 - 64
"""Not a multiple of the L1's way size, so that the banks do not fight for the same lines."""

# -- code pages ---------------------------------------------------------------------------------------------------------
RECORD = 8
RECORDS = 2048
PAGE_HEADER = 64
PAGE_COPY, PAGE_ADDRESS, PAGE_EPOCH, PAGE_NEXT = 0, 8, 16, 24
"""Header: address of the copy of the bytes; guest-physical page; code epoch of the last check; hash chain."""
PAGE_STRIDE = PAGE_HEADER + RECORDS * RECORD + 128
"""Records, then the sentinel that runs off the page; 128 so that pages do not alias in the caches."""
PAGE_HASH = 4096
"""Heads of the hash chains: addresses of headers."""

# -- records for instructions that lie in two pages: {raw, key, record, -, sentinel} ----------------------------------
SCRATCH_ENTRIES = 64
SCRATCH_ENTRY = 64
SCRATCH_RAW, SCRATCH_RECORD = 0, 16
SCRATCH_SIZE = SCRATCH_ENTRIES * SCRATCH_ENTRY

HART_SIZE = (hart_state.SIZE + 4095) & ~4095
HART_BYTES = HART_SIZE + SCRATCH_SIZE + BANKS * BANK_SIZE

# -- memory slots, sorted by address ------------------------------------------------------------------------------------
SLOT_GPA, SLOT_END, SLOT_ADDEND, SLOT_FLAGS, SLOT_BITMAP = 0, 8, 16, 24, 32
SLOT_SIZE = 40
SLOT_READONLY, SLOT_ABSENT = 1, 2

MACHINE_FIELDS: tuple[Field, ...] = (
    Field("slots", 64, "address of the slots"),
    Field("slot_count", 64, "how many"),
    Field("pool", 64, "address of the first code page"),
    Field("copies", 64, "address of the copy of the first code page's bytes"),
    Field("page_hash", 64, "address of the heads of the hash chains"),
    Field("pool_pages", 64, "code pages that fit"),
    Field("pool_used", 64, "code pages in use"),
    Field("lock", 32, "spin lock over code pages and decoding", shared=True),
    Field("pad", 32, "-"),
    Field("code_epoch", 64, "counts fence.i of all harts", shared=True),
    Field("clock", 64, "address of clock_gettime()"),
    Field("yield_", 64, "address of sched_yield()"),
    Field("time_delta", 64, "guest time minus the host's monotonic time, in units of 100 ns"),
    Field("harts", 64, "address of the table of HartState addresses, by index"),
    Field("hart_count", 64, "entries of the table"),
    Field("imsic_base", 64, "guest-physical address of hart 0's IMSIC page; all ones: none"),
    Field("imsic_end", 64, "behind the last one; pages lie one behind the other"),
    Field("switch_interval", 64, "instructions between two visits of the slow path"),
)

_TYPES = {32: ctypes.c_uint32, 64: ctypes.c_uint64}


class MachineState(ctypes.Structure):
    """What native code knows of a VM."""

    _fields_ = [(field.name, _TYPES[field.bits]) for field in MACHINE_FIELDS]


MACHINE_SIZE = ctypes.sizeof(MachineState)


def machine_offset(name: str) -> tuple[int, int]:
    """(byte offset, bits) of a field of MachineState."""
    bits = next(field.bits for field in MACHINE_FIELDS if field.name == name)
    return int(getattr(MachineState, name).offset), bits


class Slot(ctypes.Structure):
    """One memory slot, as native code sees it."""

    _fields_ = [
        ("gpa", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("addend", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("bitmap", ctypes.c_uint64),
    ]
