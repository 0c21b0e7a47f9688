"""The TLBs of a hart: banks, the second level, filling, forgetting. Native code.

A block holds the data and fetch entries of one mode (U, S, S with SUM), a bank the three blocks of one address space. Behind
all of them stands a second level, looked at before page tables are walked. Its entries carry the *stamp* of their block:
a block that is emptied gets a new one, and what the second level holds of it is void. Entries of global pages in the upper
half are the same in all address spaces: SFENCE.VMA with an ASID leaves them alone (12.2.1), and a new bank begins with those
of the one before. Written as softmmu.py is; collected by routines.py.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmcore.engine import hart_state
from kvmcore.engine.native_hart import EXITED, PAGE_MASK, Code, FunctionHart, atomic, call, load, param, returns, store
from kvmcore.engine.softmmu import NEVER, p1, p2, p3
from kvmcore.ir.value import Value, select, u64
from kvmcore.isa import paging

_ASID_SHIFT, _ASID_MASK = 44, 0xFFFF
_KINDS = ("data", "fetch")


def _data_entry(tlb: Value, va: Value) -> Value:
    return tlb + ((va >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))


def _fetch_entry(tlb: Value, va: Value) -> Value:
    return tlb + (((va >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) << 4) + hart_state.FETCH_TLB_OFFSET


def _second(h: Code, kind: str, va: Value) -> tuple[Value, Value]:
    """The two entries of the second level that a page may have."""
    number = va >> 12
    size = hart_state.SECOND_ENTRY[kind]
    hashed = (number ^ (number >> 9) ^ (number >> 18)) & (hart_state.SECOND_SETS[kind] - 1)
    first = h.address(f"second_{kind}") + hashed * (2 * size)
    return first, first + size


def _bank(h: Code, bank: Value) -> Value:
    return h.address("tlb_blocks") + bank * hart_state.TLB_BANK


# -- filling -------------------------------------------------------------------------------------------------


def _note_fill(h: Code, kind: str, entry: Value) -> None:
    """Remember an entry of the bank in use, for clear_bank."""
    bank = h.get("bank")
    count = h.get_at(f"{kind}_fills", bank)
    index = select(count < hart_state.FILL_LOG, count, u64(hart_state.FILL_LOG))
    h.set_at(f"{kind}_log", bank * (hart_state.FILL_LOG + 1) + index, entry)
    h.set_at(f"{kind}_fills", bank, index + 1)


def _stamp(h: Code, kind: str, va: Value) -> Value:
    """The stamp of the block in use, that gets what was just walked: a new one when this is the first entry that is not the
    same in all address spaces, for other banks may have begun with the block's entries."""
    at = h.get("tlb") + 8 * _KINDS.index(kind)
    foreign = ((h.get("walk_pte") & paging.G) == 0) | ((va >> 63) == 0)
    before = load(at + hart_state.BLOCK_FOREIGN)
    new = foreign & (before == 0)
    last = h.get("last_stamp") + new.zext(64)
    h.set("last_stamp", last)
    stamp = select(new, last, load(at + hart_state.BLOCK_STAMPS))
    store(at + hart_state.BLOCK_STAMPS, stamp)
    store(at + hart_state.BLOCK_FOREIGN, before | foreign.zext(64))
    return stamp


def _fill_second(h: Code, kind: str, va: Value, words: tuple[Value, ...]) -> None:
    """The older of the two entries goes."""
    first, second = _second(h, kind, va)
    for index, word in enumerate(words):
        store(second + 8 * index, load(first + 8 * index))
        store(first + 8 * index, word)


def _fill_first(h: Code, va: Value, for_stores: Value, difference: Value, mask: Value) -> None:
    entry = _data_entry(h.get("tlb"), va)
    store(entry, va & PAGE_MASK)
    store(entry + 8, for_stores)
    store(entry + 16, difference)
    store(entry + 24, mask)
    _note_fill(h, "data", entry)


