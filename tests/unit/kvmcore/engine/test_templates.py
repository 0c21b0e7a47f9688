"""Template code: exact, left by kicks and traps, with code that changes under it, beside regions, in a bounded memory."""

from __future__ import annotations

import ctypes
from itertools import pairwise

import pytest

from kvmcore.engine import machine_state
from kvmcore.engine.cold_code import ColdCode
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.hot_code import HotPage
from kvmcore.engine.loader import TEMPLATE_BYTES
from kvmcore.engine.template_code import Assembler, TemplateMemory
from tests.framework.asm import assemble
from tests.framework.assembled_peer import ALL, Templates
from tests.framework.bare_guest import RAM, Guest
from tests.framework.translated_peer import Regions


def assembled(g: Guest) -> Templates:
    """All that has been executed so far runs in template code from now on."""
    templates = Templates(g.machine, g.machine.image)
    for base in pages(g):
        assert templates.install(base)
    return templates


def pages(g: Guest) -> list[int]:
    state = g.machine.state
    bases = range(state.pool, state.pool + state.pool_used, machine_state.PAGE_STRIDE)
    return [base for base in bases if ctypes.c_uint64.from_address(base + machine_state.PAGE_HOST).value]


def handler(g: Guest, base: int, offset: int) -> int:
    """What a record leads to."""
    at = base + machine_state.PAGE_RECORDS + offset // 2 * machine_state.RECORD
    return ctypes.c_uint32.from_address(at).value


def again(g: Guest) -> ExitKind:
    g.harts[0].state.pc = RAM
    return g.run()


SUM = """
    li a0, 0
    li a1, 100000
    li s0, 0x80800000
loop:
    ld a2, 8(s0)
    add a0, a0, a1
    add a0, a0, a2
    andi t0, a1, 3
    beqz t0, skip
    sd a0, 16(s0)
    call other
skip:
    addi a1, a1, -1
    bnez a1, loop
    ecall
    .balign 4096
other:
    addi a0, a0, 3
    ret
"""


IMMEDIATES = """
    li s0, 0x123456789abcdef0
    li s10, -3
    li a0, 20
loop:
    addi a1, s0, -5
    addi a1, a1, 2000
    andi a2, s10, -7
    andi a2, a2, 1023
    xori t3, s0, -1
    xori t3, t3, 77
    ori t4, s0, 1365
    ori t4, t4, -1366
    lui t5, 0x80000
    lui a3, 0x7ffff
    li s11, -2048
    slli a4, s0, 63
    slli a4, s10, 7
    slli a4, a4, 31
    srai a5, s0, 60
    srai a5, a5, 1
    srli t6, s10, 1
    srli t6, t6, 40
    addiw a6, s0, -1
    addiw a6, a6, 2047
    add s0, s0, a1
    xor s0, s0, a4
    add s0, s0, t6
    add s10, s10, a6
    addi a0, a0, -1
    bnez a0, loop
    beq s11, x0, loop
    ecall
"""


@pytest.mark.parametrize("program", [SUM, IMMEDIATES], ids=["sum", "immediates"])
def test_the_same_result_and_instructions_retired(guest, program: str) -> None:
    g = guest(program)
    assert g.run() == ExitKind.ECALL
    result, steps = list(g.harts[0].state.x), g.harts[0].state.icount
    assembled(g)
    assert again(g) == ExitKind.ECALL
    assert list(g.harts[0].state.x) == result
    assert g.harts[0].state.icount == 2 * steps


def test_it_is_template_code_that_runs(guest) -> None:
    """Made of other bytes than the page has, so one sees."""
    g = guest(SUM)
    assert g.run() == ExitKind.ECALL
    result = g.harts[0].state.x[10]
    templates = Templates(g.machine, g.machine.image)
    other = next(base for base in pages(g) if ctypes.c_uint64.from_address(base).value == RAM + 4096)
    copy = other + machine_state.PAGE_COPY
    ctypes.memmove(copy, assemble("addi a0, a0, 4\nret", 0).image, 4)
    assert templates.install(other)
    ctypes.memmove(copy, assemble("addi a0, a0, 3\nret", 0).image, 4)
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[10] == result + 75000


