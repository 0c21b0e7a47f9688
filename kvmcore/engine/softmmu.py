"""The slow half of guest memory: slots, walks, accesses over two pages, MSIs. Native code.

Written over Values like the semantics, so it is traced and compiled the same way; a loop is a function that calls
itself last. The fast half, a TLB hit, is in native_hart.py; how TLBs are filled and emptied in tlb.py; what a walk means
is isa/paging.py. Collected by routines.py; runs only on the hart's own thread.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EIO, EOPNOTSUPP
from typing import NoReturn, cast

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.native_hart import EXITED, OK, PAGE_MASK, Code, FunctionHart, atomic, call, load, param, returns, store
from kvmcore.ir.value import Value, const, select, u64
from kvmcore.isa import paging
from kvmcore.isa.hart import Hart

NEVER = (1 << 64) - 1
"""A tag that no address has."""
LARGE = 1 << 21
ABSENT = 1
"""What find_memory gives in place of a host address for a page that has yet to come."""


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


def in_main_slot(h: Code, gpa: Value) -> tuple[Value, Value]:
    """The address of the largest slot whose pages are all there, and whether it has a guest-physical address."""
    slot = load(h.machine("main_slot"))
    return slot, (gpa - slot_field(slot, "start")) < (slot_field(slot, "end") - slot_field(slot, "start"))


def slot_of(h: FunctionHart) -> None:
    """(gpa) -> address of its slot, or 0."""
    slot, inside = in_main_slot(h, p1())
    if inside:
        returns(slot)
    returns(*call("find_slot", h.s, p1(), u64(0), load(h.machine("slot_count"))))


def lookup(h: Code, gpa: Value) -> Value:
    """Address of the slot of a guest-physical address, or 0."""
    return call("slot_of", h.s, gpa)[0]


def table_memory(h: FunctionHart) -> None:
    """(gpa) -> as find_memory, to read: most page tables are in the main slot."""
    slot, inside = in_main_slot(h, p1())
    if inside:
        returns(p1() + slot_field(slot, "delta"))
    returns(*call("find_memory", h.s, p1(), u64(0)))


def find_memory(h: FunctionHart) -> None:
    """(gpa, write) -> host address; status EXITED where there is no memory (that may be written), with the value ABSENT
    and exit_* set where there will be."""
    gpa, write = p1(), p2()
    slot = lookup(h, gpa)
    if slot == 0:
        returns(u64(0), EXITED)
    if (slot_field(slot, "flags") & machine_state.SLOT_ABSENT) != 0:
        returns(u64(0), EXITED)
    if page_absent(h, slot, gpa):
        returns(u64(ABSENT), EXITED)
    if write != 0:
        if (slot_field(slot, "flags") & machine_state.SLOT_READONLY) != 0:
            returns(u64(0), EXITED)
        log_dirty(h, slot, gpa)
    returns(gpa + slot_field(slot, "delta"))


def page_absent(h: Code, slot: Value, gpa: Value) -> bool:
    """Whether the page has yet to come, by the slot's userfault bitmap; exit_kind and exit_gpa are set then."""
    bitmap = slot_field(slot, "userfault")
    if bitmap == 0:
        return False
    page = (gpa - slot_field(slot, "start")) >> 12
    if (load(bitmap + ((page >> 6) << 3), 64, "volatile") >> (page & 63)) & 1 == 0:
        return False
    h.set("exit_gpa", gpa)
    h.set("exit_kind", int(ExitKind.PAGE_ABSENT))
    return True


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


def walk_function(access: str) -> Callable[[FunctionHart], None]:
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


def reach(h: Code, slot: Value, gpa: Value) -> Value:
    """The mask of the aligned memory around a page that is translated as the page is: 2 MiB of a superpage, or the page.

    Nothing is known of its other pages where writes are logged or pages have yet to come.
    """
    low, high = gpa & -LARGE, gpa | (LARGE - 1)
    inside = (low >= slot_field(slot, "start")) & (high < slot_field(slot, "end"))
    plain = (slot_field(slot, "dirty") | slot_field(slot, "userfault")) == 0
    return select((h.get("walk_level") != 0) & inside & plain, u64(-LARGE), u64(PAGE_MASK))