def fill_data(h: FunctionHart) -> None:
    """(va, host minus guest address, tag for stores, mask) of what was just walked."""
    va, difference, for_stores, mask = p1(), p2(), p3(), param("p4")
    stamp = _stamp(h, "data", va)
    _fill_first(h, va, for_stores, difference, mask)
    _fill_second(h, "data", va, (va & PAGE_MASK, stamp, for_stores, difference, mask))
    returns(u64(0))


def second_data_function(write: bool) -> Callable[[FunctionHart], None]:
    def second_data(h: FunctionHart) -> None:
        """(va) -> host address, if the second level knows it, and the TLB as well then; else EXITED."""
        va = p1()
        stamp = load(h.get("tlb") + hart_state.BLOCK_STAMPS)
        for entry in _second(h, "data", va):
            if (load(entry + (16 if write else 0)) == (va & PAGE_MASK)) & (load(entry + 8) == stamp):
                difference = load(entry + 24)
                _fill_first(h, va, load(entry + 16), difference, load(entry + 32))
                returns(va + difference)
        returns(u64(0), EXITED)

    return second_data


def fill_fetch(h: FunctionHart) -> None:
    """(va, what turns pc * 4 into a record's address) of what was just walked."""
    va, ab = p1(), p2()
    stamp = _stamp(h, "fetch", va)
    _fill_first_fetch(h, va, ab)
    _fill_second(h, "fetch", va, (va & PAGE_MASK, stamp, ab))
    returns(u64(0))


def _fill_first_fetch(h: Code, va: Value, ab: Value) -> None:
    entry = _fetch_entry(h.get("tlb"), va)
    store(entry, va & PAGE_MASK)
    store(entry + 8, ab)
    _note_fill(h, "fetch", entry)


def second_fetch(h: FunctionHart) -> None:
    """(va) -> as fill_fetch is given, if the second level knows it, and the TLB as well then; else EXITED."""
    va = p1()
    stamp = load(h.get("tlb") + (hart_state.BLOCK_STAMPS + 8))
    for entry in _second(h, "fetch", va):
        if (load(entry) == (va & PAGE_MASK)) & (load(entry + 8) == stamp):
            ab = load(entry + 16)
            _fill_first_fetch(h, va, ab)
            returns(ab)
    returns(u64(0), EXITED)


# -- forgetting ----------------------------------------------------------------------------------------------


def clear_bank_function(kind: str) -> Callable[[FunctionHart], None]:
    index = _KINDS.index(kind)

    def clear_bank(h: FunctionHart) -> None:
        """(bank, address of a block that is left alone, or 0): no tag of the others fits any address."""
        bank, kept = p1(), p2()
        base = _bank(h, bank)
        count, last = h.get_at(f"{kind}_fills", bank), h.get("last_stamp")
        for block in range(hart_state.TLB_BLOCKS):
            at = base + block * hart_state.TLB_BLOCK
            stamp, foreign = at + (hart_state.BLOCK_STAMPS + 8 * index), at + (hart_state.BLOCK_FOREIGN + 8 * index)
            store(stamp, select(at == kept, load(stamp), last + (block + 1)))
            store(foreign, select(at == kept, load(foreign), u64(0)))
        h.set("last_stamp", last + hart_state.TLB_BLOCKS)
        if count <= hart_state.FILL_LOG:
            log = h.address(f"{kind}_log") + bank * (8 * (hart_state.FILL_LOG + 1))
            call(f"clear_logged_{kind}", log, count, kept)
            h.set_at(f"{kind}_fills", bank, select(kept == 0, u64(0), count))
            returns(u64(0))
        entries = hart_state.DATA_TLB_ENTRIES if kind == "data" else hart_state.FETCH_TLB_ENTRIES
        for block in range(hart_state.TLB_BLOCKS):
            at = base + block * hart_state.TLB_BLOCK
            first = at if kind == "data" else at + hart_state.FETCH_TLB_OFFSET
            call(f"clear_{kind}", first, select(at == kept, u64(0), u64(entries)))
        h.set_at(f"{kind}_fills", bank, select(kept == 0, u64(0), u64(hart_state.FILL_LOG + 1)))
        returns(u64(0))

    return clear_bank


