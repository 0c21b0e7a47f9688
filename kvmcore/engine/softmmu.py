"""The slow half of guest memory: TLB fills, slots, page-crossing and device accesses, TLB flushes. Native code.

The fast half (a TLB hit) is in each handler, see lowering.py. The page walk itself is isa/paging.py, traced into
@walk_load, @walk_store and @walk_fetch by interpreter.py. Called only from native code, by the hart's own thread.
"""

from __future__ import annotations

from errno import EFAULT, EOPNOTSUPP

from kvmcore.engine import layout
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.layout import (
    ADDEND, BANK_DATA, BANK_FETCH, BANK_MXR, BANK_SATP, BANK_SIZE, BANK_STALE, BANK_SUPERPAGES, BANKS, BLOCK_S,
    BLOCK_SUM, DATA_BLOCK, DATA_ENTRIES, DATA_ENTRY, FETCH_BLOCK, FETCH_ENTRIES, FETCH_ENTRY, NO_TAG, SLOT_ABSENT,
    SLOT_ADDEND, SLOT_BITMAP, SLOT_END, SLOT_FLAGS, SLOT_GPA, SLOT_READONLY, SLOT_SIZE, SUPERPAGE, TAG_READ,
    TAG_WRITE,
)  # fmt: skip
from kvmcore.engine.native import EXIT, OK, TRAP, Native
from kvmcore.ir.code import Expr

PAGE = -4096
LOAD_ACCESS_FAULT, STORE_ACCESS_FAULT = 5, 7
WRITABLE = 1 << 2 | 1 << 7
"""W and D of a leaf entry: a store through it needs no walk of its own."""
READABLE = 1 << 1


def functions() -> list[str]:
    """The definitions."""
    return [
        _find_slot(),
        _mark_dirty(),
        _no_memory(),
        _fill("load"),
        _fill("store"),
        _host_address("load"),
        _host_address("store"),
        _slow_load(),
        _slow_store(),
        _zero_block(),
        _check_block(),
        _load_physical(),
        _cas_physical(),
        _clear_bank(),
        _flush_page(),
        _sfence_vma(),
        _context_changed(),
    ]


def _find_slot() -> str:
    """Address of the slot that holds a guest-physical address, or 0."""
    c = Native("find_slot", ["s", "pa"], 64)
    pa = c.parameters[1]
    machine = c.machine()
    slots, count = c.machine_get(machine, "slots"), c.machine_get(machine, "slot_count")
    cached = c.get("slot_cache")
    with c.if_(cached < count):
        slot = slots + cached * SLOT_SIZE
        with c.if_(pa - c.load(slot, SLOT_GPA) < c.load(slot, SLOT_END) - c.load(slot, SLOT_GPA)):
            c.ret(slot)
    low, high = c.var(0), c.var(count)
    with c.while_(lambda: low.value < high.value):
        middle = (low.value + high.value) >> 1
        slot = slots + middle * SLOT_SIZE

        def beyond(middle: Expr = middle, slot: Expr = slot) -> None:
            with c.if_(pa < c.load(slot, SLOT_END)):
                c.set("slot_cache", middle)
                c.ret(slot)
            low.value = middle + 1

        with c.if_else(pa < c.load(slot, SLOT_GPA), beyond):
            high.value = middle
    c.ret(0)
    return c.text()


def _mark_dirty() -> str:
    """Log a write to a page of a slot; 1 if its bit was not set before."""
    c = Native("mark_dirty", ["s", "slot", "pa"], 64)
    _, slot, pa = c.parameters
    bitmap = c.load(slot, SLOT_BITMAP)
    with c.if_(bitmap == 0):
        c.ret(0)
    page = (pa - c.load(slot, SLOT_GPA)) >> 12
    bit = c.const(1) << (page & 63)
    word = bitmap + ((page >> 6) << 3)
    with c.if_((c.load(word, volatile=True) & bit) != 0):
        c.ret(0)
    c.ret(((c.atomic("or", word, bit) & bit) == 0).zext())
    return c.text()


