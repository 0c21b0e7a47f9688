"""Decoded pages: found by guest-physical address, checked against memory, decoded record by record. Native code.

A page is a header, a copy of the bytes that it was decoded from, a record for each halfword (machine_state.py). A
zeroed record is an undecoded one. With several harts a record never changes once it is there; a page whose
bytes have changed is not used again. Written as softmmu.py is; collected by routines.py.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT
from typing import NoReturn

from kvmcore.engine import machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native_hart import (
    EXITED,
    OK,
    PAGE_MASK,
    TRAPPED,
    FunctionHart,
    HandlerHart,
    call,
    compare_exchange,
    load,
    param,
    returns,
    store,
    tracer,
)
from kvmcore.engine.softmmu import lookup, note_superpage, p1, p2
from kvmcore.ir.value import Value, select, u64
from kvmcore.isa import traps

OFFSET_MASK = (1 << 32) - 1
"""Of a record: the handler's offset."""


def acquire(h: FunctionHart) -> None:
    """(address): spin until the lock is ours."""
    if compare_exchange(param("p0"), u64(0), u64(1)):
        returns(u64(0))
    returns(*call("acquire", param("p0")))


def code_page(h: FunctionHart) -> None:
    """(gpa of a page) -> the decoded page, as memory is after this hart's last fence.i; 1: no memory, 0: no
    room.

    2: a slot without host memory, or not there yet; exit_* are set.
    """
    gpa = p1()
    host, status = call("find_memory", h.s, gpa, u64(0))
    if status != OK:
        if host != 0:  # the page has yet to come, exit_* are set
            returns(u64(2))
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
        used = load(page + machine_state.PAGE_USED)
        store(page + machine_state.PAGE_USED, select(used < machine_state.MOST_USED, used + 1, used))
        if load(page + machine_state.PAGE_CHECKED) >= h.get("code_epoch"):
            returns(page)
        epoch = load(h.machine("epoch"), 64, "volatile")
        changed, _ = call("differ", page + machine_state.PAGE_COPY, host)  # of build.py
        if changed == 0:
            store(page + machine_state.PAGE_CHECKED, epoch)
            returns(page)
        store(page + machine_state.PAGE_IDENTITY, u64(0))
        if load(h.machine("harts")) == 1:
            call("zero", page + machine_state.PAGE_RECORDS, u64(2048 * machine_state.RECORD))
            call("copy", page + machine_state.PAGE_COPY, host, u64(4096))
            store(page + machine_state.PAGE_CHECKED, epoch)
            call("know", h.s, page)
            returns(page)
        store(page + machine_state.PAGE_HOST, u64(0))  # others may be in it: it is not used again
    fresh, _ = call("free_page", h.s)
    if fresh == 0:
        returns(fresh)
    store(fresh + machine_state.PAGE_GPA, gpa)
    store(fresh + machine_state.PAGE_IDENTITY, u64(0))
    store(fresh + machine_state.PAGE_USED, u64(1))
    store(fresh + machine_state.PAGE_HOST, host)
    store(fresh + machine_state.PAGE_NEXT, load(bucket))
    store(fresh + machine_state.PAGE_CHECKED, load(h.machine("epoch"), 64, "volatile"))
    call("copy", fresh + machine_state.PAGE_COPY, host, u64(4096))
    store(fresh + (machine_state.PAGE_RECORDS + 2048 * machine_state.RECORD), handler_offset("page_end"))
    store(bucket, fresh)
    h.set("count_page", h.get("count_page") + 1)
    call("know", h.s, fresh)
    returns(fresh)


def free_page(h: FunctionHart) -> None:
    """-> a page without records, or 0: there is no room."""
    given_back = load(h.machine("free"))
    if given_back != 0:
        store(h.machine("free"), load(given_back + machine_state.PAGE_NEXT))
        call("zero", given_back + machine_state.PAGE_RECORDS, u64(2048 * machine_state.RECORD))
        returns(given_back)
    used = load(h.machine("pool_used"))
    if used + machine_state.PAGE_STRIDE > load(h.machine("pool_size")):
        returns(u64(0))
    store(h.machine("pool_used"), used + machine_state.PAGE_STRIDE)
    returns(load(h.machine("pool")) + used)


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