def clear_logged_function(kind: str) -> Callable[[FunctionHart], None]:
    def clear_logged(h: FunctionHart) -> None:
        """(log, how many, the block that is left alone)."""
        log, count, kept = param("p0"), p1(), p2()
        if count == 0:
            returns(u64(0))
        entry = load(log)
        stays = (entry - kept) < hart_state.TLB_BLOCK
        for tag in (0, 8) if kind == "data" else (0,):
            store(entry + tag, select(stays, load(entry + tag), u64(NEVER)))
        returns(*call(f"clear_logged_{kind}", log + 8, count - 1, kept))

    return clear_logged


def clear_function(size: int, tags: tuple[int, ...]) -> Callable[[FunctionHart], None]:
    name = "clear_data" if len(tags) == 2 else "clear_fetch"

    def clear(h: FunctionHart) -> None:
        """(entry, how many, a multiple of 4)."""
        entry, count = param("p0"), p1()
        if count == 0:
            returns(u64(0))
        for index in range(4):
            for tag in tags:
                store(entry + (index * size + tag), u64(NEVER))
        returns(*call(name, entry + 4 * size, count - 4))

    return clear


def flush_tlb(h: FunctionHart) -> None:
    """All translations of this hart. Banks that are not in use are cleared when they are used again."""
    h.set("count_flush", h.get("count_flush") + 1)
    bank = h.get("bank")
    kept = h.get_at("bank_satp", bank)
    for number in range(hart_state.TLB_BANKS):
        h.set_at("bank_satp", number, u64(NEVER))
    h.set_at("bank_satp", bank, kept)
    for kind in _KINDS:
        call(f"clear_bank_{kind}", h.s, bank, u64(0))
    for half in (0, 1):
        h.set_at("large_low", half, u64(NEVER))
        h.set_at("large_high", half, u64(0))
    returns(u64(0))


def flush_foreign(h: FunctionHart) -> None:
    """(bank): all but the entries of S that are the same in all address spaces."""
    bank = p1()
    shared = _bank(h, bank) + hart_state.TLB_BLOCK
    for index, kind in enumerate(_KINDS):
        kept = select(load(shared + (hart_state.BLOCK_FOREIGN + 8 * index)) == 0, shared, u64(0))
        call(f"clear_bank_{kind}", h.s, bank, kept)
    returns(u64(0))


def flush_asid(h: FunctionHart) -> None:
    """(ASID): the translations of an address space, those of global pages excepted."""
    asid = p1() & _ASID_MASK
    h.set("count_flush", h.get("count_flush") + 1)
    for number in range(hart_state.TLB_BANKS):
        satp = h.get_at("bank_satp", number)
        if (satp == NEVER) | (((satp >> _ASID_SHIFT) & _ASID_MASK) == asid):
            call("flush_foreign", h.s, u64(number))
    returns(u64(0))


def flush_page(h: FunctionHart) -> None:
    """(va): its translation, and all of them of that half if it may belong to a superpage."""
    va = p1()
    half = va >> 63
    if (va >= (h.get_at("large_low", half) & ~0x3FFFFFFF)) & (va <= (h.get_at("large_high", half) | 0x3FFFFFFF)):
        if half != 0:
            returns(*call("flush_tlb", h.s))
        h.set("count_flush", h.get("count_flush") + 1)
        for number in range(hart_state.TLB_BANKS):
            call("flush_foreign", h.s, u64(number))
        h.set_at("large_low", 0, u64(NEVER))
        h.set_at("large_high", 0, u64(0))
        returns(u64(0))
    for block in range(hart_state.TLB_BANKS * hart_state.TLB_BLOCKS):
        base = h.address("tlb_blocks") + block * hart_state.TLB_BLOCK
        entry = _data_entry(base, va)
        store(entry, u64(NEVER))
        store(entry + 8, u64(NEVER))
        store(_fetch_entry(base, va), u64(NEVER))
    for entry in _second(h, "data", va):
        store(entry, u64(NEVER))
        store(entry + 16, u64(NEVER))
    for entry in _second(h, "fetch", va):
        store(entry, u64(NEVER))
    returns(u64(0))