def host_for_function(write: bool) -> Callable[[FunctionHart], None]:
    access = "store" if write else "load"

    def host_for(h: FunctionHart) -> None:
        """(va, size) -> host address, TLB filled; the access stays in its page.

        TRAPPED, or EXITED with exit_*.
        """
        va, size = p1(), p2()
        known, found = call(f"second_{access}", h.s, va)
        if found == OK:
            returns(known)
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
        if page_absent(h, slot, gpa):
            returns(u64(0), EXITED)
        host = gpa + slot_field(slot, "delta")
        tag = va & PAGE_MASK
        if write:
            if flags & machine_state.SLOT_READONLY != 0:
                returns(u64(0), EXITED)
            if slot_field(slot, "dirty") != 0:
                if h.get("dirty_budget").slt(1):
                    h.set("exit_kind", int(ExitKind.DIRTY_BUDGET))
                    returns(u64(0), EXITED)
                log_dirty(h, slot, gpa)
            for_stores = tag
        else:
            writable = paging.pte_writable(h.get("walk_pte"))
            plain = (slot_field(slot, "dirty") == 0) & (flags & machine_state.SLOT_READONLY == 0)
            for_stores = select(writable & plain, tag, u64(NEVER))
        call("fill_data", h.s, va, host - va, for_stores, reach(h, slot, gpa))
        note_superpage(h, va)
        returns(host)

    return host_for


def slow_load_function(size: int) -> Callable[[FunctionHart], None]:
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
    if (status == EXITED) & (h.get("exit_kind") != int(ExitKind.PAGE_ABSENT)):
        h.set("exit_kind", int(ExitKind.ERROR))
        h.set("exit_errno", EIO)
    returns(u64(0), status)


def slow_store_function(size: int) -> Callable[[FunctionHart], None]:
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


def _hit(h: Code, va: Value, size: int, write: bool) -> tuple[Value, Value]:
    """Whether the TLB has all of an access, and the host's address if it has."""
    entry = h.get("tlb") + ((va >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))
    return load(entry + (8 if write else 0)) == ((va + (size - 1)) & PAGE_MASK), va + load(entry + 16)


def again_load_function(size: int) -> Callable[[FunctionHart], None]:
    def again_load(h: FunctionHart) -> None:
        """slow_load for a region, which may come here for an access that hits: it looks at several at once."""
        va = p1()
        hit, host = _hit(h, va, size, False)
        if hit:
            returns(load(host, 8 * size, "volatile", 1).zext(64))
        returns(*call(f"slow_load_{size}", h.s, va))

    return again_load


def again_store_function(size: int) -> Callable[[FunctionHart], None]:
    def again_store(h: FunctionHart) -> None:
        """slow_store, as again_load."""
        va, value = p1(), p2()
        hit, host = _hit(h, va, size, True)
        if hit:
            store(host, value.trunc(8 * size), "volatile", 1)
            returns(u64(0))
        returns(*call(f"slow_store_{size}", h.s, va, value))

    return again_store


def send_msi(h: FunctionHart) -> None:
    """(identity), exit_gpa: a store to seteipnum_le of a hart's IMSIC; EXITED if it is not that."""
    identity = p1()
    offset = h.get("exit_gpa") - load(h.machine("imsic_start"))
    if offset >= load(h.machine("imsic_size")) or (offset & 4095) != 0:
        returns(u64(0), EXITED)
    target = load(load(h.machine("imsic_harts")) + (offset >> 9))
    if target == 0:
        returns(u64(0), EXITED)
    if (identity == 0) | (identity > load(target + hart_state.offset("imsic_identities"))):
        returns(u64(0), EXITED)
    returns(*call("deliver", target, identity))


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
