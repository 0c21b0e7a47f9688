"""Pairs of instructions with one handler: as precise as two, and entered in the middle like two."""

from __future__ import annotations

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.fusion import PAIRS
from kvmcore.engine.interpreter import handlers
from kvmcore.isa.table import BY_NAME
from tests.framework.bare_guest import RAM

DATA = RAM + 0x10_0000


def test_pairs_are_of_handlers_that_exist_and_only_the_second_may_jump():
    known = {handler.name: handler for handler in handlers().values()}
    assert len(set(PAIRS)) == len(PAIRS)
    for first, second in PAIRS:
        assert first in known
        assert second in known
        assert not known[first].branches
        assert not known[first].constants
        assert first.split(".")[1] not in ("jalr", "jal")
    assert "addi" in BY_NAME


@pytest.mark.parametrize("second", ["sd a1, 0(t1)", "c.sd a1, 0(a4)", "ld a2, 0(t1)", "c.ld a2, 0(a4)"])
def test_a_device_behind_the_second_access(guest, second):
    """The first one is done and counted; pc is at the second."""
    load = "ld" in second
    first = ("c.ld a5, 0(a3)" if load else "c.sd a1, 0(a3)") if second.startswith("c.") else (
        "ld a5, 0(t0)" if load else "sd a1, 0(t0)"
    )  # fmt: skip
    g = guest(
        f"li t0, {DATA}\n li t1, 0x10000000\n mv a3, t0\n mv a4, t1\n li a1, 7\n rdinstret a0\n {first}\n"
        f"here: {second}\n rdinstret a6\n ecall"
    )
    g[DATA] = 9
    assert g.run() == (ExitKind.MMIO_READ if load else ExitKind.MMIO_WRITE)
    hart = g.harts[0]
    assert hart.state.pc == g.program["here"]
    assert (hart.state.x[15] if load else g[DATA]) == (9 if load else 7)
    assert hart.state.icount == hart.state.x[10] + 2
    hart.complete_mmio(5)
    assert g.run() == ExitKind.ECALL
    assert hart.state.x[16] == hart.state.x[10] + 3


def test_a_fault_of_the_first_leaves_the_second_undone(guest):
    g = guest(
        "la t0, handler\n csrw stvec, t0\n li t0, 0x10000000\n li a1, 3\n here: c.fldsp fa0, 0(sp)\n c.fldsp fa1, 8(sp)\n"
        "ecall\n .balign 4\n handler: ecall"
    )
    g.harts[0].state.x[2] = DATA
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.scause, state.sepc) == (2, g.program["here"])  # FS is off


def test_the_second_of_a_pair_can_be_jumped_to(guest):
    g = guest(
        """li a2, 1000
        j second
        again: c.addi a0, 1
        second: c.addi a1, 1
        c.addi a2, -1
        bnez a2, again
        li a2, 1000
        other: c.addi a0, 1
        second_too: c.addi a1, 1
        c.addi a2, -1
        bnez a2, second_too
        ecall"""
    )
    assert g.run() == ExitKind.ECALL
    assert (g.harts[0].state.x[10], g.harts[0].state.x[11]) == (999 + 1, 1000 + 1000)


def test_a_pair_whose_second_half_is_patched(guest):
    """addi, addi: the second one changes, then the first one."""
    g = guest("target: addi a1, a1, 1\n addi a1, a1, 16\n ecall")
    hart = g.harts[0]
    assert g.run() == ExitKind.ECALL
    for source, result in (("addi a1, a1, 1\n addi a1, a1, 32", 33), ("addi a1, a1, 2\n addi a1, a1, 32", 34)):
        g.put(RAM, source)
        hart.flush_icache()
        hart.state.pc, hart.state.x[11] = RAM, 0
        assert g.run() == ExitKind.ECALL
        assert hart.state.x[11] == result


def test_results_are_computed_in_order(guest):
    """The second one reads, and overwrites, what the first one wrote."""
    g = guest(
        "li a0, 5\n add a0, a0, a0\n add a0, a0, a0\n slli a0, a0, 60\n srli a0, a0, 62\n c.li a1, 1\n c.addi a1, 2\n ecall"
    )
    assert g.run() == ExitKind.ECALL
    assert (g.harts[0].state.x[10], g.harts[0].state.x[11]) == (1, 3)
