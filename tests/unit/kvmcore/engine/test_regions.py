"""Regions: over pages, through calls, with code that changes under them, left by kicks. Compiled here, no translator."""

from __future__ import annotations

import ctypes

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart
from kvmcore.engine.regions import Code, discover
from tests.framework.bare_guest import RAM, Guest
from tests.framework.translated_peer import Regions


def installed(g: Guest, offset: int, *neighbours: int) -> Regions:
    """A region at `offset` of the first code page, which may go on in pages so many further on."""
    regions = Regions(g.machine, g.machine.image)
    pages = {page_number(base): base for base in regions.pages()}
    assert regions.install(pages[0], offset, {number: pages[number] for number in neighbours})
    return regions


def page_number(base: int) -> int:
    return (ctypes.c_uint64.from_address(base).value - RAM) // 4096


def again(g: Guest) -> ExitKind:
    """Run from the start once more, all else as it was."""
    hart = g.harts[0]
    hart.state.pc = RAM
    return g.run()


SUM = """
    li a0, 0
    li a1, 1000
loop:
    add a0, a0, a1
    addi a1, a1, -1
    bnez a1, loop
    ecall
"""


def test_a_loop_counts_as_the_interpreter_does(guest) -> None:
    g = guest(SUM)
    assert g.run() == ExitKind.ECALL
    steps = g.harts[0].state.icount
    installed(g, g.program.symbols["loop"] - RAM)
    before = g.harts[0].state.icount
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 500500
    assert g.harts[0].state.icount - before == steps


FIB = """
    li sp, 0x80800000
    li a0, 15
    call fib
    ecall
fib:
    li t0, 2
    bltu a0, t0, out
    addi sp, sp, -32
    sd ra, 0(sp)
    sd a0, 8(sp)
    addi a0, a0, -1
    call fib
    sd a0, 16(sp)
    ld a0, 8(sp)
    addi a0, a0, -2
    call fib
    ld t0, 16(sp)
    add a0, a0, t0
    ld ra, 0(sp)
    addi sp, sp, 32
out:
    ret
"""


def test_recursion_returns_inside_the_region(guest) -> None:
    g = guest(FIB)
    assert g.run() == ExitKind.ECALL
    steps = g.harts[0].state.icount
    installed(g, g.program.symbols["fib"] - RAM)
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 610
    assert g.harts[0].state.icount == 2 * steps


TWO_PAGES = """
    li a0, 0
    li a1, 100
loop:
    call other
    addi a1, a1, -1
    bnez a1, loop
    ecall
    .balign 4096
other:
    addi a0, a0, 3
    ret
"""


def test_a_call_to_another_page(guest) -> None:
    g = guest(TWO_PAGES)
    assert g.run() == ExitKind.ECALL
    steps = g.harts[0].state.icount
    installed(g, g.program.symbols["loop"] - RAM, 1)
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 300
    assert g.harts[0].state.icount == 2 * steps


@pytest.mark.parametrize("harts", [1, 2])
def test_the_other_page_changes(guest, harts: int) -> None:
    """After fence.i the region must not go on in what the page was; another hart makes pages be retired, not reused."""
    g = guest(TWO_PAGES, harts=harts)
    assert g.run() == ExitKind.ECALL
    installed(g, g.program.symbols["loop"] - RAM, 1)
    g.put(g.program.symbols["other"], "addi a0, a0, 7\n ret")
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 300, "without fence.i the old code may run, and does"
    g.harts[0].flush_icache()
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 700


@pytest.mark.parametrize("harts", [1, 2])
def test_the_regions_own_page_changes(guest, harts: int) -> None:
    g = guest(SUM, harts=harts)
    assert g.run() == ExitKind.ECALL
    installed(g, g.program.symbols["loop"] - RAM)
    g.put(g.program.symbols["loop"], "c.addi a0, 5")
    g.harts[0].flush_icache()
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 5000


SELF = """
    li a0, 0
    li a1, 50
    la t0, patch
    la t2, new
    lw t2, 0(t2)
    ecall
loop:
patch:
    addi a0, a0, 1
    sw t2, 0(t0)
    fence.i
    addi a1, a1, -1
    bnez a1, loop
    ecall
    .balign 4
new: addi a0, a0, 2
"""


def test_code_that_a_region_changes(guest) -> None:
    """The region stores over its own first instruction; from the fence.i on the new one runs."""
    g = guest(SELF)
    assert g.run() == ExitKind.ECALL
    installed(g, g.program.symbols["patch"] - RAM)
    g.harts[0].advance(4)
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 1 + 49 * 2


def test_a_kick_ends_an_endless_region(guest) -> None:
    g = guest("1: addi a0, a0, 1\n j 1b")
    assert g.run(0.1) == ExitKind.KICK
    installed(g, 0)
    assert g.run(0.1) == ExitKind.KICK
    assert g.run(0.1) == ExitKind.KICK