def test_straight_code_can_be_entered_now_and_then(guest) -> None:
    """Whoever has left it, for a miss or by a region's end, comes back soon."""
    g = guest("li a0, 0\n" + "addi a0, a0, 1\n" * 500 + "ecall")
    assert g.run() == ExitKind.ECALL
    assembled(g)
    state = g.machine.state
    entered = [offset for offset in range(0, 2000, 2) if handler(g, state.pool, offset) >= state.templates]
    assert len(entered) >= 500 // 24
    assert max(after - before for before, after in pairwise(entered)) <= 4 * 24
    for offset in (0, *entered[3:6]):
        g.harts[0].state.pc, g.harts[0].state.x[10], before = RAM + offset, 0, g.harts[0].state.icount
        assert g.run() == ExitKind.ECALL
        assert g.harts[0].state.x[10] + (offset == 0) == g.harts[0].state.icount - before


@pytest.mark.parametrize("access", ["ld a2, 0(s0)", "sd a2, 0(s0)", "lbu a2, 9(s0)", "amoadd.d a2, a2, (s0)"])
def test_a_miss_comes_back(guest, access: str) -> None:
    """Made of other bytes than the page has, so one sees what ran behind the access."""
    g = guest(f"lui s0, 0x80800\nslli s0, s0, 32\nsrli s0, s0, 32\n{access}\n" + "addi a0, a0, 1\n" * 10 + "ecall")
    assert g.run() == ExitKind.ECALL
    templates = Templates(g.machine, g.machine.image)
    (page,) = pages(g)
    copy = page + machine_state.PAGE_COPY
    original = ctypes.string_at(copy, 64)
    ctypes.memmove(copy, original.replace(assemble("addi a0, a0, 1", 0).image, assemble("addi a0, a0, 4", 0).image), 64)
    assert templates.install(page)
    ctypes.memmove(copy, original, 64)
    for _ in range(2):
        g.harts[0].flush_tlb()
        g.harts[0].state.x[10] = 0
        misses = g.harts[0].state.count_fill
        assert again(g) == ExitKind.ECALL
        assert g.harts[0].state.count_fill == misses + 1
        assert g.harts[0].state.x[10] == 40


def test_misses_are_as_exact_as_hits(guest) -> None:
    """More pages than there are entries, accesses at each place of a page's end, bases that were just made."""
    g = guest(
        """
        li s2, 3
    round:
        li s0, 0x80800ff0
        li s1, 0x80ff0000
    loop:
        addi a1, s0, 0
        ld a2, 0(a1)
        add a0, a0, a2
        addi a1, s0, 1
        sd a1, 8(a1)
        xor a0, a0, s0
        addi a0, a0, 7
        lhu a3, 14(s0)
        sw a0, 13(s0)
        add a0, a0, a3
        addi s0, s0, 2047
        addi s0, s0, 2047
        bltu s0, s1, loop
        addi s2, s2, -1
        bnez s2, round
        ecall
    """
    )
    assert g.run() == ExitKind.ECALL
    result, steps = list(g.harts[0].state.x), g.harts[0].state.icount
    content = bytes(g.memory[0x800000:0x1000000])
    g.memory[0x800000:0x1000000] = bytes(0x800000)
    g.harts[0].state.x[10] = 0
    assembled(g)
    assert again(g) == ExitKind.ECALL
    assert list(g.harts[0].state.x) == result
    assert g.harts[0].state.icount == 2 * steps
    assert bytes(g.memory[0x800000:0x1000000]) == content


def test_accesses_by_one_pointer_share_a_look(image) -> None:
    shared = [f"ld a{index}, {8 * index}(sp)" for index in range(8)]
    apart = [f"ld a{index}, {8 * index}(s{index + 2})" for index in range(8)]
    sizes = []
    for lines in (shared, apart):
        content = assemble("\n".join([*lines, "ret"]), 0).image.ljust(4096, b"\0")
        sizes.append(len(Assembler(image).code(content, int("01" * 20, 2), 0)[0]))
    assert sizes[0] < 0.6 * sizes[1]


