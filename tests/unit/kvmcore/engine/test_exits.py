"""Why and how run() comes back: devices, ecall, wfi, holes; completion."""

from __future__ import annotations

from errno import EFAULT, EOPNOTSUPP

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import SlotView
from tests.framework.bare_guest import RAM, SIZE


@pytest.mark.parametrize(
    ("load", "data", "result"),
    [
        ("lb", 0x180, 0xFFFFFFFFFFFFFF80),
        ("lbu", 0x180, 0x80),
        ("lh", 0x8000, 0xFFFFFFFFFFFF8000),
        ("lhu", 0x8000, 0x8000),
        ("lw", 0x80808080, 0xFFFFFFFF80808080),
        ("lwu", 0x80808080, 0x80808080),
        ("ld", 0x8877665544332211, 0x8877665544332211),
    ],
)
def test_a_load_from_a_device_is_completed_as_the_instruction_says(guest, load, data, result):
    g = guest(f"li t0, 0x10000008\n {load} a1, -8(t0)\n ecall")
    assert g.run() == ExitKind.MMIO_READ
    hart = g.harts[0]
    size = {"b": 1, "h": 2, "w": 4, "d": 8}[load[1]]
    assert (hart.state.exit_gpa, hart.state.exit_len) == (0x10000000, size)
    hart.complete_mmio(data)
    assert g.run() == ExitKind.ECALL
    assert hart.state.x[11] == result


def test_a_compressed_store_to_a_device_advances_by_two(guest):
    g = guest("li a0, 0x10000000\n li a1, 0x1234\n here: c.sw a1, 4(a0)\n ecall")
    assert g.run() == ExitKind.MMIO_WRITE
    state = g.harts[0].state
    assert (state.pc, state.exit_gpa, state.exit_len) == (g.program["here"], 0x10000004, 4)
    assert state.exit_data & 0xFFFFFFFF == 0x1234
    g.harts[0].complete_mmio(0)
    assert state.pc == g.program["here"] + 2
    assert g.run() == ExitKind.ECALL


@pytest.mark.parametrize("access", ["amoadd.w a1, a1, (t0)", "lr.w a1, (t0)", "fld fa0, 0(t0)", "fsd fa0, 0(t0)"])
def test_devices_know_integer_loads_and_stores_only(guest, access):
    g = guest(f"li t1, 0x6000\n csrs sstatus, t1\n li t0, 0x10000000\n here: {access}\n ecall")
    for _ in range(2):  # repeatable, and nothing has happened
        assert g.run() == ExitKind.ERROR
        assert g.harts[0].state.exit_errno == EOPNOTSUPP
        assert g.harts[0].state.pc == g.program["here"]


@pytest.mark.parametrize("access", ["ld a1, 0(t0)", "sd a1, 0(t0)", "jr t0"])
def test_a_slot_without_memory_is_the_callers_fault(guest, access):
    g = guest(f"li t0, 0x90000000\n {access}\n ecall")
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, SIZE, g.address), SlotView(0x90000000, 4096, 0)])
    assert g.run() == ExitKind.ERROR
    assert g.harts[0].state.exit_errno == EFAULT


def test_a_store_to_read_only_memory_is_a_devices_business(guest):
    g = guest("li t0, 0x90000000\n li a1, 7\n ld a2, 0(t0)\n sd a1, 0(t0)\n ecall")
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, SIZE, g.address), SlotView(0x90000000, 4096, g.address + 0x8000, readonly=True)])
    g[RAM + 0x8000] = 99
    assert g.run() == ExitKind.MMIO_WRITE
    assert (g.harts[0].state.x[12], g[RAM + 0x8000]) == (99, 99)


def test_fetch_from_nowhere_is_an_access_fault(guest):
    g = guest("la t0, handler\n csrw stvec, t0\n li t0, 0x40000000\n jr t0\n .balign 4\n handler: ecall")
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.scause, state.sepc, state.stval) == (1, 0x40000000, 0x40000000)


def test_wfi_sleeps_unless_something_is_pending(guest):
    g = guest("csrsi sie, 2\n wfi\n li a1, 1\n wfi\n li a1, 2\n ecall")
    hart = g.harts[0]
    hart.set_pending(1)
    assert g.run() == ExitKind.ECALL
    assert hart.state.x[11] == 2
    hart.clear_pending(1)
    hart.state.pc = RAM
    assert g.run() == ExitKind.WFI
    assert hart.state.pc == RAM + 8


def test_the_timer_wakes(guest):
    g = guest("rdtime t0\n li t1, 20000\n add t0, t0, t1\n csrw stimecmp, t0\n li t0, 32\n csrs sie, t0\nwfi\n ecall")
    assert g.run() == ExitKind.WFI
    assert 0 < g.harts[0].deadline_ns() <= 2_000_000


def test_timer_interrupts_come_while_the_guest_spins(guest):
    g = guest(
        "la t0, handler\n csrw stvec, t0\n li t0, 32\n csrs sie, t0\n rdtime t0\n addi t0, t0, 2000\n"
        "csrw stimecmp, t0\n csrsi sstatus, 2\n 1: addi a1, a1, 1\n j 1b\n .balign 4\n handler: ecall"
    )
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.scause == 1 << 63 | 5
    assert g.harts[0].state.x[11] > 0


def test_instructions_are_counted_exactly(guest):
    g = guest("li a1, 1000\n 1: addi a1, a1, -1\n bnez a1, 1b\n rdinstret a2\n c.nop\n rdinstret a3\n ecall")
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.x[12], state.x[13], state.icount) == (2001, 2003, 2004)
