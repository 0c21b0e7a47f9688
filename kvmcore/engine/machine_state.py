"""The layout of what the harts of one machine share: memory slots, decoded pages, time.

Native code and Python read it; Python writes it only while no hart is in native code (Machine.quiesce),
except for `stop`. One table, as hart_state.py's.
"""

from __future__ import annotations

import ctypes

_U64 = ctypes.c_uint64


class Slot(ctypes.Structure):
    """Guest-physical memory [start, end); host address = guest address + delta. Sorted, disjoint.

    dirty, userfault: addresses of bitmaps, one bit per page, or 0. A page whose userfault bit is set is not there yet.
    """

    _fields_ = [
        ("start", _U64),
        ("end", _U64),
        ("delta", _U64),
        ("flags", _U64),
        ("dirty", _U64),
        ("userfault", _U64),
    ]


SLOT_READONLY = 1
#: No host memory behind it: any access is KVM_RUN's EFAULT.
SLOT_ABSENT = 2

#: Bytes of a BLAKE2b block.
KEY_BLOCK = 128

#: Buckets of the table that finds the decoded page of a guest-physical page.
PAGE_BUCKETS = 4096


#: Entries of the direct-mapped cache of what device accesses do.
ACCESSES = 256
ACCESS_HASH = 0x9E3779B1


class BusEntry(ctypes.Structure):
    """An ioeventfd (`fd`) or a coalesced zone, in the order in which they are asked."""

    _fields_ = [
        ("start", _U64),
        ("size", _U64),  # of a zone; of the store that an ioeventfd takes, 0: any
        ("kind", _U64),
        ("match", _U64),
        ("fd", _U64),
    ]


BUS_EVENT, BUS_MATCHING_EVENT, BUS_ZONE = 1, 2, 3
#: The table: the number of entries, then they.
BUS_HEAD = 8
BUS_ENTRY = ctypes.sizeof(BusEntry)
BUS_OFFSET: dict[str, int] = {name: getattr(BusEntry, name).offset for name, *_ in BusEntry._fields_}


class MachineState(ctypes.Structure):
    """Fields by name; `slots` and `pool` are addresses."""

    _fields_ = [
        ("stop", _U64),  # harts must not enter native code
        ("slots", _U64),
        ("slot_count", _U64),
        ("main_slot", _U64),  # address of the largest slot whose pages are all there, or of an empty one
        ("pool", _U64),  # decoded pages, PAGE_STRIDE bytes each
        ("pool_used", _U64),  # bytes from its beginning on that have been handed out
        ("pool_size", _U64),
        ("free", _U64),  # address of the first page that was given back, or 0; PAGE_NEXT leads to the next one
        ("lock", _U64),  # of the tables of decoded pages
        ("epoch", _U64),  # counts fence.i of all harts
        ("time_mult", _U64),  # guest ticks per host tick, times 2**64 / 2**12
        ("time_base", _U64),  # guest time at host tick 0
        ("harts", _U64),
        ("templates", _U64),  # what a record's handler offset is at least when it is no handler of the image
        ("regions", _U64),  # what a record's handler offset is at least when a region begins there
        ("watch", _U64),  # whether a hart leaves (PROFILE) when it enters a page that it has just decoded
        ("imsic_start", _U64),  # guest-physical address of the first IMSIC page
        ("imsic_size", _U64),  # bytes from there to the end of the last one
        ("imsic_harts", _U64),  # address of a table: the hart's block for each of these pages, or 0
        ("aplic_start", _U64),  # guest-physical address of the APLIC, whose accesses are Python's; all ones: none
        ("bus", _U64),  # address of the table of ioeventfds and coalesced zones, or 0
        ("ring", _U64),  # address of the coalesced-MMIO ring
        ("ring_lock", _U64),
        ("one", _U64),  # 1: what an eventfd is written
        ("known", _U64),  # address of the table of known pages (page_identity.py), or 0: nothing is known of any
        ("key", _U64 * (KEY_BLOCK // 8)),  # first block of what identities are digests of: the host's secret, then zeros
        ("digest", _U64 * 8),  # scratch for one, under the lock
        ("templates_laid", _U64),  # decoded pages that got template code, and regions that were laid, by native code
        ("regions_laid", _U64),
        ("accesses", _U64 * ACCESSES),  # completion.packed of instructions that have left with MMIO
        ("buckets", _U64 * PAGE_BUCKETS),  # address of the first decoded page, or 0
    ]


OFFSET: dict[str, int] = {name: getattr(MachineState, name).offset for name, *_ in MachineState._fields_}
SLOT_SIZE = ctypes.sizeof(Slot)
SLOT_OFFSET: dict[str, int] = {name: getattr(Slot, name).offset for name, *_ in Slot._fields_}

# A decoded page: header, the guest page's bytes as they were decoded, records, the page-end record.
PAGE_GPA = 0
#: Host address of the guest page; 0: nobody enters the decoded page any more, for it is free or its bytes have changed.
PAGE_HOST = 8
PAGE_NEXT = 16
PAGE_CHECKED = 24
#: What the page's bytes are, for regions that go on in it: a keyed hash of them, or 0 while nobody knows.
PAGE_IDENTITY = 32
#: How often a fetch TLB was filled with the page, at most MOST_USED, less how often the hand has come by that looks for room.
PAGE_USED = 40
MOST_USED = 7
#: Second half of the identity.
PAGE_IDENTITY_END = 48
PAGE_HEADER = 64
PAGE_COPY = PAGE_HEADER
PAGE_RECORDS = PAGE_HEADER + 4096 + 64
RECORD = 8
PAGE_STRIDE = PAGE_RECORDS + 2048 * RECORD + 64
