"""Native routines beside the instructions: memory lookup, TLB fills, decoded pages, polling, traps.

Written over Values like the semantics, so they are traced and compiled the same way; a loop is a function
that calls itself last. `FUNCTIONS` are called and return two words (value, status), `HANDLERS` are entered by
tail calls, with pc in a0. Read by build.py. What an access or a trap *means* is in kvmcore/isa; here is how
it is made fast.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EIO, EOPNOTSUPP
from typing import NoReturn, cast

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native_hart import (
    EXITED,
    OK,
    PAGE_MASK,
    TRAPPED,
    Code,
    FunctionHart,
    HandlerHart,
    atomic,
    call,
    compare_exchange,
    load,
    param,
    returns,
    store,
    tracer,
)
from kvmcore.ir.value import Value, const, select, u64
from kvmcore.isa import imsic, paging, traps
from kvmcore.isa.hart import Hart

#: Instructions between two looks at time and other threads.
SLICE = 20_000
OFFSET_MASK = (1 << 32) - 1  # of a record: the handler's offset
NEVER = (1 << 64) - 1  # a tag that no address has


def p1() -> Value:
    """The first argument behind the hart's block; p2 and p3 follow."""
    return param("p1")


def p2() -> Value:
    return param("p2")


def p3() -> Value:
    return param("p3")


def slot_field(slot: Value, name: str) -> Value:
    return load(slot + machine_state.SLOT_OFFSET[name])


# -- guest-physical memory -----------------------------------------------------------------------------------


def find_slot(h: FunctionHart) -> None:
    """(gpa, index below, index above) -> address of the slot, or 0: binary search."""
    gpa, low, high = p1(), p2(), p3()
    if low >= high:
        returns(u64(0))
    middle = (low + high) >> 1
    slot = load(h.machine("slots")) + middle * machine_state.SLOT_SIZE
    if gpa < slot_field(slot, "start"):
        returns(*call("find_slot", h.s, gpa, low, middle))
    if gpa >= slot_field(slot, "end"):
        returns(*call("find_slot", h.s, gpa, middle + 1, high))
    returns(slot)


def lookup(h: Code, gpa: Value) -> Value:
    """Address of the slot of a guest-physical address, or 0."""
    return call("find_slot", h.s, gpa, u64(0), load(h.machine("slot_count")))[0]


def find_memory(h: FunctionHart) -> None:
    """(gpa, write) -> host address; status EXITED where there is no memory (that may be written)."""
    gpa, write = p1(), p2()
    slot = lookup(h, gpa)
    if slot == 0:
        returns(u64(0), EXITED)
    if (slot_field(slot, "flags") & machine_state.SLOT_ABSENT) != 0:
        returns(u64(0), EXITED)
    if write != 0:
        if (slot_field(slot, "flags") & machine_state.SLOT_READONLY) != 0:
            returns(u64(0), EXITED)
        log_dirty(h, slot, gpa)
    returns(gpa + slot_field(slot, "delta"))


def log_dirty(h: Code, slot: Value, gpa: Value) -> None:
    """Note a write in the slot's dirty log, if it has one."""
    bitmap = slot_field(slot, "dirty")
    if bitmap != 0:
        page = (gpa - slot_field(slot, "start")) >> 12
        mask = const(64, 1) << (page & 63)
        old = atomic("or", bitmap + ((page >> 6) << 3), mask)
        if (old & mask) == 0:
            h.set("dirty_budget", h.get("dirty_budget") - 1)


# -- translation and the data TLB ----------------------------------------------------------------------------


def _walk(access: str) -> Callable[[FunctionHart], None]:
    def walk(h: FunctionHart) -> None:
        """(va) -> guest-physical address, leaf PTE | level << 60 in walk_pte; status TRAPPED."""
        gpa, pte, level = paging.translate(cast(Hart, h), p1(), access)
        h.set("walk_pte", pte)
        h.set("walk_level", level)
        returns(gpa)

    return walk


