"""Accesses of a region that share one look at the TLB: over the end of a page, of memory, of what may be written.

Each program runs by the interpreter, then once more from the same state in a region; both must agree on registers, memory,
exits and instructions retired.
"""

from __future__ import annotations

import ctypes

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import SlotView
from tests.framework.bare_guest import RAM, SIZE, Guest
from tests.framework.translated_peer import Regions

DATA = RAM + (4 << 20)
END = RAM + SIZE - (1 << 20)
"""Of memory in the test that goes there: within 2 MiB of a superpage."""
ROOT = RAM + (8 << 20)
"""Of the page tables: RAM one to one by a 1 GiB page, WINDOW by pages of 4 KiB over DATA."""
WINDOW = 0x4000_0000
_V, _R, _W, _X, _A, _D = 1, 2, 4, 8, 64, 128

GROUP = """
loop:
    ld a4, 0(a3)
    ld a5, 8(a3)
    add a4, a4, a5
store:
    sd a4, 16(a3)
    lhu a6, 30(a3)
    add a0, a0, a4
    xor a0, a0, a6
    addi a3, a3, 8
    addi a1, a1, -1
    bnez a1, loop
    ecall
"""


class Outcome:
    """What a run leaves, with exits on the way: how each is finished is the same every time."""

    def __init__(self, g: Guest, start: int, count: int, entry: str = "loop") -> None:
        for at in range(DATA, DATA + 16384, 8):
            g[at] = at * 0x9E3779B97F4A7C15 & 0xFFFF_FFFF_FFFF
        for at in range(END - 4096, END, 8):
            g[at] = at
        state = g.harts[0].state
        state.x[10], state.x[11], state.x[13], state.x[20], state.x[21] = 0, count, start, 0, 0
        state.pc = g.program.symbols[entry]
        before, self.exits = state.icount, []
        while (kind := g.run()) != ExitKind.ECALL:
            self.exits.append((kind, state.pc, state.exit_gpa))
            assert kind in (ExitKind.MMIO_READ, ExitKind.MMIO_WRITE), kind.name
            g.harts[0].complete_mmio(len(self.exits))
        self.registers = list(state.x)
        self.retired = state.icount - before
        self.memory = g.memory[DATA - RAM : DATA - RAM + 16384] + g.memory[END - RAM - 4096 : END - RAM + 4096]

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def install(g: Guest, label: str) -> None:
    regions = Regions(g.machine, g.machine.image)
    offset = g.program.symbols[label] - RAM
    (base,) = (b for b in regions.pages() if ctypes.c_uint64.from_address(b).value == RAM + (offset & ~4095))
    assert regions.install(base, offset & 4095)


def paged(g: Guest, pages: list[int]) -> None:
    """Sv39: the flags of WINDOW's pages, besides V, R, A. Page tables lie in RAM."""
    middle, leaf = ROOT + 4096, ROOT + 8192
    g[ROOT + 2 * 8] = RAM >> 12 << 10 | _V | _R | _W | _X | _A | _D
    g[ROOT + 8] = middle >> 12 << 10 | _V
    g[middle] = leaf >> 12 << 10 | _V
    for number, flags in enumerate(pages):
        g[leaf + 8 * number] = (DATA + 4096 * number) >> 12 << 10 | _V | _R | _A | flags
    g.harts[0].state.satp = 8 << 60 | ROOT >> 12


@pytest.mark.parametrize("paging", [False, True])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_over_the_end_of_a_page(guest, paging: bool, step: int) -> None:
    g = guest(GROUP)
    if paging:
        paged(g, [])
    start = DATA + 4096 - 64 + step
    first = Outcome(g, start, 32)
    install(g, "loop")
    assert Outcome(g, start, 32) == first
    assert not first.exits


@pytest.mark.parametrize("paging", [False, True])
def test_over_the_end_of_memory(guest, paging: bool) -> None:
    """Accesses in the middle of a group are a device's; under paging all of it is one superpage."""
    g = guest(GROUP)
    if paging:
        paged(g, [])
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, END - RAM, g.address)])
    start = END - 64
    first = Outcome(g, start, 10)
    install(g, "loop")
    assert Outcome(g, start, 10) == first
    assert {kind for kind, _, _ in first.exits} == {ExitKind.MMIO_READ, ExitKind.MMIO_WRITE}


