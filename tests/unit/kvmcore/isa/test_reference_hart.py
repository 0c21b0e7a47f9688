"""The reference behind engine.machine.Hart's API: what is about threads and exits, not about instructions."""

from __future__ import annotations

import ctypes
import threading
import time

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import SlotView
from kvmcore.engine.reference import step
from kvmcore.engine.reference_hart import InterpretedHart
from tests.framework.bare_guest import RAM, SIZE, Guest


def guest(source: str, harts: int = 1) -> Guest:
    return Guest(Image.load(), source, harts, kind=InterpretedHart)


def test_kick_is_sticky_and_ends_a_loop() -> None:
    g = guest("1: j 1b")
    g.harts[0].kick()
    assert g.run() == ExitKind.KICK
    timer = threading.Timer(0.05, g.harts[0].kick)
    timer.start()
    assert g.harts[0].run() == ExitKind.KICK
    assert g.harts[0].state.running == 0


def test_devices() -> None:
    g = guest("li a0, 0x1000\n lb a1, 3(a0)\n sh a1, 2(a0)\n c.lw a2, 4(a0)\n ecall")
    state = g.harts[0].state
    assert g.run() == ExitKind.MMIO_READ
    assert (state.exit_gpa, state.exit_len) == (0x1003, 1)
    g.harts[0].complete_mmio(0x80)
    assert g.run() == ExitKind.MMIO_WRITE
    assert (state.exit_gpa, state.exit_len, state.exit_data & 0xFFFF) == (0x1002, 2, 0xFF80)
    g.harts[0].complete_mmio(0)
    assert g.run() == ExitKind.MMIO_READ
    g.harts[0].complete_mmio(0x80808080)
    assert g.run() == ExitKind.ECALL
    assert state.x[12] == 0xFFFFFFFF80808080


@pytest.mark.parametrize("access", ["amoadd.w a1, a1, (a0)", "lr.d a1, (a0)", "fld f1, 0(a0)", "cbo.zero (a0)"])
def test_devices_take_no_other_accesses(access: str) -> None:
    g = guest(f"li a0, 0x1000\n {access}\n ecall")
    g.harts[0].state.fs = 1
    assert g.run() == ExitKind.ERROR
    assert g.harts[0].state.exit_errno == 95


def test_memory_changes_while_it_runs() -> None:
    """quiesce() keeps the hart out, and afterwards it sees the new slots."""
    g = guest("li a0, 0x81000000\n li a1, 1\n 1: sd a1, 0(a0)\n j 1b")
    views = [SlotView(RAM, SIZE, g.address)]
    with g.machine.quiesce():
        g.machine.set_slots([*views, SlotView(0x81000000, 4096, g.address + 0x10000)])
    result: list[ExitKind] = []
    thread = threading.Thread(target=lambda: result.append(g.run()), daemon=True)
    thread.start()
    while not g[RAM + 0x10000]:
        time.sleep(0.001)
    with g.machine.quiesce():
        count = g.harts[0].state.icount
        time.sleep(0.02)
        assert g.harts[0].state.icount == count > 0
        assert g[RAM + 0x10000] == 1
        g[RAM + 0x10000] = 0
        g.machine.set_slots(views)
    thread.join()
    assert result == [ExitKind.MMIO_WRITE]
    assert g[RAM + 0x10000] == 0


def test_harts_are_atomic_among_themselves() -> None:
    g = guest(
        """
        li a1, 2000
        la a2, counter
        addi a6, a2, 8
        li a3, 1
    1:  amoadd.d a4, a3, (a2)
    2:  lr.d a4, (a6)
        addi a4, a4, 1
        sc.d a5, a4, (a6)
        bnez a5, 2b
        addi a1, a1, -1
        bnez a1, 1b
        ecall
        .balign 8
    counter: .dword 0, 0
    """,
        harts=2,
    )
    assert g.run_all() == [ExitKind.ECALL] * 2
    counter = g.harts[0].state.x[12]
    assert (g[counter], g[counter + 8]) == (4000, 4000)


def test_timer_interrupt_while_it_runs() -> None:
    g = guest("""
        la t0, handler
        csrw stvec, t0
        csrr t0, time
        li t1, 100000
        add t0, t0, t1
        csrw stimecmp, t0
        li t0, 0x20
        csrw sie, t0
        csrsi sstatus, 2
    1:  j 1b
        .balign 4
    handler: ecall
    """)
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.scause == 1 << 63 | 5


def test_dirty_budget() -> None:
    g = guest("li a0, 0x80010000\n li a1, 0x80012000\n sd a0, 0(a0)\n sd a0, 8(a0)\n sd a0, 0(a1)\n ecall")
    bitmap = (ctypes.c_uint64 * (SIZE >> 18))()
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, SIZE, g.address, dirty_bitmap=ctypes.addressof(bitmap))])
    g.harts[0].state.dirty_budget = 1
    assert g.run() == ExitKind.DIRTY_BUDGET
    assert bitmap[0] == 1 << 16
    assert g[0x80012000] == 0
    g.harts[0].state.dirty_budget = 1
    assert g.run() == ExitKind.ECALL
    assert bitmap[0] == 1 << 16 | 1 << 18


def test_one_step() -> None:
    g = guest("li a0, 3\n .word 0xffffffff")
    assert step(g.harts[0]) == ExitKind.NONE
    assert (g.harts[0].state.x[10], g.harts[0].state.pc) == (3, RAM + 4)
    assert step(g.harts[0]) == ExitKind.NONE  # the trap is taken
    assert (g.harts[0].state.scause, g.harts[0].state.pc) == (2, 0)