def _no_memory() -> str:
    """Nothing to access at `pa`. plain: an integer load or store, which may become MMIO. Returns EXIT."""
    c = Native("no_memory", ["s", "slot", "va", "pa", "size", "plain", "kind"], 64)
    _, slot, va, pa, size, plain, kind = c.parameters
    c.set("exit_gpa", pa)
    c.set("exit_va", va)
    c.set("exit_len", size.trunc(32))
    c.set("exit_kind", c.select(plain != 0, kind.trunc(32), int(ExitKind.ERROR), 32))
    c.set("exit_errno", EOPNOTSUPP)
    with c.if_(slot != 0), c.if_((c.load(slot, SLOT_FLAGS) & SLOT_ABSENT) != 0):
        c.set("exit_kind", int(ExitKind.ERROR))
        c.set("exit_errno", EFAULT)
    c.ret(EXIT)
    return c.text()


def _fill(access: str) -> str:
    """Make the TLB know `va`. slow_value = physical address; status OK, TRAP or EXIT (no memory, dirty budget)."""
    write = access == "store"
    c = Native(f"fill_{access}", ["s", "tlb", "va", "size", "plain"], 64)
    s, tlb, va, size, plain = c.parameters
    c.count("count_fill")
    status = c.call(f"walk_{access}", s, va)
    with c.if_(status != OK):
        c.ret(status)
    pa = c.get("walk_pa")
    slot = c.call("find_slot", s, pa)
    kind = int(ExitKind.MMIO_WRITE if write else ExitKind.MMIO_READ)
    with c.if_(slot == 0):
        c.ret(c.call("no_memory", s, slot, va, pa, size, plain, kind))
    flags = c.load(slot, SLOT_FLAGS)
    with c.if_((flags & (SLOT_ABSENT | (SLOT_READONLY if write else 0))) != 0):
        c.ret(c.call("no_memory", s, slot, va, pa, size, plain, kind))
    pte = c.get("walk_pte")
    writable = c.var(NO_TAG)
    page = va & PAGE
    if write:
        bitmap = c.load(slot, SLOT_BITMAP)
        with c.if_(bitmap != 0):
            budget = c.get("dirty_budget")
            with c.if_(budget.sle(0)):
                number = (pa - c.load(slot, SLOT_GPA)) >> 12
                word = c.load(bitmap + ((number >> 6) << 3), volatile=True)
                with c.if_(((word >> (number & 63)) & 1) == 0):
                    c.set("exit_kind", int(ExitKind.DIRTY_BUDGET))
                    c.ret(EXIT)
            c.set("dirty_budget", budget - c.call("mark_dirty", s, slot, pa))
        writable.value = page
    else:
        logged = c.load(slot, SLOT_BITMAP) != 0
        may = ((pte & WRITABLE) == WRITABLE) & ((flags & SLOT_READONLY) == 0) & (logged == 0)
        writable.value = c.select(may, page, NO_TAG)
    entry = tlb + ((va >> 7) & ((DATA_ENTRIES - 1) * DATA_ENTRY))
    readable = c.select((pte & READABLE) != 0, page, NO_TAG) if write else page
    level = c.get("walk_level")
    mask = c.select(level == 0, 0, c.const(-4096) << (level * 9))
    with c.if_(level != 0):
        c.store(c.get("bank"), 1, BANK_SUPERPAGES)
    c.store(entry, readable, TAG_READ)
    c.store(entry, writable.value, TAG_WRITE)
    c.store(entry, c.load(slot, SLOT_ADDEND) + pa - va, ADDEND)
    c.store(entry, mask, SUPERPAGE)
    c.ret(OK)
    return c.text()