SHARED = """
    li s0, 0x80800f40
    li s1, 0x80801080
    li s2, 0x80a00f40
loop:
    sd s0, 16(s0)
    sw a0, 40(s0)
    ld a1, 0(s2)
    lbu a2, 16(s0)
    sd a2, 56(s0)
    add a0, a0, a1
    ld a3, 0(s0)
    ld a4, 200(s0)
    add a0, a0, a3
    sh a0, -8(s0)
    mv s3, s0
    ld s3, 16(s3)
    ld s4, 16(s3)
    sd a0, 8(s3)
    lw a5, 12(s3)
    ld s3, 16(s3)
    add a0, a0, a5
    xor a0, a0, s4
    addi s2, s2, 13
    addi s0, s0, 7
    bltu s0, s1, loop
    ecall
"""


def test_a_shared_look_is_as_exact_as_many(guest) -> None:
    """Over the end of a page; where the pointer changes; beside accesses that take the entry of the TLB."""
    g = guest(SHARED)
    before = bytes(g.memory)
    assert g.run() == ExitKind.ECALL
    result, steps, content = list(g.harts[0].state.x), g.harts[0].state.icount, bytes(g.memory)
    g.memory[:] = before
    g.harts[0].state.x[10] = 0
    assembled(g)
    g.harts[0].flush_tlb()
    assert again(g) == ExitKind.ECALL
    assert list(g.harts[0].state.x) == result
    assert g.harts[0].state.icount == 2 * steps
    assert bytes(g.memory) == content


PAGED = """
    li t0, 0x8000000000080100
    csrw satp, t0
    sfence.vma
    la t0, trapped
    csrw stvec, t0
    li s0, 0x1000
start:
    ld a1, 0(s0)
    addi a2, a2, 1
    ld a3, 8(s0)
    bnez a1, skip
    addi a2, a2, 1
    sd a2, 16(s0)
    sd a2, 24(s0)
skip:
    ld a4, 24(s0)
trapped:
    csrr a5, scause
    csrr a6, sepc
    ecall
"""
_DIRTY, _WRITABLE = 1 << 7, 1 << 2


@pytest.mark.parametrize(("value", "rights"), [(1, _WRITABLE), (0, _WRITABLE), (0, 0), (1, 0)])
def test_a_look_for_loads_asks_for_no_store(guest, value: int, rights: int) -> None:
    """A store that is jumped over sets no dirty bit; one that may not be traps, after all before it is done."""
    g = guest(PAGED)
    leaf = 0x8010_2008
    g[0x8010_0000], g[0x8010_0010] = (0x8010_1000 >> 2) | 1, (0x8000_0000 >> 2) | 0xCF
    g[0x8010_1000] = (0x8010_2000 >> 2) | 1

    def once() -> tuple[list[int], int, int]:
        g[leaf] = (0x8080_0000 >> 2) | 0x43 | rights
        g[0x8080_0000], g[0x8080_0010] = value, 0
        state = g.harts[0].state
        state.x[12], state.satp, state.mode, state.scause, state.sepc = 0, 0, 1, 0, 0
        g.harts[0].flush_tlb()
        steps = state.icount
        assert again(g) == ExitKind.ECALL
        return list(state.x)[:32], g[leaf], state.icount - steps

    first = once()
    assert bool(first[1] & _DIRTY) == (value == 0 and rights != 0)
    assert (first[0][15] == 15) == (value == 0 and rights == 0)
    assembled(g)
    assert once() == first


MOVED = """
    li t0, 0x8000000000080100
    csrw satp, t0
    sfence.vma
    li s0, 0x1000
    ld a1, 8(s0)
    ld s0, 0(s0)
    ld a2, 8(s0)
    ld a3, 0(s0)
    ecall
"""


