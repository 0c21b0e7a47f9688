"""Address translation as native code caches it: fills, flushes, superpages, SUM, two pages, dirty log."""

from __future__ import annotations

import ctypes

import pytest

from kvmcore.engine.exits import ExitKind
from tests.framework.bare_guest import RAM

ROOT = RAM + 0x40_0000
V, R, W, X, U, A, D = 1, 2, 4, 8, 16, 64, 128
LEAF = V | R | W | X | A | D
DATA = RAM + 0x80_0000


class Tables:
    """Sv39 page tables in a guest's RAM."""

    def __init__(self, g) -> None:
        self.g, self.next = g, ROOT + 4096
        self.map(RAM, RAM, LEAF, level=2)

    def map(self, va: int, pa: int, flags: int, level: int = 0) -> int:
        """Put a leaf; its address."""
        table = ROOT
        for depth in range(2, level, -1):
            at = table + 8 * (va >> (12 + 9 * depth) & 511)
            if not self.g[at] & V:
                self.g[at] = self.next >> 12 << 10 | V
                self.next += 4096
            table = self.g[at] >> 10 << 12
        at = table + 8 * (va >> (12 + 9 * level) & 511)
        self.g[at] = pa >> 12 << 10 | flags
        return at


ON = f"li t0, {8 << 60 | ROOT >> 12}\n csrw satp, t0\n sfence.vma\n la t0, handler\n csrw stvec, t0\n"
END = "\n ecall\n .balign 4\n handler: li a7, 1\n ecall"


def start(guest, body: str, **options):
    g = guest(ON + body + END, **options)
    return g, Tables(g)


def test_loads_and_stores_go_through_the_tables(guest):
    g, tables = start(guest, "li t1, 0x1000\n ld a1, 8(t1)\n sd a1, 16(t1)")
    tables.map(0x1000, DATA, LEAF)
    g[DATA + 8] = 0x1122334455667788
    assert g.run() == ExitKind.ECALL
    assert g[DATA + 16] == 0x1122334455667788


def test_accessed_and_dirty_bits(guest):
    g, tables = start(guest, "li t1, 0x1000\n ld a1, 0(t1)\n li t1, 0x2000\n ld a1, 0(t1)\n sd a1, 0(t1)")
    first, second = tables.map(0x1000, DATA, V | R | W), tables.map(0x2000, DATA + 4096, V | R | W)
    assert g.run() == ExitKind.ECALL
    assert g[first] & (A | D) == A
    assert g[second] & (A | D) == A | D


@pytest.mark.parametrize(("access", "cause"), [("ld a1, 0(t1)", 13), ("sd a1, 0(t1)", 15), ("jr t1", 12)])
def test_page_faults_are_precise(guest, access, cause):
    g, _ = start(guest, f"li t1, 0x5000\n li a1, 77\n here: {access}")
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    where = 0x5000 if cause == 12 else g.program["here"]
    assert (state.scause, state.stval, state.sepc, state.x[11]) == (cause, 0x5000, where, 77)


def test_sfence_of_a_page_and_of_everything(guest):
    g, tables = start(
        guest,
        """li t1, 0x1000
        ld a1, 0(t1)
        li t2, 0x3000
        ld t3, 0(t2)
        ld t4, 8(t2)
        sd t4, 0(t3)
        sfence.vma t1
        ld a2, 0(t1)
        ld t4, 16(t2)
        sd t4, 0(t3)
        sfence.vma
        ld a3, 0(t1)""",
    )
    leaf = tables.map(0x1000, DATA, LEAF)
    tables.map(0x3000, DATA + 0x3000, LEAF)
    for number in range(3):
        g[DATA + 4096 * number] = 100 + number
    g[DATA + 0x3000] = leaf
    g[DATA + 0x3008] = DATA + 4096 >> 12 << 10 | LEAF
    g[DATA + 0x3010] = DATA + 8192 >> 12 << 10 | LEAF
    g[DATA + 8192] = 102
    assert g.run() == ExitKind.ECALL
    assert [g.harts[0].state.x[number] for number in (11, 12, 13)] == [100, 101, 102]


def test_one_address_of_a_superpage_flushes_all_of_it(guest):
    g, tables = start(
        guest,
        "li t1, 0x200000\n li t2, 0x300000\n ld a1, 0(t1)\n ld a2, 0(t2)\n ld t3, 8(t1)\n"
        "ld t4, 16(t1)\n sd t4, 0(t3)\n"
        "sfence.vma t1\n ld a3, 0(t2)",
    )
    base = RAM + 0x60_0000
    leaf = tables.map(0x200000, base, LEAF, level=1)
    g[base], g[base + 0x10_0000] = 1, 2
    g[base + 8], g[base + 16] = leaf, base + 0x20_0000 >> 12 << 10 | LEAF
    g[base + 0x30_0000] = 3
    assert g.run() == ExitKind.ECALL
    assert [g.harts[0].state.x[number] for number in (11, 12, 13)] == [1, 2, 3]


def test_sum_decides_over_user_pages(guest):
    g, tables = start(
        guest,
        "li t1, 0x1000\n li t2, 0x40000\n csrs sstatus, t2\n ld a1, 0(t1)\n csrc sstatus, t2\nhere: ld a2, 0(t1)",
    )
    tables.map(0x1000, DATA, LEAF | U)
    g[DATA] = 5
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.x[11], state.scause, state.sepc) == (5, 13, g.program["here"])