def _host_address(access: str) -> str:
    """slow_value = host address of `va`; the access lies in one page. Status OK, TRAP or EXIT."""
    c = Native(f"host_address_{access}", ["s", "tlb", "va", "size", "plain"], 64)
    s, tlb, va, size, plain = c.parameters
    entry = tlb + ((va >> 7) & ((DATA_ENTRIES - 1) * DATA_ENTRY))
    tag = TAG_READ if access == "load" else TAG_WRITE
    with c.if_(c.load(entry, tag) != (va & PAGE)):
        status = c.call(f"fill_{access}", s, tlb, va, size, plain)
        with c.if_(status != OK):
            c.ret(status)
    c.set("slow_value", c.load(entry, ADDEND) + va)
    c.ret(OK)
    return c.text()


def _slow_load() -> str:
    """Any load: slow_value = the bytes, zero-extended."""
    c = Native("slow_load", ["s", "tlb", "va", "size", "plain"], 64)
    s, tlb, va, size, plain = c.parameters
    with c.if_((va & 4095) + size <= 4096):
        status = c.call("host_address_load", s, tlb, va, size, plain)
        with c.if_(status != OK):
            c.ret(status)
        host = c.get("slow_value")
        for bytes_ in (1, 2, 4, 8):
            with c.if_(size == bytes_):
                c.set("slow_value", c.load(host, bits=8 * bytes_, volatile=True, align=1).zext())
        c.ret(OK)
    # Two pages: both must be there before a byte is read.
    second = (va + size - 1) & PAGE
    status = c.call("host_address_load", s, tlb, second, size, plain)
    first_status = c.call("host_address_load", s, tlb, va, size, plain)
    with c.if_(first_status != OK):
        c.ret(first_status)
    with c.if_(status != OK):
        c.ret(c.call("host_address_load", s, tlb, second, size, plain))
    value, index = c.var(0), c.var(0)
    with c.while_(lambda: index.value < size):
        at = va + index.value
        entry = tlb + ((at >> 7) & ((DATA_ENTRIES - 1) * DATA_ENTRY))
        byte = c.load(c.load(entry, ADDEND) + at, bits=8, volatile=True).zext()
        value.value = value.value | (byte << (index.value << 3))
        index.value = index.value + 1
    c.set("slow_value", value.value)
    c.ret(OK)
    return c.text()


def _slow_store() -> str:
    """Any store of the low `size` bytes of `value`."""
    c = Native("slow_store", ["s", "tlb", "va", "size", "plain", "value"], 64)
    s, tlb, va, size, plain, value = c.parameters
    c.set("exit_data", value)
    with c.if_((va & 4095) + size <= 4096):
        status = c.call("host_address_store", s, tlb, va, size, plain)
        with c.if_(status != OK):
            c.ret(status)
        host = c.get("slow_value")
        for bytes_ in (1, 2, 4, 8):
            with c.if_(size == bytes_):
                c.store(host, value.trunc(8 * bytes_), bits=8 * bytes_, volatile=True, align=1)
        c.ret(OK)
    second = (va + size - 1) & PAGE
    status = c.call("host_address_store", s, tlb, va, size, plain)
    with c.if_(status != OK):
        c.ret(status)
    first = c.get("slow_value")
    status = c.call("host_address_store", s, tlb, second, size, plain)
    with c.if_(status != OK):
        c.ret(status)
    beyond = c.get("slow_value") - second
    index = c.var(0)
    with c.while_(lambda: index.value < size):
        at = va + index.value
        host = c.select(at < second, first + index.value, beyond + at)
        c.store(host, (value >> (index.value << 3)).trunc(8), bits=8, volatile=True)
        index.value = index.value + 1
    c.ret(OK)
    return c.text()


def _zero_block() -> str:
    """cbo.zero: `va` is aligned to `size`."""
    c = Native("zero_block", ["s", "tlb", "va", "size"], 64)
    s, tlb, va, size = c.parameters
    status = c.call("host_address_store", s, tlb, va, size, 0)
    with c.if_(status != OK):
        c.ret(status)
    host, index = c.get("slow_value"), c.var(0)
    with c.while_(lambda: index.value < size):
        c.store(host + index.value, 0, volatile=True)
        index.value = index.value + 8
    c.ret(OK)
    return c.text()