def note_superpage(h: Code, va: Value) -> None:
    """Remember where superpages are in the TLB: one address of them stands for many entries."""
    if h.get("walk_level") != 0:
        half = va >> 63
        low, high = h.get_at("large_low", half), h.get_at("large_high", half)
        h.set_at("large_low", half, select(va < low, va, low))
        h.set_at("large_high", half, select(va > high, va, high))


def _host_for(write: bool) -> Callable[[FunctionHart], None]:
    access = "store" if write else "load"

    def host_for(h: FunctionHart) -> None:
        """(va, size) -> host address, TLB filled; the access stays in its page.

        TRAPPED, or EXITED with exit_*.
        """
        va, size = p1(), p2()
        h.set("count_fill", h.get("count_fill") + 1)
        gpa, status = call(f"walk_{access}", h.s, va)
        if status != OK:
            returns(gpa, status)
        slot = lookup(h, gpa)
        h.set("exit_gpa", gpa)
        h.set("exit_va", va)
        h.set("exit_len", size.trunc(32))
        h.set("exit_kind", int(ExitKind.MMIO_WRITE if write else ExitKind.MMIO_READ))
        if slot == 0:
            returns(u64(0), EXITED)
        flags = slot_field(slot, "flags")
        if flags & machine_state.SLOT_ABSENT != 0:
            h.set("exit_kind", int(ExitKind.ERROR))
            h.set("exit_errno", EFAULT)
            returns(u64(0), EXITED)
        host = gpa + slot_field(slot, "delta")
        entry = h.get("tlb") + ((va >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))
        tag = va & PAGE_MASK
        if write:
            if flags & machine_state.SLOT_READONLY != 0:
                returns(u64(0), EXITED)
            if slot_field(slot, "dirty") != 0:
                if h.get("dirty_budget").slt(1):
                    h.set("exit_kind", int(ExitKind.DIRTY_BUDGET))
                    returns(u64(0), EXITED)
                log_dirty(h, slot, gpa)
            store(entry, tag)
            store(entry + 8, tag)
        else:
            writable = paging.pte_writable(h.get("walk_pte"))
            plain = (slot_field(slot, "dirty") == 0) & (flags & machine_state.SLOT_READONLY == 0)
            store(entry, tag)
            store(entry + 8, select(writable & plain, tag, u64(NEVER)))
        store(entry + 16, host - va)
        note_superpage(h, va)
        returns(host)

    return host_for


def _slow_load(size: int) -> Callable[[FunctionHart], None]:
    def slow_load(h: FunctionHart) -> None:
        """(va) -> the value; across two pages byte by byte."""
        va = p1()
        if (va & 4095) > 4096 - size:
            value = u64(0)
            for index in range(size):
                byte, status = call("slow_load_1", h.s, va + index)
                if status != OK:
                    crossing_exit(h, status, size)
                value = value | (byte << (8 * index))
            returns(value)
        host, status = call("host_for_load", h.s, va, u64(size))
        if status != OK:
            returns(host, status)
        returns(load(host, 8 * size, "volatile", 1).zext(64))

    return slow_load


def crossing_exit(h: FunctionHart, status: Value, size: int) -> NoReturn:
    """An access across two pages met a trap, or no memory: devices are not accessed misaligned."""
    if status == EXITED:
        h.set("exit_kind", int(ExitKind.ERROR))
        h.set("exit_errno", EIO)
    returns(u64(0), status)


def _slow_store(size: int) -> Callable[[FunctionHart], None]:
    def slow_store(h: FunctionHart) -> None:
        """(va, value): nothing is stored unless all of it can be."""
        va, value = p1(), p2()
        h.set("exit_data", value & ((1 << (8 * size)) - 1))
        if (va & 4095) > 4096 - size:
            _, status = call("host_for_store", h.s, va, u64(1))
            if status != OK:
                crossing_exit(h, status, size)
            # stval is where the failing part begins: the second page (12.1.9).
            _, status = call("host_for_store", h.s, (va + (size - 1)) & PAGE_MASK, u64(1))
            if status != OK:
                crossing_exit(h, status, size)
            for index in range(size):
                host, _ = call("host_for_store", h.s, va + index, u64(1))
                store(host, (value >> (8 * index)).trunc(8), "volatile")
            returns(u64(0))
        host, status = call("host_for_store", h.s, va, u64(size))
        if status != OK:
            if size == 4 and status == EXITED and h.get("exit_kind") == int(ExitKind.MMIO_WRITE):
                returns(*call("send_msi", h.s, value & 0xFFFFFFFF))
            returns(host, status)
        store(host, value.trunc(8 * size), "volatile", 1)
        returns(u64(0))

    return slow_store