def test_a_look_is_void_when_its_pointer_is_another(guest) -> None:
    """Into a page that lies elsewhere, seen from where it is mapped."""
    g = guest(MOVED)
    g[0x8010_0000], g[0x8010_0010] = (0x8010_1000 >> 2) | 1, (0x8000_0000 >> 2) | 0xCF
    g[0x8010_1000] = (0x8010_2000 >> 2) | 1
    g[0x8010_2008] = (0x8080_0000 >> 2) | 0xCF
    g[0x8080_0000], g[0x8080_0008], g[0x8090_0000], g[0x8090_0008] = 0x8090_0000, 11, 33, 22
    state = g.harts[0].state
    for first in (True, False):
        state.satp, state.mode = 0, 1
        g.harts[0].flush_tlb()
        assert again(g) == ExitKind.ECALL
        assert list(state.x)[11:14] == [11, 22, 33]
        if first:
            assembled(g)


def test_an_immediate_may_be_nothing(guest) -> None:
    """As the address of a symbol it could not."""
    cases = [f"{name} s{index + 2}, x0, {number}" for name in ("slti", "sltiu") for index, number in enumerate((0, 1, -1))]
    cases[3:] = [case.replace(f"s{i + 2},", f"s{i + 5},") for i, case in enumerate(cases[3:])]
    g = guest("\n".join([*cases, "addi a2, x0, 0", "ori a3, x0, 0", "slli a4, a2, 0", "ecall"]))
    assert g.run() == ExitKind.ECALL
    result = list(g.harts[0].state.x)
    assert result[18:24] == [0, 1, 0, 0, 1, 1]
    assembled(g)
    for number in (*range(18, 24), 12, 13, 14):
        g.harts[0].state.x[number] = 77
    assert again(g) == ExitKind.ECALL
    assert list(g.harts[0].state.x) == result


def test_a_kick_leaves_an_endless_loop(guest) -> None:
    g = guest("loop: addi a0, a0, 1\n beqz x0, loop")
    assert g.run(0.05) == ExitKind.KICK
    assembled(g)
    before = g.harts[0].state.icount
    assert g.run(0.05) == ExitKind.KICK
    state = g.harts[0].state
    assert state.icount > before + 1000
    assert state.x[10] == (state.icount + 1) // 2  # exact wherever it was


def test_who_leaves_has_done_all_before_and_nothing_of_the_rest(guest) -> None:
    g = guest(
        """
        li a0, 0
        li a1, 0x80800000
    loop:
        addi a0, a0, 1
        addi a0, a0, 1
    access:
        ld a2, 0(a1)
        addi a0, a0, 16
        slli a1, a1, 1
        j loop
    """
    )
    assert g.run() == ExitKind.MMIO_READ
    state = g.harts[0].state
    result, steps = list(state.x), state.icount
    assert (state.pc, state.x[10]) == (g.program.symbols["access"], 20)
    assembled(g)
    assert again(g) == ExitKind.MMIO_READ
    assert (state.pc, list(state.x), state.icount) == (g.program.symbols["access"], result, 2 * steps)


CHANGES = """
    li s0, 0
    li s1, 40
    li s2, 0
    la s3, patched
    la s6, new
    lw s4, 0(s3)
    lw s5, 0(s6)
round:
    li a1, 50
inner:
    call work
    addi a1, a1, -1
    bnez a1, inner
    sw s5, 0(s3)
    mv t0, s4
    mv s4, s5
    mv s5, t0
    fence.i
    addi s1, s1, -1
    bnez s1, round
    ecall
    .balign 4096
work:
patched:
    addi s2, s2, 1
    ret
    .balign 4
new:
    addi s2, s2, 7
"""


@pytest.mark.parametrize("harts", [1, 2])
def test_code_that_changes(guest, harts: int) -> None:
    """With another hart, pages are retired, not cleared."""
    g = guest(CHANGES, harts=harts)
    original = bytes(g.memory[: 1 << 16])
    assert g.run() == ExitKind.ECALL
    result, steps = g.harts[0].state.x[18], g.harts[0].state.icount
    g.memory[: 1 << 16] = original
    for hart in g.harts:
        hart.flush_icache()
    assembled(g)
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.x[18] == result
    assert g.harts[0].state.icount == 2 * steps