def test_an_unmapped_access_leaves_in_the_middle(guest) -> None:
    source = """
        li a0, 0
        li a1, 10
        li a2, 0x10000000
        la a3, word
    loop:
        addi a0, a0, 1
        ld a4, 0(a3)
        lw a5, 0(a2)
        add a0, a0, a5
        addi a1, a1, -1
        bnez a1, loop
        ecall
        .balign 8
    word: .dword 1
    """
    g = guest(source)

    def through(hart: Hart) -> int:
        reads = 0
        while g.run() == ExitKind.MMIO_READ:
            reads += 1
            hart.complete_mmio(100)
        return reads

    hart = g.harts[0]
    assert through(hart) == 10
    steps = hart.state.icount
    installed(g, g.program.symbols["loop"] - RAM)
    hart.state.pc = RAM
    assert through(hart) == 10
    assert hart.state.x[10] == 1010
    assert hart.state.icount == 2 * steps


def test_discovery_stays_in_its_bounds() -> None:
    nops = (1).to_bytes(2, "little") * 2048
    region = discover(Code({0: nops}, 0), limit=50)
    assert region is not None
    assert region.instructions == 50
    assert region.cut == 100, "there it goes on"
    assert discover(Code({0: bytes(4096)}, 0)) is None, "0 is no instruction"
    last = Code({0: nops}, 4094)
    assert discover(last) is not None
    assert last.wanted == {1}


def test_where_straight_code_is_cut() -> None:
    """By the limit, near the head; behind a cut only before the first branch: a loop longer than a region has an end."""
    nop, back, skip = (1).to_bytes(2, "little"), bytes.fromhex("6fe09fff"), bytes.fromhex("63040000")  # j -8; beqz zero, 8
    loop = Code({0: (nop * 200 + bytes.fromhex("6ff01fe7")).ljust(4096, b"\0")}, 0)  # j -400
    assert discover(loop, limit=150).cut == 300  # type: ignore[union-attr]
    rest = Code({0: (nop * 200 + bytes.fromhex("6ff01fe7")).ljust(4096, b"\0")}, 300)
    assert discover(rest, limit=150).cut is not None  # type: ignore[union-attr]
    assert discover(rest, limit=150, behind=True).cut is None  # type: ignore[union-attr]
    assert discover(Code({0: (skip + nop * 2046)}, 0), limit=150).cut is not None, "one branch away"  # type: ignore[union-attr]
    assert discover(Code({0: nop * 10 + back + bytes(4072)}, 0)).cut is None, "all of it is there"  # type: ignore[union-attr]


FAR_CALLS = """
    .option norvc
    li a0, 0
    li a1, 50
loop:
    andi t1, a1, 3
    la ra, elsewhere
    beqz t1, second
first:
    auipc ra, 0
second:
    jalr ra, 24(ra)
    addi a1, a1, -1
    bnez a1, loop
    ecall
    nop
    addi a0, a0, 1
    ret
elsewhere:
    nop
    nop
    nop
    nop
    nop
    nop
    addi a0, a0, 100
    ret
"""


def test_a_call_of_two_instructions(guest) -> None:
    """auipc and jalr are followed as a jal is; the jalr that is jumped to on its own goes where its register says."""
    g = guest(FAR_CALLS)
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 38 + 12 * 100
    steps = g.harts[0].state.icount
    symbols = g.program.symbols
    regions = Regions(g.machine, g.machine.image)
    page = regions.pages()[0]
    region = discover(Code({0: regions.content(page)}, symbols["first"] - RAM))
    assert region is not None
    assert 24 in region.blocks, "what is called"
    for label in ("loop", "first", "second"):
        assert regions.install(page, symbols[label] - RAM)
        before = g.harts[0].state.icount
        assert again(g) == ExitKind.ECALL
        assert g.harts[0].state.x[10] == 38 + 12 * 100
        assert g.harts[0].state.icount - before == steps


FALLS = """
    li a0, 0
    li a1, 10
    j loop
    .org 4096 - 8
loop:
    addi a0, a0, 1
    addi a0, a0, 2
next:
    addi a0, a0, 4
    addi a1, a1, -1
    bnez a1, loop
    ecall
"""


@pytest.mark.parametrize("harts", [1, 2])
def test_code_that_falls_into_another_page(guest, harts: int) -> None:
    """Straight on into the next page, which changes while the head's does not."""
    g = guest(FALLS, harts=harts)
    assert g.program.symbols["next"] == RAM + 4096
    assert g.run() == ExitKind.ECALL
    steps = g.harts[0].state.icount
    installed(g, g.program.symbols["loop"] - RAM, 1)
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 70
    assert g.harts[0].state.icount == 2 * steps
    g.put(g.program.symbols["next"], "addi a0, a0, 100")
    g.harts[0].flush_icache()
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 1030
