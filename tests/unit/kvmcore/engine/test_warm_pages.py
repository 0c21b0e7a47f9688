"""Pages that are decoded before the guest runs: it goes on as if it had decoded them itself, and as memory is by then."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from kvmcore.engine import hart_state, machine_state, warm_pages
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import SlotView
from tests.framework.bare_guest import RAM, SIZE, Guest

PAGE = 4096
CODE = """
    li a0, 7
    la a1, far
    jr a1
    .balign 4096
far:
    addi a0, a0, 1
    li a2, 0x10000000
    sd a0, 0(a2)
"""


def warmed(image: Image, gpas: list[int], harts: int = 1) -> tuple[Guest, list[int]]:
    g = Guest(image, CODE, harts)
    with g.machine.quiesce():
        return g, warm_pages.make(g.machine, gpas)


def test_what_one_has_used_is_there_for_another(image: Image) -> None:
    one = Guest(image, CODE)
    assert one.run() == ExitKind.MMIO_WRITE
    used = warm_pages.in_use(one.machine)
    assert sorted(used) == [RAM, RAM + PAGE]
    other, made = warmed(image, used)
    assert len(set(made)) == 2
    with other.machine.quiesce():
        assert warm_pages.make(other.machine, used) == made, "they are made once"
    assert other.run() == ExitKind.MMIO_WRITE
    assert other.harts[0].state.x[10] == 8
    assert other.harts[0].state.count_page == 0, "it has decoded one all the same"


@pytest.mark.parametrize("harts", [1, 2])
def test_memory_that_changes_before_it_runs(image: Image, harts: int) -> None:
    g, _ = warmed(image, [RAM, RAM + PAGE], harts)
    g.put(RAM + PAGE, "addi a0, a0, 5")
    assert g.run() == ExitKind.MMIO_WRITE
    assert g.harts[0].state.x[10] == 12


def test_addresses_of_no_memory_are_passed_over(image: Image) -> None:
    strange = [0, RAM - PAGE, RAM + SIZE, RAM + 2, (1 << 64) - PAGE]
    g, made = warmed(image, [*strange, RAM + PAGE])
    assert len(made) == 1
    bitmap = ctypes.create_string_buffer(b"\xff" * (SIZE // PAGE // 8))
    with g.machine.quiesce():
        absent = SlotView(RAM, SIZE, g.address, userfault_bitmap=ctypes.addressof(bitmap))
        g.machine.set_slots([absent])
        assert warm_pages.make(g.machine, [RAM]) == [], "it has yet to come"


def test_no_more_than_the_pool_holds(image: Image) -> None:
    g = Guest(image, CODE, pool_bytes=64 << 10)
    with g.machine.quiesce():
        made = warm_pages.make(g.machine, [RAM + PAGE * number for number in range(100)])
    assert 0 < len(made) < 100
    assert g.run() == ExitKind.MMIO_WRITE


def test_decoded_pages_stay_while_memory_does(image: Image) -> None:
    g, made = warmed(image, [RAM])
    bitmap = ctypes.create_string_buffer(SIZE // PAGE // 8)
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, SIZE, g.address, dirty_bitmap=ctypes.addressof(bitmap))])
        assert warm_pages.make(g.machine, [RAM]) == made
        assert g.machine.state.pool_used > 0
    elsewhere = Guest(image, CODE.replace("li a0, 7", "li a0, 9"))
    with g.machine.quiesce():
        g.machine.set_slots([SlotView(RAM, SIZE, elsewhere.address)])
        assert g.machine.state.pool_used == 0
    assert g.run() == ExitKind.MMIO_WRITE
    assert g.harts[0].state.x[10] == 10


def test_an_idle_machine_gives_decoded_pages_back(image: Image) -> None:
    g = Guest(image, CODE)
    with g.machine.quiesce():
        made = warm_pages.make(g.machine, [RAM + PAGE * number for number in range(200)])
    assert len(made) == 200
    g.machine.look_if_idle()  # takes their marks
    assert g.machine.state.pool_used == 200 * machine_state.PAGE_STRIDE
    before = _resident(g.machine.state.pool)
    assert g.run() == ExitKind.MMIO_WRITE
    g.machine.look_if_idle()
    assert g.machine.state.pool_used == 2 * machine_state.PAGE_STRIDE
    assert _resident(g.machine.state.pool) < before - 190 * PAGE // 1024
    g.harts[0].state.pc = RAM
    assert g.run() == ExitKind.MMIO_WRITE
    assert g.harts[0].state.x[10] == 8
    assert g.harts[0].state.count_page == 0, "what it had entered was given back, too"


def test_an_idle_machine_forgets_what_it_fetches_in_all_address_spaces(image: Image) -> None:
    """Each look finds which pages were entered since the last one, whatever address space they were entered in."""
    root = RAM + 0x10000
    g = Guest(image, f"""
        li t0, {8 << 60 | root >> 12}
        csrw satp, t0
        call far
        csrw satp, zero
        call far
        ecall
    .balign 4096
    far:
        ret
    """)
    g.memory[root - RAM + 16 : root - RAM + 24] = (RAM >> 12 << 10 | 0xCF).to_bytes(8, "little")
    for _ in range(3):
        g.harts[0].state.pc = RAM
        assert g.run() == ExitKind.ECALL
        assert _used(g.machine.state.pool + machine_state.PAGE_STRIDE).value == 2, "once in each"
        with g.machine.quiesce():
            _used(g.machine.state.pool + machine_state.PAGE_STRIDE).value = 0
            g.harts[0].forget_fetches()


def test_what_is_forgotten_is_not_found_in_the_second_level(image: Image) -> None:
    """Its entries carry the stamp of the block that they were filled into: each block gets one that none has had."""
    g = Guest(image, CODE)
    assert g.run() == ExitKind.MMIO_WRITE
    hart = g.harts[0]
    first = hart.address + hart_state.offset("tlb_blocks") + hart.state.bank * hart_state.TLB_BANK
    places = [first + number * hart_state.TLB_BLOCK + hart_state.BLOCK_STAMPS + 8 for number in range(hart_state.TLB_BLOCKS)]
    stamps = [ctypes.c_uint64.from_address(place) for place in places]
    before, filled = {stamp.value for stamp in stamps}, hart.state.count_fetch_fill
    hart.forget_fetches()
    after = {stamp.value for stamp in stamps}
    assert len(after) == len(places)
    assert min(after) > max(before)
    hart.state.pc = RAM
    assert g.run() == ExitKind.MMIO_WRITE
    assert hart.state.count_fetch_fill > filled


def test_an_idle_machine_touches_no_tables_that_it_has_not_used(image: Image) -> None:
    g = Guest(image, CODE)
    tables = g.harts[0].address + hart_state.offset("tlb_blocks")
    size = hart_state.offset("region_status") - hart_state.offset("tlb_blocks")
    g.harts[0]._block.map.madvise(mmap.MADV_DONTNEED)  # other harts have had it
    g.harts[0]._begin()
    g.harts[0].state.pc = RAM
    assert g.run() == ExitKind.MMIO_WRITE
    before = _pages(tables, size)
    g.machine.look_if_idle()
    g.harts[0].forget_fetches()
    assert _pages(tables, size) <= before + hart_state.TLB_BANK // PAGE + 1


def test_an_idle_machine_gives_back_what_malloc_has_kept(image: Image) -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    g = Guest(image, CODE)
    blocks = [libc.malloc(64 << 10) for _ in range(64)]
    for block in blocks:
        ctypes.memset(block, 1, 64 << 10)
    for block in blocks[:-1]:  # the last one keeps malloc from giving the end of the heap back
        libc.free(block)
    there = [_pages(block, 64 << 10) for block in blocks[:-1]]
    g.machine.look_if_idle()
    left = [_pages(block, 64 << 10) for block in blocks[:-1]]
    libc.free(blocks[-1])
    assert sum(left) < sum(there) // 4


def _pages(address: int, size: int) -> int:
    """How many pages of these are in memory."""
    with open("/proc/self/pagemap", "rb", 0) as pagemap:
        pagemap.seek(address // PAGE * 8)
        entries = memoryview(pagemap.read((size // PAGE + 1) * 8)).cast("Q")
    return sum(entry >> 63 for entry in entries)


def test_pages_that_are_entered_often_outlast_a_way_through_much_code(image: Image) -> None:
    g = Guest(image, """
        li a1, 10
    again:
        fence.i
        call other
        addi a1, a1, -1
        bnez a1, again
        ecall
        .balign 4096
    other:
        ret
    """)
    assert g.run() == ExitKind.ECALL
    often = range(g.machine.state.pool, g.machine.state.pool + g.machine.state.pool_used, machine_state.PAGE_STRIDE)
    assert [_used(page).value for page in often] == [machine_state.MOST_USED] * 2
    with g.machine.quiesce():
        once = warm_pages.make(g.machine, [RAM + PAGE * number for number in range(2, 42)])
        for _ in range(machine_state.MOST_USED - 1):
            for page in once:
                _used(page).value = 1
            gone = g.machine._unused_pages()
            assert len(gone) == 42 // 8
            assert not gone & set(often)
        for page in once:
            _used(page).value = machine_state.MOST_USED
        assert g.machine._unused_pages() & set(often), "they are not entered any more"


def _used(page: int) -> ctypes.c_uint64:
    return ctypes.c_uint64.from_address(page + machine_state.PAGE_USED)


def test_an_idle_machine_gives_up_large_pages(image: Image) -> None:
    g = Guest(image, CODE)
    with g.machine.quiesce():
        assert len(warm_pages.make(g.machine, [RAM + PAGE * number for number in range(700)])) == 700
    g.machine.pool_grows()
    if "hg" not in _smaps(g.machine.state.pool, "VmFlags:"):
        pytest.skip("the host's kernel has no transparent huge pages")
    g.machine.look_if_idle()
    assert g.run() == ExitKind.MMIO_WRITE
    g.machine.look_if_idle()
    assert "hg" not in _smaps(g.machine.state.pool, "VmFlags:")


def test_a_machine_has_large_pages_from_its_second_mebibyte_on(image: Image) -> None:
    g = Guest(image, CODE)
    with g.machine.quiesce():
        warm_pages.make(g.machine, [RAM + PAGE * number for number in range(20)])
    g.machine.pool_grows()
    assert "hg" not in _smaps(g.machine.state.pool, "VmFlags:"), "what needs little code needs little memory"
    with g.machine.quiesce():
        warm_pages.make(g.machine, [RAM + PAGE * number for number in range(20, 60)])
    g.machine.pool_grows()
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the host's kernel has no transparent huge pages")
    assert "hg" in _smaps(g.machine.state.pool, "VmFlags:")


def test_a_busy_machine_keeps_them(image: Image) -> None:
    g = Guest(image, "loop: j loop")
    with g.machine.quiesce():
        made = warm_pages.make(g.machine, [RAM + PAGE * number for number in range(200)])
    for _ in range(3):
        start = g.harts[0].state.icount
        while g.harts[0].state.icount < start + 110_000_000:
            assert g.run(0.1) == ExitKind.KICK
        g.machine.look_if_idle()
    with g.machine.quiesce():
        assert warm_pages.make(g.machine, [RAM + PAGE * number for number in range(200)]) == made


def _resident(address: int) -> int:
    """KiB of the mapping with this address (and with what the kernel has joined to it) which are in memory."""
    return int(_smaps(address, "Rss:")[0])


def _smaps(address: int, name: str) -> list[str]:
    """What /proc/self/smaps says of that mapping under this name."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(word, 16) for word in first.split("-"))
            inside = start <= address < end
        elif inside and first == name:
            return rest
    raise AssertionError(f"no {name} of {address:#x}")