def test_regions_stay_where_they_are(guest) -> None:
    g = guest(SUM)
    assert g.run() == ExitKind.ECALL
    steps = g.harts[0].state.icount
    first = next(base for base in pages(g) if ctypes.c_uint64.from_address(base).value == RAM)
    offset = g.program.symbols["loop"] - RAM
    assert Regions(g.machine, g.machine.image).install(first, offset)
    region = handler(g, first, offset)
    assembled(g)
    assert handler(g, first, offset) == region >= g.machine.image.arena
    assert g.machine.image.templates <= handler(g, first, 0) < g.machine.image.arena
    assert again(g) == ExitKind.ECALL
    assert g.harts[0].state.icount == 2 * steps


@pytest.mark.parametrize("wanted", [0, ALL, 0x5555 << 700, (1 << 2047) | 1])
def test_any_part_of_any_bytes(image, wanted: int) -> None:
    """What a VM asks for need make no sense."""
    assembler = Assembler(image)
    branches = b"\x63\x00\x00\x80" * 1024, b"\x6f\xf0\xdf\xff" * 1024
    for content in (bytes(4096), b"\xff" * 4096, bytes(range(256)) * 16, *branches):
        code, heads = assembler.code(content, wanted, 0)
        assert 8 <= heads + 8 <= len(code) <= 1 << 20
        count = int.from_bytes(code[heads : heads + 4], "little")
        places = [int.from_bytes(code[heads + 8 + 4 * i : heads + 12 + 4 * i], "little") for i in range(count)]
        assert all(wanted >> (place >> 20) & 1 and place & 0xFFFFF < len(code) for place in places)
        assert wanted or not places


def test_more_of_a_page_is_more_code(image) -> None:
    memory = TemplateMemory(1, Assembler(image))
    content = assemble("addi a0, a0, 1\naddi a1, a1, 1\nret", 0).image.ljust(4096, b"\0")
    first = memory.place(b"a" * 16, content, 0b1)
    assert first is not None
    place, used = first.place, memory.used
    assert memory.place(b"a" * 16, content, 0b1) is first
    assert memory.used == used
    more = memory.place(b"a" * 16, content, 0b100)
    assert more is not None
    assert more.place > place
    assert more.wanted == 0b101


def test_a_full_memory_says_so(image) -> None:
    memory = TemplateMemory(1, Assembler(image))
    memory.used = TEMPLATE_BYTES - 64
    content = assemble("addi a0, a0, 1\n" * 1000, 0).image.ljust(4096, b"\0")
    assert memory.place(b"a" * 16, content, ALL) is None
    assert memory.index() == b""


def test_the_fuller_the_memory_the_hotter_a_page_has_to_be(guest) -> None:
    g = guest(SUM)
    g.run()
    cold, asked = ColdCode(g.machine), []
    (first, second) = pages(g)

    def seen(page: HotPage, times: int) -> bool:
        cold.count(page, page.base + machine_state.PAGE_RECORDS, times)
        return cold.ask(lambda message: not asked.append(message))

    for quarter, wanted in enumerate((1, 2, 4, 8)):
        cold.taken = TEMPLATE_BYTES * quarter // 4
        page, others = HotPage(first, bytes(16)), HotPage(second, bytes(16))
        if wanted > 1:
            assert not seen(page, wanted - 1)
            seen(others, 1_000_000)  # long ago: it has to be seen anew
            assert not seen(page, wanted - 1)
        assert seen(page, 1)
        assert asked.pop().pages[0][0] == first
    cold.begin()
    assert seen(HotPage(first, bytes(16)), 1)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("addi a0, a1, 5", 12),
        ("addi a0, a1, 1000", 15),
        ("xori a0, a1, -128", 12),
        ("lui a0, 0x12345", 11),
        ("slli a0, a1, 9", 12),
    ],
)
def test_constants_take_the_short_encodings(image, line: str, size: int) -> None:
    """A load, the number in one or four bytes, a store."""
    content = assemble("\n".join([line] * 12 + ["ret"]), 0).image.ljust(4096, b"\0")
    few, many = (len(Assembler(image).code(content, int("01" * count, 2), 0)[0]) for count in (8, 12))
    assert many - few == 4 * size