TRAPS = (
    """
begin:
    la t0, trap
    csrw stvec, t0
    j loop
    .balign 4
trap:
    csrr t0, scause
    csrr t1, stval
    add s4, s4, t0
    add s4, s4, t1
    csrr t0, sepc
    xor s4, s4, t0
    addi s5, s5, 1
    lhu t1, 0(t0)
    andi t1, t1, 3
    addi t1, t1, -3
    addi t0, t0, 2
    bnez t1, 1f
    addi t0, t0, 2
1:  csrw sepc, t0
    sret
"""
    + GROUP
)


@pytest.mark.parametrize(
    ("pages", "start"),
    [
        ([0, _W | _D], 4096 - 64),  # may be read and not written, then all is allowed
        ([_W, _W], 4096 - 64),  # not dirty yet
        ([_W | _D, 0, _W | _D], 4096 - 64),
        ([_W | _D], 4096 - 64),  # the next page is not there
    ],
)
def test_traps_in_the_middle(guest, pages: list[int], start: int) -> None:
    """The trap's cause, value and place are summed up by the handler, which goes on behind the instruction."""
    g = guest(TRAPS)
    paged(g, pages)
    first = Outcome(g, WINDOW + start, 16, "begin")
    paged(g, pages)
    g.harts[0].flush_tlb()
    install(g, "loop")
    assert Outcome(g, WINDOW + start, 16, "begin") == first


def test_a_logged_superpage_is_logged_page_by_page(guest) -> None:
    """Several pages of one superpage: each store that is the first one of its page is noted."""
    bitmap = (ctypes.c_uint64 * 64)()
    source = """
    loop:
        sd a1, 0(a3)
        ld a4, 8(a3)
        add a0, a0, a4
        addi a3, a3, 1024
        addi a1, a1, -1
        bnez a1, loop
        ecall
    """
    g = guest(source, bitmap=ctypes.addressof(bitmap))
    paged(g, [])
    first = Outcome(g, DATA, 16)
    install(g, "loop")
    ctypes.memset(bitmap, 0, ctypes.sizeof(bitmap))
    g.harts[0].flush_tlb()
    assert Outcome(g, DATA, 16) == first
    number = (DATA - RAM) // 4096
    assert [n for n in range(4096) if bitmap[n // 64] >> n % 64 & 1] == list(range(number, number + 4))


SETS = """
begin:
    mv s2, a3
loop:
    ld a4, 0(s2)
    ld a5, 8(s2)
    add a0, a0, a4
    andi t0, a1, 3
    beqz t0, 1f
    sd a0, 16(s2)
    addi s2, s2, 24
    j 2f
1:  add s2, a3, a1
    ld a6, 0(s2)
    xor a0, a0, a6
2:  addi a1, a1, -1
    bnez a1, loop
    ecall
"""


def test_a_pointer_that_is_set_two_ways(guest) -> None:
    """What was found out about a pointer is void when the register is set, on whichever path."""
    starts = range(DATA + 4096 - 96, DATA + 4096 + 8, 8)
    g, h = guest(SETS), guest(SETS)
    Outcome(h, starts[0], 40, "begin")
    install(h, "loop")
    for start in starts:
        assert Outcome(h, start, 40, "begin") == Outcome(g, start, 40, "begin")


def test_page_tables_in_the_smaller_slot(guest) -> None:
    g = guest(GROUP)
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, ROOT - RAM, g.address), SlotView(ROOT, 4 << 20, g.address + ROOT - RAM)])
    paged(g, [_W | _D, _W])
    first = Outcome(g, WINDOW + 4096 - 64, 16)
    install(g, "loop")
    g.harts[0].flush_tlb()
    assert Outcome(g, WINDOW + 4096 - 64, 16) == first
    assert not first.exits