# -- handlers ----------------------------------------------------------------------------------------------


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
    _run_apart(h, pc, param("a1") | (high << 16), u64(4))


def _run_apart(h: HandlerHart, pc: Value, raw: Value, length: Value) -> NoReturn:
    """Run one instruction by a record of the hart's own."""
    record, _ = call("decode_word", raw, u64(1 << 40))
    at = h.address("straddle")
    store(at, record, "volatile")
    store(at + (length << 2), handler_offset("page_end"), "volatile")
    h.dispatch(at, at - (pc << 2), h.ic)


def interpret(h: HandlerHart) -> None:
    """(a0 pc, ip its record): run the instruction by the interpreter, though a region begins there."""
    pc = param("a0")
    offset = pc & 4095
    raw = load(h.ip - (offset << 2) - machine_state.PAGE_RECORDS + machine_state.PAGE_COPY + offset, 32, "plain", 1)
    short = (raw & 3) != 3
    _run_apart(h, pc, select(short, raw & 0xFFFF, raw).zext(64), select(short, u64(2), u64(4)))


def resume(h: HandlerHart) -> None:
    """Out of template code; the interpreter does an instruction from its beginning. ip is the page's first record, a0 says
    which one it is (16 bits, in bytes), and how many instructions have retired since ic was exact (5 bits).
    """
    h.ip = h.ip + (param("a0") & 0xFFFF)
    h.ic = h.ic + ((param("a0") >> 16) & 0x1F)
    record = load(h.ip, 32).zext(64)
    if record - 1 < load(h.machine("templates")) - 1:
        h.dispatch(h.ip, h.ab, h.ic)
    h.tail("interpret", h.pc)  # undecoded, or what has left


def refill_function(access: str) -> Callable[[HandlerHart], None]:
    def refill(h: HandlerHart) -> None:
        """Out of template code: fill the TLB and run the template again, which has changed nothing. If there is more to it
        than that, a trap, a device, perhaps a second page, the interpreter does the instruction.

        a0: as resume's; at bit 21 how many bytes are wanted, in units of 8 (5 bits); at bit 26 the register that a0 held; at
        bit 32 the place of the template. a1: address.
        """
        packed, address, gd = param("a0"), param("a1"), param("gd")
        if (address & 4095) + ((packed >> 18) & 0xF8) <= 4096:
            _, status = call(f"host_for_{access}", h.s, address, u64(8))
            if status == OK:
                h.enter_template(packed >> 32, h.x[(packed >> 26) & 0x1F], gd)
        h.tail("resume", packed)

    return refill


def page_end(h: HandlerHart) -> None:
    """Behind the last record of a page, or of what was run apart. Code without a branch may go on for ever where many addresses
    lead to one page; and where a page begins is a sample, for code that goes straight through it has no others."""
    if h.ic >= h.get("limit"):
        if (h.pc & 4095) < 4:
            h.tail("poll", h.pc)
        h.tail("poll_region", h.pc)
    h.go(h.pc, h.ic)


def fetch_miss(h: HandlerHart) -> None:
    """(a0 pc): fill the fetch TLB and go on."""
    pc = param("a0")
    ab, found = call("second_fetch", h.s, pc)
    if found == OK:
        h.dispatch((pc << 2) + ab, ab, h.ic)
    h.set("count_fetch_fill", h.get("count_fetch_fill") + 1)
    page, status = call("fetch_page", h.s, pc)
    if status != OK:
        h.failed(status)
    ab = page + machine_state.PAGE_RECORDS - ((pc & PAGE_MASK) << 2)
    call("fill_fetch", h.s, pc, ab)
    if load(h.machine("watch")) != 0 and h.get("fresh_page") != 0:  # there may be regions of it already
        h.set("exit_kind", int(ExitKind.PROFILE))
        h.tail("leave", pc)
    h.dispatch((pc << 2) + ab, ab, h.ic)
