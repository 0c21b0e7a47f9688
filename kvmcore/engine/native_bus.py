"""Devices that native code answers itself: ioeventfds, the coalesced-MMIO ring, MSIs into IMSICs, irqfds.

Written over Values like softmmu.py. A hart walks the bus outside guest code with `in_bus` set, so that whoever has
taken an entry away knows when nobody uses it any more (Machine.set_bus). The ring lies in a page that the client writes:
its indices are checked at each use.
"""

from __future__ import annotations

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.native_hart import (
    EXITED,
    OK,
    Code,
    FunctionHart,
    atomic,
    call,
    compare_exchange,
    load,
    param,
    returns,
    store,
    syscall,
)
from kvmcore.engine.softmmu import p1, p2
from kvmcore.ir.value import Value, const, u64
from protocol.abi import run_page

_WRITE, _PREADV2, _FUTEX, _EPOLL_WAIT = 1, 327, 202, 232
_RWF_NOWAIT = 8
_FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 128, 129
_EVERYBODY = 0x7FFFFFFF
#: struct epoll_event of x86-64 is packed: events, then what epoll_ctl was given.
EPOLL_EVENT, EPOLL_DATA = 12, 4

# What serve_irqfds works on: one block that machine.IrqfdTable makes.
IRQ_EPOLL, IRQ_EVENT, IRQ_IOVEC, IRQ_COUNT, IRQ_TARGETS = 0, 8, 24, 40, 48
"""epoll's descriptor; one event; an iovec with what it points to; then {descriptor, target} for each slot."""
IRQ_TARGET = 16
FOR_PYTHON = 0
"""A target that native code does not know; else address of the hart's block | identity << 48."""
_ADDRESS = (1 << 48) - 1


def entry_field(entry: Value, name: str) -> Value:
    return load(entry + machine_state.BUS_OFFSET[name])


# -- stores --------------------------------------------------------------------------------------------------


def bus_store(h: FunctionHart) -> None:
    """(index, end) of entries: the store of exit_*; OK when one of them has taken it."""
    entry, end = p1(), p2()
    if entry >= end:
        returns(u64(0), EXITED)
    gpa, length = h.get("exit_gpa"), h.get("exit_len").zext(64)
    start, size, kind = (entry_field(entry, name) for name in ("start", "size", "kind"))
    if kind == machine_state.BUS_ZONE:
        if (start <= gpa) & (gpa - start + length <= size):
            _, taken = call("coalesce", h.s, gpa, length)
            if taken == OK:
                returns(u64(0))
    elif (start == gpa) & ((size == 0) | (size == length)):
        different = (h.get("exit_data") ^ entry_field(entry, "match")) << ((64 - 8 * length) & 63)
        if (kind == machine_state.BUS_EVENT) | (different == 0):
            # A counter at its maximum: the waiter has enough reason to wake as it is.
            syscall(_WRITE, entry_field(entry, "fd"), h.machine("one"), 8)
            returns(u64(0))
    returns(*call("bus_store", h.s, entry + machine_state.BUS_ENTRY, end))


def coalesce(h: FunctionHart) -> None:
    """(gpa, length): the store of exit_data into the ring; EXITED when it is full, or not as it should be."""
    lock = h.machine("ring_lock")
    if ~compare_exchange(lock, u64(0), u64(1)):
        returns(u64(0), EXITED)  # another hart is at it: an exit does as well
    ring = load(h.machine("ring"))
    first, last = load(ring, 32, "volatile"), load(ring + 4, 32, "volatile")
    after = last + 1
    if after == run_page.COALESCED_MAX:
        after = const(32, 0)
    if (last >= run_page.COALESCED_MAX) | (after == first):
        store(lock, u64(0), "atomic")
        returns(u64(0), EXITED)
    at = ring + 8 + last.zext(64) * run_page.COALESCED_ENTRY_SIZE
    store(at, p1())
    store(at + 8, p2())  # len and pio, which is 0
    store(at + 16, h.get("exit_data"))
    store(ring + 4, after, "atomic")
    store(lock, u64(0), "atomic")
    returns(u64(0))


# -- harts that sleep, and interrupts for them -------------------------------------------------------------------


def wake_hart(h: FunctionHart) -> None:
    """p0 is the hart to wake: if it sleeps, or is about to, it looks around again."""
    word = h.address("wake")
    atomic("add", word, const(32, 1))
    if load(h.address("sleeping"), 32, "atomic") != 0:
        syscall(_FUTEX, word, _FUTEX_WAKE_PRIVATE, _EVERYBODY)
    returns(u64(0))


def deliver(h: FunctionHart) -> None:
    """(identity): an MSI for the hart p0, which has that identity. Any thread."""
    identity = p1()
    atomic("or", h.address("eip", identity >> 6), const(64, 1) << (identity & 63))
    atomic("or", h.address("attention"), const(32, hart_state.ATTENTION_INTERRUPT))
    store(h.address("limit"), u64(0), "atomic")
    returns(*call("wake_hart", h.s))


def serve_irqfds(h: FunctionHart) -> None:
    """p0 is an IrqfdTable: deliver what is signalled; returns the slot of the first signal that is Python's."""
    table = param("p0")
    count = syscall(_EPOLL_WAIT, load(table + IRQ_EPOLL), table + IRQ_EVENT, 1, (1 << 64) - 1)
    if count == 1:
        slot = load(table + (IRQ_EVENT + EPOLL_DATA), 64, "volatile", 4)
        if slot >= load(table + IRQ_COUNT):
            returns(slot)
        entry = table + IRQ_TARGETS + slot * IRQ_TARGET
        target = load(entry + 8, 64, "volatile")
        if target == FOR_PYTHON:
            returns(slot)
        # The client may read its eventfd too, so it can be empty again: never block on it.
        done = syscall(_PREADV2, load(entry), table + IRQ_IOVEC, 1, (1 << 64) - 1, (1 << 64) - 1, _RWF_NOWAIT)
        if done == 8:
            call("deliver", target & _ADDRESS, target >> 48)
    returns(*call("serve_irqfds", table))


def aligned_device(h: Code) -> Value:
    """1-bit: the access of exit_* is aligned, and to an address that has no memory slot and is not Python's irqchip."""
    gpa, length = h.get("exit_gpa"), h.get("exit_len").zext(64)
    slot, _ = call("find_slot", h.s, gpa, u64(0), load(h.machine("slot_count")))
    imsic = gpa - load(h.machine("imsic_start")) < load(h.machine("imsic_size"))
    aplic = gpa - load(h.machine("aplic_start")) < APLIC_SIZE
    return (slot == 0) & ((gpa & (length - 1)) == 0) & ~imsic & ~aplic


APLIC_SIZE = 0x4000
FUTEX, FUTEX_WAIT_PRIVATE = _FUTEX, _FUTEX_WAIT_PRIVATE