def send_msi(h: FunctionHart) -> None:
    """(identity), exit_gpa: a store to seteipnum_le of a hart that runs; EXITED if it is not that.

    A hart that sleeps must be woken, which is Python's business. If it goes to sleep at this moment, either it sees
    the request (Hart.run looks after leaving) or we see that it has left.
    """
    identity = p1()
    offset = h.get("exit_gpa") - load(h.machine("imsic_start"))
    if offset >= load(h.machine("imsic_size")) or (offset & 4095) != 0:
        returns(u64(0), EXITED)
    target = load(load(h.machine("imsic_harts")) + (offset >> 9))
    if target == 0:
        returns(u64(0), EXITED)
    running = target + hart_state.offset("running")
    known = (identity != 0) & (identity <= load(target + hart_state.offset("imsic_identities")))
    if ~known or load(running, 32, "volatile") == 0:
        returns(u64(0), EXITED)
    atomic("or", target + hart_state.offset("eip") + ((identity >> 6) << 3), const(64, 1) << (identity & 63))
    atomic("or", target + hart_state.offset("attention"), const(32, hart_state.ATTENTION_INTERRUPT))
    store(target + hart_state.offset("limit"), u64(0), "atomic")
    returns(u64(0), select(load(running, 32, "atomic") == 0, u64(EXITED), u64(OK)))


def atomic_address(h: FunctionHart) -> None:
    """(va, write) -> host address of an aligned atomic access; a device is no memory for it (EOPNOTSUPP)."""
    va, write = p1(), p2()
    if write != 0:
        host, status = call("host_for_store", h.s, va, u64(8))
    else:
        host, status = call("host_for_load", h.s, va, u64(8))
    kind = h.get("exit_kind")
    if status == EXITED and (kind == int(ExitKind.MMIO_READ)) | (kind == int(ExitKind.MMIO_WRITE)):
        h.set("exit_kind", int(ExitKind.ERROR))
        h.set("exit_errno", EOPNOTSUPP)
    returns(host, status)


def check_block(h: FunctionHart) -> None:
    """(va): what cbo.* asks: any access right will do, else it faults as a store."""
    _, status = call("walk_load", h.s, p1())
    if status == OK:
        returns(u64(0))
    _, status = call("walk_store", h.s, p1())
    returns(u64(0), status)


# -- forgetting translations ---------------------------------------------------------------------------------


def flush_tlb(h: FunctionHart) -> None:
    """All translations of this hart."""
    h.set("count_flush", h.get("count_flush") + 1)
    call("clear_tags", h.address("tlb_blocks"), u64(hart_state.TLB_BLOCKS))
    for half in (0, 1):
        h.set_at("large_low", half, u64(NEVER))
        h.set_at("large_high", half, u64(0))
    returns(u64(0))


def clear_tags(h: FunctionHart) -> None:
    """(block, how many): invalidate all tags of TLB blocks."""
    block, count = param("p0"), p1()
    if count == 0:
        returns(u64(0))
    call("clear_data", block, u64(hart_state.DATA_TLB_ENTRIES))
    call("clear_fetch", block + hart_state.FETCH_TLB_OFFSET, u64(hart_state.FETCH_TLB_ENTRIES))
    returns(*call("clear_tags", block + hart_state.TLB_BLOCK, count - 1))


def _clear(size: int, tags: tuple[int, ...]) -> Callable[[FunctionHart], None]:
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