def test_satp_is_in_force_at_the_next_instruction(guest):
    """As Linux turns paging on: the instruction behind csrw satp is not fetched by its old address."""
    g = guest(
        f"la t0, there\n csrw stvec, t0\n li t1, {8 << 60 | ROOT >> 12}\n csrw satp, t1\n"
        f"here: li a1, 1\n ecall\n"
        ".balign 4\n there: li a2, 2\n ecall"
    )
    tables = Tables(g)
    g[ROOT + 8 * (RAM >> 30 & 511)] = 0
    tables.map(0x4000_0000, RAM, LEAF, level=2)
    state = g.harts[0].state
    assert g.run(seconds=0.3) == ExitKind.KICK  # the handler is not mapped either: it faults for ever, kickably
    assert (state.scause, state.x[11]) == (12, 0)


def test_two_address_spaces_do_not_mix(guest):
    g, tables = start(
        guest,
        f"""li t1, 0x1000
        li s0, 1000
        csrr s1, satp
        li s2, {8 << 60 | 1 << 44 | (ROOT + 0x10_0000) >> 12}
        1: ld t3, 0(t1)
        add a1, a1, t3
        csrw satp, s2
        ld t3, 0(t1)
        add a2, a2, t3
        csrw satp, s1
        addi s0, s0, -1
        bnez s0, 1b""",
    )
    tables.map(0x1000, DATA, LEAF)
    other = ROOT + 0x10_0000
    offset = ROOT - RAM
    g.memory[offset + 0x10_0000 : offset + 0x10_1000] = g.memory[offset : offset + 4096]
    second, third = other + 4096, other + 8192
    g[other] = second >> 12 << 10 | V
    g[second] = third >> 12 << 10 | V
    g[third + 8] = DATA + 4096 >> 12 << 10 | LEAF
    g[DATA], g[DATA + 4096] = 3, 10
    assert g.run() == ExitKind.ECALL
    assert (g.harts[0].state.x[11], g.harts[0].state.x[12]) == (3000, 10000)


def test_accesses_over_two_pages(guest):
    g, tables = start(guest, "li t1, 0x1ffd\n ld a1, 0(t1)\n li a2, -2\n sw a2, 0(t1)\n lhu a3, 2(t1)")
    tables.map(0x1000, DATA, LEAF)
    tables.map(0x2000, DATA + 0x8000, LEAF)
    g.memory[DATA - RAM + 0xFFD : DATA - RAM + 0x1000] = b"\x01\x02\x03"
    g.memory[DATA - RAM + 0x8000 : DATA - RAM + 0x8005] = b"\x04\x05\x06\x07\x08"
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.x[11], state.x[13]) == (0x0807060504030201, 0xFFFF)


def test_a_store_over_two_pages_happens_wholly_or_not(guest):
    g, tables = start(guest, "li t1, 0x1ffd\n li a2, -1\n here: sd a2, 0(t1)")
    tables.map(0x1000, DATA, LEAF)
    tables.map(0x2000, DATA + 0x8000, V | R | A)
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.scause, state.stval, state.sepc) == (15, 0x2000, g.program["here"])
    assert g.memory[DATA - RAM + 0xFFD : DATA - RAM + 0x1000] == b"\0\0\0"


def test_second_half_of_an_instruction_on_a_missing_page(guest):
    g, tables = start(guest, "li t1, 0x1ffe\n jr t1")
    tables.map(0x1000, DATA, LEAF)
    g.memory[DATA - RAM + 0xFFE : DATA - RAM + 0x1000] = b"\x93\x85"  # addi a1, a1, ...
    assert g.run() == ExitKind.ECALL
    state = g.harts[0].state
    assert (state.scause, state.sepc, state.stval) == (12, 0x1FFE, 0x2000)


def test_the_dirty_log_names_the_pages_that_were_written(guest):
    bitmap = (ctypes.c_uint64 * 64)()
    body = "li t1, 0x1000\n ld a1, 0(t1)\n li t1, 0x3000\n ld a1, 0(t1)\n sb a1, 1(t1)"
    g, tables = start(guest, body, bitmap=ctypes.addressof(bitmap))
    tables.map(0x1000, DATA, LEAF)
    tables.map(0x3000, DATA + 0x8000, LEAF)
    assert g.run() == ExitKind.ECALL
    page = (DATA + 0x8000 - RAM) >> 12
    assert [bitmap[index] for index in range(64)] == [1 << page % 64 if index == page // 64 else 0 for index in range(64)]


def test_the_dirty_budget_stops_before_the_store(guest):
    bitmap = (ctypes.c_uint64 * 64)()
    g = guest(
        f"li t0, {DATA}\n li t2, 4096\n li t3, 5\n 1: sd t3, 0(t0)\n add t0, t0, t2\n addi t3, t3, -1\nbnez t3, 1b\n ecall",
        bitmap=ctypes.addressof(bitmap),
    )
    state = g.harts[0].state
    state.dirty_budget = 3
    assert g.run() == ExitKind.DIRTY_BUDGET
    assert [g[DATA + 4096 * number] for number in range(5)] == [5, 4, 3, 0, 0]
    state.dirty_budget = 100
    assert g.run() == ExitKind.ECALL
    assert [g[DATA + 4096 * number] for number in range(5)] == [5, 4, 3, 2, 1]