def flush_fetch(h: FunctionHart) -> None:
    """fence.i: decoded pages are compared with memory before they are entered again."""
    epoch = atomic("add", h.machine("epoch"), u64(1)) + 1
    bank = h.get("bank")
    h.set("code_epoch", epoch)
    h.set_at("bank_epoch", bank, epoch)
    call("clear_bank_fetch", h.s, bank, u64(0))
    returns(u64(0))


# -- banks ---------------------------------------------------------------------------------------------------


def choose_tlb(h: FunctionHart) -> None:
    """-> the TLB block for the mode, in the bank of satp."""
    satp, mxr = h.get("satp"), h.get("mxr")
    if (satp != h.get("context_satp")) | (mxr != h.get("context_mxr")):
        h.set("context_satp", satp)
        h.set("context_mxr", mxr)
        call("choose_bank", h.s, select(mxr == 0, satp, u64(NEVER)))
    block = select(h.get("mode") == 0, u64(0), h.get("sum").zext(64) + 1)
    tlb = h.address("tlb_blocks") + h.get("bank") * hart_state.TLB_BANK + block * hart_state.TLB_BLOCK
    h.set("tlb", tlb)
    returns(tlb)


def choose_bank(h: FunctionHart) -> None:
    """(satp): the bank of this address space, or else the one that was given up longest ago, emptied but for what is the same
    in all address spaces.

    All ones, which is no satp, is for the rare MXR: a bank that nobody finds again.
    """
    satp = p1()
    if satp != NEVER:
        for number in range(hart_state.TLB_BANKS):
            if h.get_at("bank_satp", number) == satp:
                h.set("bank", number)
                if h.get_at("bank_epoch", number) != h.get("code_epoch"):
                    call("clear_bank_fetch", h.s, u64(number), u64(0))
                    h.set_at("bank_epoch", number, h.get("code_epoch"))
                returns(u64(0))
    before, bank = h.get("bank"), h.get("next_bank")
    shared, place = (_bank(h, number) + hart_state.TLB_BLOCK for number in (before, bank))
    foreign = load(shared + hart_state.BLOCK_FOREIGN) | load(shared + (hart_state.BLOCK_FOREIGN + 8))
    known = (satp != NEVER) & (h.get_at("bank_satp", before) != NEVER)
    same = known & (foreign == 0) & (h.get_at("bank_epoch", before) == h.get("code_epoch"))
    h.set("next_bank", (bank + 1) & (hart_state.TLB_BANKS - 1))
    h.set("bank", bank)
    h.set_at("bank_satp", bank, satp)
    h.set_at("bank_epoch", bank, h.get("code_epoch"))
    for kind in _KINDS:
        call(f"clear_bank_{kind}", h.s, bank, select(same, place, u64(0)))
    if same & (bank != before):
        call("copy", place, shared, u64(hart_state.TLB_BLOCK))
        for kind in _KINDS:
            h.set_at(f"{kind}_fills", bank, u64(hart_state.FILL_LOG + 1))
    returns(u64(0))


FUNCTIONS: dict[str, tuple[int, Callable[[FunctionHart], None]]] = {
    "fill_data": (5, fill_data),
    "second_load": (2, second_data_function(False)),
    "second_store": (2, second_data_function(True)),
    "fill_fetch": (3, fill_fetch),
    "second_fetch": (2, second_fetch),
    **{f"clear_bank_{kind}": (3, clear_bank_function(kind)) for kind in _KINDS},
    **{f"clear_logged_{kind}": (3, clear_logged_function(kind)) for kind in _KINDS},
    "clear_data": (2, clear_function(32, (0, 8))),
    "clear_fetch": (2, clear_function(16, (0,))),
    "flush_tlb": (1, flush_tlb),
    "flush_foreign": (2, flush_foreign),
    "flush_asid": (2, flush_asid),
    "flush_page": (2, flush_page),
    "flush_fetch": (1, flush_fetch),
    "choose_tlb": (1, choose_tlb),
    "choose_bank": (2, choose_bank),
}
"""For routines.FUNCTIONS."""