def flush_page(h: FunctionHart) -> None:
    """(va): its translation, and all of them if it may belong to a superpage."""
    va = p1()
    half = va >> 63
    if (va >= (h.get_at("large_low", half) & ~0x3FFFFFFF)) & (va <= (h.get_at("large_high", half) | 0x3FFFFFFF)):
        returns(*call("flush_tlb", h.s))
    for block in range(hart_state.TLB_BLOCKS):
        base = h.address("tlb_blocks") + block * hart_state.TLB_BLOCK
        entry = base + ((va >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))
        store(entry, u64(NEVER))
        store(entry + 8, u64(NEVER))
        fetch = base + hart_state.FETCH_TLB_OFFSET + (((va >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) << 4)
        store(fetch, u64(NEVER))
    returns(u64(0))


def flush_fetch(h: FunctionHart) -> None:
    """fence.i: decoded pages are compared with memory before they are entered again."""
    epoch = atomic("add", h.machine("epoch"), u64(1)) + 1
    h.set("code_epoch", epoch)
    for block in range(hart_state.TLB_BLOCKS):
        base = h.address("tlb_blocks") + block * hart_state.TLB_BLOCK
        call("clear_fetch", base + hart_state.FETCH_TLB_OFFSET, u64(hart_state.FETCH_TLB_ENTRIES))
    returns(u64(0))


def choose_tlb(h: FunctionHart) -> None:
    """-> the TLB block for the mode; all translations go when satp or MXR have changed."""
    satp, mxr = h.get("satp"), h.get("mxr")
    if (satp != h.get("context_satp")) | (mxr != h.get("context_mxr")):
        h.set("context_satp", satp)
        h.set("context_mxr", mxr)
        call("flush_tlb", h.s)
    block = select(h.get("mode") == 0, u64(0), h.get("sum").zext(64) + 1)
    tlb = h.address("tlb_blocks") + block * hart_state.TLB_BLOCK
    h.set("tlb", tlb)
    returns(tlb)


# -- decoded pages -------------------------------------------------------------------------------------------


def acquire(h: FunctionHart) -> None:
    """(address): spin until the lock is ours."""
    if compare_exchange(param("p0"), u64(0), u64(1)):
        returns(u64(0))
    returns(*call("acquire", param("p0")))


def code_page(h: FunctionHart) -> None:
    """(gpa of a page) -> the decoded page, as memory is after this hart's last fence.i; 1: no memory, 0: no
    room.

    2: a slot without host memory, exit_* are set.
    """
    gpa = p1()
    host, status = call("find_memory", h.s, gpa, u64(0))
    if status != OK:
        if lookup(h, gpa) == 0:
            returns(u64(1))
        h.set("exit_kind", int(ExitKind.ERROR))
        h.set("exit_errno", EFAULT)
        h.set("exit_gpa", gpa)
        returns(u64(2))
    lock = h.machine("lock")
    call("acquire", lock)
    page, _ = call("decoded_page", h.s, gpa, host)
    store(lock, u64(0), "atomic")
    returns(page)


def decoded_page(h: FunctionHart) -> None:
    """code_page with the lock held; (gpa, host)."""
    gpa, host = p1(), p2()
    bucket = h.machine("buckets") + (((gpa >> 12) & (machine_state.PAGE_BUCKETS - 1)) << 3)
    page, _ = call("find_page", load(bucket), gpa, host)
    if page != 0:
        if load(page + machine_state.PAGE_CHECKED) >= h.get("code_epoch"):
            returns(page)
        epoch = load(h.machine("epoch"), 64, "volatile")
        changed, _ = call("differ", page + machine_state.PAGE_COPY, host, u64(4096))
        if changed == 0:
            store(page + machine_state.PAGE_CHECKED, epoch)
            returns(page)
        if load(h.machine("harts")) == 1:
            call("zero", page + machine_state.PAGE_RECORDS, u64(2048 * machine_state.RECORD))
            call("copy", page + machine_state.PAGE_COPY, host, u64(4096))
            store(page + machine_state.PAGE_CHECKED, epoch)
            returns(page)
        store(page + machine_state.PAGE_GPA, u64(NEVER))  # others may be in it: it is not used again
        store(h.machine("retired"), load(h.machine("retired")) + 1)
    used = load(h.machine("pool_used"))
    if used + machine_state.PAGE_STRIDE > load(h.machine("pool_size")):
        returns(u64(0))
    store(h.machine("pool_used"), used + machine_state.PAGE_STRIDE)
    fresh = load(h.machine("pool")) + used
    store(fresh + machine_state.PAGE_GPA, gpa)
    store(fresh + machine_state.PAGE_HOST, host)
    store(fresh + machine_state.PAGE_NEXT, load(bucket))
    store(fresh + machine_state.PAGE_CHECKED, load(h.machine("epoch"), 64, "volatile"))
    call("copy", fresh + machine_state.PAGE_COPY, host, u64(4096))
    store(fresh + (machine_state.PAGE_RECORDS + 2048 * machine_state.RECORD), handler_offset("page_end"))
    store(bucket, fresh)
    h.set("count_page", h.get("count_page") + 1)
    returns(fresh)


def handler_offset(name: str) -> Value:
    """A record that does nothing but run this handler."""
    address = tracer().pure("address", (), 64, (name,))
    return address - tracer().pure("address", (), 64, ("decode",))


def find_page(h: FunctionHart) -> None:
    """(page, gpa, host) -> the page of this gpa and host address in the chain, or 0."""
    page, gpa, host = param("p0"), p1(), p2()
    if page == 0:
        returns(page)
    if load(page + machine_state.PAGE_GPA) == gpa and load(page + machine_state.PAGE_HOST) == host:
        returns(page)
    returns(*call("find_page", load(page + machine_state.PAGE_NEXT), gpa, host))


def differ(h: FunctionHart) -> None:
    """(a, b, size, a multiple of 64) -> whether the bytes differ."""
    a, b, size = param("p0"), p1(), p2()
    if size == 0:
        returns(u64(0))
    difference = u64(0)
    for offset in range(0, 64, 8):
        difference = difference | (load(a + offset) ^ load(b + offset, 64, "volatile"))
    if difference != 0:
        returns(u64(1))
    returns(*call("differ", a + 64, b + 64, size - 64))


def copy(h: FunctionHart) -> None:
    """(to, from, size, a multiple of 64)."""
    to, source, size = param("p0"), p1(), p2()
    if size == 0:
        returns(u64(0))
    for offset in range(0, 64, 8):
        store(to + offset, load(source + offset, 64, "volatile"))
    returns(*call("copy", to + 64, source + 64, size - 64))


def zero(h: FunctionHart) -> None:
    """(at, size, a multiple of 64)."""
    at, size = param("p0"), p1()
    if size == 0:
        returns(u64(0))
    for offset in range(0, 64, 8):
        store(at + offset, u64(0), "volatile")
    returns(*call("zero", at + 64, size - 64))


def fetch_halfword(h: FunctionHart) -> None:
    """(va) -> the 16 bits of code there, from the decoded page; TRAPPED with the cause of a fetch."""
    va = p1()
    page, status = call("fetch_page", h.s, va)
    if status != OK:
        returns(page, status)
    returns(load(page + machine_state.PAGE_COPY + (va & 4095), 16, "plain", 1).zext(64))


def fetch_page(h: FunctionHart) -> None:
    """(va) -> the decoded page to run at va; TRAPPED; EXITED with exit_kind."""
    va = p1()
    gpa, status = call("walk_fetch", h.s, va)
    if status != OK:
        returns(gpa, status)
    note_superpage(h, va)
    page, _ = call("code_page", h.s, gpa & PAGE_MASK)
    if page == 1:
        h.set("trap_cause", traps.INSTRUCTION_ACCESS_FAULT)
        h.set("trap_value", va)
        returns(u64(0), TRAPPED)
    if page == 2:
        returns(u64(0), EXITED)
    if page == 0:
        h.set("exit_kind", int(ExitKind.POOL_FULL))
        returns(u64(0), EXITED)
    returns(page)


def instruction_bits(h: FunctionHart) -> None:
    """(pc) -> the bits of the instruction there, 16 or 32."""
    pc = p1()
    low, status = call("fetch_halfword", h.s, pc)
    if (status != OK) | ((low & 3) != 3):
        returns(low, status)
    high, status = call("fetch_halfword", h.s, pc + 2)
    returns(low | (high << 16), status)


# -- handlers beside the instructions ------------------------------------------------------------------------


def decode_here(h: HandlerHart) -> None:
    """An undecoded record: decode it and run it."""
    pc = h.pc
    offset = pc & 4095
    page = h.ip - (offset << 2) - machine_state.PAGE_RECORDS
    at = page + machine_state.PAGE_COPY + offset
    raw = load(at, 16, "plain", 1).zext(32)
    if (raw & 3) == 3:
        if offset == 4094:
            h.tail("straddle", pc, raw.zext(64))
        raw = load(at, 32, "plain", 1)
    record, _ = call("decode_word", raw.zext(64), offset)
    length = select((raw & 3) == 3, u64(4), u64(2))
    if offset + length < 4094:  # the next one is on this page, whatever its length
        after = load(at + length, 32, "plain", 1)
        after = select((after & 3) == 3, after, after & 0xFFFF)
        second, _ = call("decode_word", after.zext(64), offset + length)
        both, found = call("fuse", record & OFFSET_MASK, second & OFFSET_MASK)
        if found != 0:
            place = h.ip + (length << 2)
            if load(place, 64, "volatile") == 0:  # the pair's handler takes its operands from there
                store(place, second, "volatile")
            record = (record & ~OFFSET_MASK) | both
            store(h.ip, record, "volatile")
            h.dispatch(h.ip, h.ab, h.ic)
    store(h.ip, record, "volatile")
    h.dispatch(h.ip, h.ab, h.ic)


def straddle(h: HandlerHart) -> None:
    """(a0 pc, a1 low half): an instruction on two pages is decoded each time, into a record of the hart."""
    pc = param("a0")
    high, status = call("fetch_halfword", h.s, pc + 2)
    if status != OK:
        h.failed(status)
    record, _ = call("decode_word", param("a1") | (high << 16), u64(1 << 40))
    at = h.address("straddle")
    store(at, record, "volatile")
    store(at + 16, handler_offset("page_end"), "volatile")
    h.dispatch(at, at - (pc << 2), h.ic)


def page_end(h: HandlerHart) -> None:
    """Behind the last record of a page."""
    h.go(h.pc, h.ic)


def fetch_miss(h: HandlerHart) -> None:
    """(a0 pc): fill the fetch TLB and go on."""
    pc = param("a0")
    h.set("count_fetch_fill", h.get("count_fetch_fill") + 1)
    page, status = call("fetch_page", h.s, pc)
    if status != OK:
        h.failed(status)
    ab = page + machine_state.PAGE_RECORDS - ((pc & PAGE_MASK) << 2)
    entry = h.tlb + (((pc >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) << 4)
    store(entry + hart_state.FETCH_TLB_OFFSET, pc & PAGE_MASK)
    store(entry + (hart_state.FETCH_TLB_OFFSET + 8), ab)
    h.dispatch((pc << 2) + ab, ab, h.ic)


def poll(h: HandlerHart) -> None:
    """(a0 pc): look at other threads, time and interrupts; then go on there."""
    pc = param("a0")
    store(h.address("limit"), h.ic + SLICE, "volatile")
    tracer().effect("fence", (), 0, ("seq_cst",))
    attention = h.get("attention")
    if attention != 0:
        h.tail("serve", pc)
    h.tail("interrupts", pc)


def serve(h: HandlerHart) -> None:
    """(a0 pc): somebody set `attention`."""
    pc = param("a0")
    attention = h.get("attention")
    if (attention & (hart_state.ATTENTION_KICK | hart_state.ATTENTION_STOP)) != 0:
        h.set("exit_kind", int(ExitKind.KICK))
        h.tail("leave", pc)
    h.atomic_and("attention", ~hart_state.ATTENTION_INTERRUPT)
    if (attention & hart_state.ATTENTION_FLUSH_ICACHE) != 0:
        call("flush_fetch", h.s)
        h.atomic_and("attention", ~hart_state.ATTENTION_FLUSH_ICACHE)
    if (attention & hart_state.ATTENTION_FLUSH_TLB) != 0:
        call("flush_tlb", h.s)
        h.atomic_and("attention", ~hart_state.ATTENTION_FLUSH_TLB)
    h.tail("interrupts", pc)


def interrupts(h: HandlerHart) -> None:
    """(a0 pc): take the interrupt that is due, or go on."""
    pc = param("a0")
    cause = traps.pending_interrupt(h)
    if cause != traps.NO_INTERRUPT:
        h.set("trap_cause", cause)
        h.set("trap_value", 0)
        h.tail("take_trap", pc)
    h.go(pc, h.ic)


def take_trap(h: HandlerHart) -> None:
    """(a0 pc): trap_cause and trap_value are set."""
    h.set("count_trap", h.get("count_trap") + 1)
    traps.enter_trap(h, h.get("trap_cause"), h.get("trap_value"))


def trap_instruction(h: HandlerHart) -> None:
    """(a0 pc): as take_trap, with the instruction's bits as trap_value."""
    bits, status = call("instruction_bits", h.s, param("a0"))
    h.set("trap_value", select(status == OK, bits, u64(0)))
    h.tail("take_trap", param("a0"))


def enter(h: HandlerHart) -> None:
    """From outside: the guest's MXCSR, then look around, then pc."""
    h._fp.enter()
    h.tlb, _ = call("choose_tlb", h.s)
    h.tail("poll", h.get("pc"))


def leave(h: HandlerHart) -> None:
    """(a0 pc): to the outside; exit_kind is set."""
    h._fp.leave()
    h.set("pc", param("a0"))
    h.set("icount", h.ic)
    tracer().effect("leave", ())


def _imsic_top(h: FunctionHart) -> None:
    returns(imsic.top(cast(Hart, h)))


def leave_access(h: HandlerHart) -> None:
    """(a0 pc): an access left; Python completes it and needs the instruction."""
    kind = h.get("exit_kind")
    bits, _ = call("instruction_bits", h.s, param("a0"))
    h.set("exit_kind", kind)
    h.set("exit_insn", bits.trunc(32))
    h.tail("leave", param("a0"))


FUNCTIONS: dict[str, tuple[int, Callable[[FunctionHart], None]]] = {
    "top": (1, _imsic_top),
    "find_slot": (4, find_slot),
    "find_memory": (3, find_memory),
    "walk_load": (2, _walk("load")),
    "walk_store": (2, _walk("store")),
    "walk_fetch": (2, _walk("fetch")),
    "host_for_load": (3, _host_for(False)),
    "host_for_store": (3, _host_for(True)),
    **{f"slow_load_{size}": (2, _slow_load(size)) for size in (1, 2, 4, 8)},
    **{f"slow_store_{size}": (3, _slow_store(size)) for size in (1, 2, 4, 8)},
    "send_msi": (2, send_msi),
    "atomic_address": (3, atomic_address),
    "check_block": (2, check_block),
    "flush_tlb": (1, flush_tlb),
    "clear_tags": (2, clear_tags),
    "clear_data": (2, _clear(32, (0, 8))),
    "clear_fetch": (2, _clear(16, (0,))),
    "flush_page": (2, flush_page),
    "flush_fetch": (1, flush_fetch),
    "choose_tlb": (1, choose_tlb),
    "acquire": (1, acquire),
    "code_page": (2, code_page),
    "decoded_page": (3, decoded_page),
    "find_page": (3, find_page),
    "differ": (3, differ),
    "copy": (3, copy),
    "zero": (2, zero),
    "fetch_halfword": (2, fetch_halfword),
    "fetch_page": (2, fetch_page),
    "instruction_bits": (2, instruction_bits),
}

#: name -> (function, whether pc is a0 rather than the record's place)
HANDLERS: dict[str, tuple[Callable[[HandlerHart], None], bool]] = {
    "decode": (decode_here, False),
    "straddle": (straddle, True),
    "page_end": (page_end, False),
    "fetch_miss": (fetch_miss, True),
    "poll": (poll, True),
    "serve": (serve, True),
    "interrupts": (interrupts, True),
    "take_trap": (take_trap, True),
    "trap_instruction": (trap_instruction, True),
    "enter": (enter, True),
    "leave": (leave, True),
    "leave_access": (leave_access, True),
}