def _check_block() -> str:
    """cbo.clean and the like: allowed where a load or a store is (CMO specification 2.5.2); else a store's fault."""
    c = Native("check_block", ["s", "tlb", "va"], 64)
    s, tlb, va = c.parameters
    status = c.call("host_address_load", s, tlb, va, 1, 0)
    with c.if_(status == TRAP):
        cause = c.get("trap_cause")
        c.set("trap_cause", c.select(cause == LOAD_ACCESS_FAULT, STORE_ACCESS_FAULT, cause + 2))
    c.ret(c.select(status == EXIT, OK, status))
    return c.text()


def _load_physical() -> str:
    """slow_value = the 8 bytes at an aligned guest-physical address; TRAP if no memory is there."""
    c = Native("load_physical", ["s", "pa"], 64)
    s, pa = c.parameters
    slot = c.call("find_slot", s, pa)
    with c.if_(slot == 0):
        c.ret(TRAP)
    with c.if_((c.load(slot, SLOT_FLAGS) & SLOT_ABSENT) != 0):
        c.ret(TRAP)
    c.set("slow_value", c.load_atomic(c.load(slot, SLOT_ADDEND) + pa))
    c.ret(OK)
    return c.text()


def _cas_physical() -> str:
    """Compare and swap there; slow_value = 1 if swapped. TRAP if no memory, or read-only memory, is there."""
    c = Native("cas_physical", ["s", "pa", "old", "new"], 64)
    s, pa, old, new = c.parameters
    slot = c.call("find_slot", s, pa)
    with c.if_(slot == 0):
        c.ret(TRAP)
    with c.if_((c.load(slot, SLOT_FLAGS) & (SLOT_ABSENT | SLOT_READONLY)) != 0):
        c.ret(TRAP)
    _, swapped = c.compare_exchange(c.load(slot, SLOT_ADDEND) + pa, old, new)
    c.set("dirty_budget", c.get("dirty_budget") - c.call("mark_dirty", s, slot, pa))
    c.set("slow_value", swapped.zext())
    c.ret(OK)
    return c.text()


# -- flushing -----------------------------------------------------------------------------------------------------


def _fill_tags(c: Native, table: Expr, size: int, step: int, tags: tuple[int, ...]) -> None:
    offset = c.var(0)
    with c.while_(lambda: offset.value < size):
        for tag in tags:
            c.store(table + offset.value, NO_TAG, tag)
        offset.value = offset.value + step


def _clear_bank() -> str:
    """Forget all translations of a bank."""
    c = Native("clear_bank", ["s", "bank"])
    bank = c.parameters[1]
    c.count("count_flush")
    _fill_tags(c, bank + BANK_DATA, 3 * DATA_BLOCK, DATA_ENTRY, (TAG_READ, TAG_WRITE))
    _fill_tags(c, bank + BANK_FETCH, 2 * FETCH_BLOCK, FETCH_ENTRY, (0,))
    c.store(bank, 0, BANK_STALE)
    c.store(bank, 0, BANK_SUPERPAGES)
    c.ret()
    return c.text()


