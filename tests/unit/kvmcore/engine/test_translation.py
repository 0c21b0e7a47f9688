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


def test_many_pages_and_one_that_moves(guest):
    """More than the TLB holds: what its second level knows of a page goes with sfence.vma as well."""
    first, pages, moved = 0x10_0000, 1500, 777
    sums = f"li t1, {first}\n li t2, {pages}\n li t4, 4096\n 1: ld t3, 0(t1)\n add {{0}}, {{0}}, t3\n add t1, t1, t4\n"
    sums += "addi t2, t2, -1\n bnez t2, 1b\n"
    g, tables = start(
        guest,
        sums.format("a1") + sums.format("a2")
        + f"li t5, {DATA + 0x9000}\n ld t6, 0(t5)\n ld t5, 8(t5)\n sd t6, 0(t5)\n"
        + f"li t0, {first + 4096 * moved}\n sfence.vma t0\n"
        + sums.format("a3"),
    )  # fmt: skip
    for number in range(pages):
        leaf = tables.map(first + 4096 * number, DATA + 4096 * (number % 8), LEAF)
        if number == moved:
            g[DATA + 0x9008] = leaf
    for number in range(8):
        g[DATA + 4096 * number] = number + 1
    g[DATA + 0x8000], g[DATA + 0x9000] = 1000, DATA + 0x8000 >> 12 << 10 | LEAF
    assert g.run() == ExitKind.ECALL
    total = sum(number % 8 + 1 for number in range(pages))
    assert [g.harts[0].state.x[number] for number in (11, 12, 13)] == [total, total, total - (moved % 8 + 1) + 1000]


UP, HIGH, G = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000, 32
SPACES, ROUNDS = 7, 40


def kernel_in_the_upper_half(guest, body: str, shared: int, own: int):
    """A guest whose code and page at s5 are the same everywhere, while each space has a page of its own at s6. At s9, for each
    space: satp, address of the leaf of that page, the two leaves that it may have; the frames have 100 * space + 0 or 1."""
    area = DATA + 0x10_0000
    g = guest(
        ON
        + f"""li s4, {UP - RAM}
        la t0, up
        add t0, t0, s4
        jr t0
        up: la t0, handler
        add t0, t0, s4
        csrw stvec, t0
        li s5, {HIGH}
        li s6, {HIGH + 4096}
        li s7, 31
        li s8, 0x40000
        li s9, {area + UP - RAM}
        {body}"""
        + END
    )
    kind = LEAF | shared
    Tables(g)
    for space in range(SPACES):
        root, middle, last = (ROOT + 0x10_0000 + 0x4000 * space + 4096 * level for level in range(3))
        g[root + 8 * 2], g[root + 8 * 510] = RAM >> 12 << 10 | LEAF, RAM >> 12 << 10 | kind
        g[root + 8 * 511], g[middle] = middle >> 12 << 10 | V, last >> 12 << 10 | V
        frames = [DATA + 0x2000 * space + 0x1000 * turn for turn in range(2)]
        leaves = [frame >> 12 << 10 | LEAF | own for frame in frames]
        g[last], g[last + 8] = DATA + 0xF_0000 >> 12 << 10 | kind, leaves[1]
        for turn, frame in enumerate(frames):
            g[frame] = 100 * space + turn
        at = area + 32 * space
        g[at], g[at + 8] = 8 << 60 | (space + 1) << 44 | root >> 12, last + 8 + UP - RAM
        g[at + 16], g[at + 24] = leaves
    g[DATA + 0xF_0000] = 5
    g[ROOT + 8 * 510] = RAM >> 12 << 10 | kind
    return g


@pytest.mark.parametrize("shared", [G, 0])
@pytest.mark.parametrize("own", [0, U])
def test_address_spaces_with_a_kernel_in_the_upper_half(guest, shared, own):
    """As Linux has it. A space's own page is given another frame in every round, and its translations forgotten by the ASID."""
    mine = "csrs sstatus, s8\n ld t2, 0(s6)\n csrc sstatus, s8" if own else "ld t2, 0(s6)"
    body = f"""sfence.vma
        li s0, {ROUNDS}
        round: mv s1, s9
        li s2, {SPACES}
        space: ld t0, 0(s1)
        csrw satp, t0
        srli t1, t0, 44
        ld t2, 0(s5)
        add a2, a2, t2
        {mine}
        mul a1, a1, s7
        add a1, a1, t2
        ld t3, 8(s1)
        ld t4, 16(s1)
        ld t5, 24(s1)
        sd t4, 24(s1)
        sd t5, 16(s1)
        sd t4, 0(t3)
        sfence.vma zero, t1
        {mine}
        mul a1, a1, s7
        add a1, a1, t2
        addi s1, s1, 32
        addi s2, s2, -1
        bnez s2, space
        addi s0, s0, -1
        bnez s0, round"""
    g = kernel_in_the_upper_half(guest, body, shared, own)
    assert g.run() == ExitKind.ECALL
    expected = 0
    for number in range(ROUNDS):
        for space in range(SPACES):
            for turn in (1 - number % 2, number % 2):
                expected = (expected * 31 + 100 * space + turn) % (1 << 64)
    state = g.harts[0].state
    assert (state.x[12], state.x[11]) == (5 * SPACES * ROUNDS, expected)
    if shared and own:
        assert state.count_fill < 2 * SPACES * ROUNDS + 60, "what is global is not looked up again"


def test_a_space_that_began_with_anothers_entries_has_its_own(guest):
    body = """ld s0, 0(s9)
        ld s1, 32(s9)
        csrw satp, s0
        sfence.vma
        ld t2, 0(s5)
        csrw satp, s1
        ld t2, 0(s5)
        ld a1, 0(s6)
        csrw satp, s0
        ld a2, 0(s6)
        csrw satp, s1
        ld a3, 0(s6)"""
    g = kernel_in_the_upper_half(guest, body, G, 0)
    assert g.run() == ExitKind.ECALL
    assert [g.harts[0].state.x[number] for number in (11, 12, 13)] == [101, 1, 101]