def _flush_page() -> str:
    """Forget the translations of one page, in one bank."""
    c = Native("flush_page", ["s", "bank", "va"])
    _, bank, va = c.parameters
    page = va & PAGE
    data = (va >> 7) & ((DATA_ENTRIES - 1) * DATA_ENTRY)
    for block in range(3):
        entry = bank + data + (BANK_DATA + block * DATA_BLOCK)
        for tag in (TAG_READ, TAG_WRITE):
            with c.if_(c.load(entry, tag) == page):
                c.store(entry, NO_TAG, tag)
    fetch = (va >> 8) & ((FETCH_ENTRIES - 1) * FETCH_ENTRY)
    for block in range(2):
        entry = bank + fetch + (BANK_FETCH + block * FETCH_BLOCK)
        with c.if_(c.load(entry) == page):
            c.store(entry, NO_TAG)
    with c.if_(c.load(bank, BANK_SUPERPAGES) != 0):
        offset = c.var(0)
        with c.while_(lambda: offset.value < 3 * DATA_BLOCK):
            entry = bank + offset.value + BANK_DATA
            mask = c.load(entry, SUPERPAGE)
            for tag in (TAG_READ, TAG_WRITE):
                with c.if_((mask != 0) & (((c.load(entry, tag) ^ va) & mask) == 0)):
                    c.store(entry, NO_TAG, tag)
            offset.value = offset.value + DATA_ENTRY
        # The fetch TLB does not know how large its pages are.
        _fill_tags(c, bank + BANK_FETCH, 2 * FETCH_BLOCK, FETCH_ENTRY, (0,))
    c.ret()
    return c.text()


def _sfence_vma() -> str:
    """kind: bit 0 an address is given, bit 1 an address space. Global pages are forgotten with the others."""
    c = Native("sfence_vma", ["s", "va", "asid", "kind"])
    s, va, asid, kind = c.parameters
    index, current = c.var(0), c.get("bank")
    with c.while_(lambda: index.value < BANKS):
        bank = c.get("banks") + index.value * BANK_SIZE
        own = (c.load(bank, BANK_SATP) >> 44) & 0xFFFF
        with c.if_(((kind & 2) == 0) | (own == (asid & 0xFFFF))):

            def whole(bank: Expr = bank) -> None:
                def other() -> None:
                    c.store(bank, 1, BANK_STALE)

                with c.if_else(bank == current, other):
                    c.call("clear_bank", s, bank, returns=0)

            with c.if_else((kind & 1) != 0, whole):
                c.call("flush_page", s, bank, va, returns=0)
        index.value = index.value + 1
    c.ret()
    return c.text()


def _context_changed() -> str:
    """Mode, satp, SUM or MXR have changed: choose bank and blocks. 1 if instruction fetch is concerned too."""
    c = Native("context_changed", ["s"], 64)
    s = c.s
    old_fetch, satp = c.get("fetch_tlb"), c.get("satp")
    bank = c.var(c.get("bank"))
    with c.if_(c.load(bank.value, BANK_SATP) != satp):
        # Another bank that knows this satp, or else the one after the current.
        banks, index = c.get("banks"), c.var(0)
        following = bank.value + BANK_SIZE
        victim = c.select(following == banks + BANKS * BANK_SIZE, banks, following)
        found = c.var(victim)
        with c.while_(lambda: index.value < BANKS):
            candidate = banks + index.value * BANK_SIZE
            with c.if_(c.load(candidate, BANK_SATP) == satp):
                found.value = candidate
            index.value = index.value + 1
        bank.value = found.value
        with c.if_(c.load(bank.value, BANK_SATP) != satp):
            c.store(bank.value, satp, BANK_SATP)
            c.store(bank.value, 1, BANK_STALE)
        c.set("bank", bank.value)
    mxr = c.get("mxr").zext()
    with c.if_(c.load(bank.value, BANK_MXR) != mxr):
        c.store(bank.value, mxr, BANK_MXR)
        c.store(bank.value, 1, BANK_STALE)
    with c.if_(c.load(bank.value, BANK_STALE) != 0):
        c.call("clear_bank", s, bank.value, returns=0)
    supervisor = c.get("mode").zext()
    block = c.select(c.get("sum") != 0, BLOCK_SUM, BLOCK_S)
    block = c.select(supervisor != 0, block, layout.BLOCK_U)
    c.set("tlb", bank.value + block * DATA_BLOCK + BANK_DATA)
    fetch = bank.value + supervisor * FETCH_BLOCK + BANK_FETCH
    c.set("fetch_tlb", fetch)
    c.ret((fetch != old_fetch).zext())
    return c.text()
