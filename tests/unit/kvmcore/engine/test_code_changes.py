"""Code that changes: fence.i, other harts, devices, instructions on two pages, a full pool."""

from __future__ import annotations

import threading

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import SlotView
from kvmcore.engine.machine_state import PAGE_STRIDE
from tests.framework.asm import assemble
from tests.framework.bare_guest import RAM, SIZE

CODE = RAM + 0x1_0000


def word(source: str) -> int:
    return int.from_bytes(assemble(source, 0).image, "little")


def test_patched_code_runs_after_fence_i(guest):
    g = guest(
        f"""li s0, {CODE}
        li s1, {word("li a0, 1")}
        li s2, {word("ret")}
        sw s2, 4(s0)
        li s3, 500
        1: sw s1, 0(s0)
        fence.i
        jalr s0
        add s4, s4, a0
        li t0, 0x100000
        add s1, s1, t0
        addi s3, s3, -1
        bnez s3, 1b
        ecall"""
    )
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[20] == sum(range(1, 501))


def test_code_on_the_page_that_runs_can_be_patched(guest):
    g = guest(
        f"""la s0, target
        li s1, {word("addi a1, a1, 100")}
        sw s1, 0(s0)
        fence.i
        target: addi a1, a1, 1
        ecall"""
    )
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == 100


def test_what_a_device_wrote_runs_after_fence_i(guest):
    g = guest(f"li s0, {CODE}\n jalr s0\n ecall\n fence.i\n jalr s0\n ecall")
    g.put(CODE, "li a1, 1\n ret")
    assert g.run() == ExitKind.ECALL
    g.put(CODE, "li a1, 2\n ret")
    g.harts[0].advance(4)
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == 2


def test_another_hart_sees_the_patch_after_its_own_fence_i(guest):
    """Hart 0 writes version n and announces it; hart 1 fences, calls, and must get n (or a later one)."""
    flag, answer = RAM + 0x20_0000, RAM + 0x20_0040
    g = guest(
        f"""li s0, {CODE}
        li s1, {flag}
        li s2, {answer}
        li s3, 0
        li s5, 300
        bnez a0, hart1
        li s4, {word("li a0, 0")}
        1: addi s3, s3, 1
        li t0, 0x100000
        add s4, s4, t0
        sw s4, 0(s0)
        fence rw, rw
        sd s3, 0(s1)
        2: ld t0, 0(s2)
        bne t0, s3, 2b
        bne s3, s5, 1b
        ecall
        hart1: ld t0, 0(s1)
        beq t0, s3, hart1
        fence rw, rw
        fence.i
        mv s3, t0
        jalr s0
        bne a0, s3, wrong
        sd s3, 0(s2)
        bne s3, s5, hart1
        ecall
        wrong: wfi
        ecall""",
        harts=2,
    )
    g.put(CODE, "li a0, 0\n ret")
    assert g.run_all() == [ExitKind.ECALL] * 2
    assert g.harts[1].state.x[19] == 300


def test_an_instruction_on_two_pages(guest):
    """Its two halves change independently; branches from and to it work."""
    at = CODE + 0xFFE
    g = guest(f"li s0, {at - 4}\n jalr s0\n ecall\n fence.i\n jalr s0\n ecall")
    g.put(at - 4, "c.nop\n c.nop\n addi a1, a1, 5\n ret")
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == 5
    g.put(at, "addi a1, a1, 1285\n ret")  # 0x505: only the second half differs
    g.harts[0].advance(4)
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == 5 + 1285


def test_a_loop_over_a_page_boundary(guest):
    g = guest(f"li s0, {CODE + 0xFF8}\n li a2, 50000\n jr s0")
    g.put(CODE + 0xFF8, "addi a1, a1, 1\n c.addi a2, -1\n bnez a2, .-6\n ecall")
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == 50000


def chain(g, pages: int) -> None:
    """A function that adds 1 to a1 on each of `pages` pages."""
    for number in range(pages):
        g.put(CODE + 4096 * number, "addi a1, a1, 1\n " + ("ret" if number == pages - 1 else "j .+4092"))


@pytest.mark.parametrize("harts", [1, 3])
def test_a_full_pool_gives_pages_up(guest, harts):
    """48 pages of code, room for 16: the result is right, and pages were given up again and again."""
    source = f"li s0, {CODE}\n li s1, 10\n 1: jalr s0\n addi s1, s1, -1\n bnez s1, 1b\n ecall"
    g = guest(source, harts=harts, pool_bytes=16 * PAGE_STRIDE)
    chain(g, 48)
    assert g.run_all(60) == [ExitKind.ECALL] * harts
    assert [hart.state.x[11] for hart in g.harts] == [480] * harts
    assert g.machine.pages_given_up >= 400


@pytest.mark.parametrize("room", [10, 33, 47])
def test_pages_are_given_up_while_others_are_used(guest, room):
    """48 functions on pages of their own, called in no order: some are used often, most seldom."""
    g = guest(
        f"""li s0, {CODE}
        li s1, 20000
        li s2, 12345
        li s4, 6364136223846793005
        1: mul s2, s2, s4
        addi s2, s2, 1442
        srli t0, s2, 58
        li t1, 48
        bltu t0, t1, 2f
        andi t0, t0, 3
        2: slli t0, t0, 12
        add t0, t0, s0
        jalr t0
        addi s1, s1, -1
        bnez s1, 1b
        ecall""",
        pool_bytes=room * PAGE_STRIDE,
    )
    for number in range(48):
        g.put(CODE + 4096 * number, f"addi a1, a1, {number + 1}\n ret")
    state, total = 12345, 0
    for _ in range(20000):
        state = (state * 6364136223846793005 + 1442) % (1 << 64)
        number = state >> 58
        total += (number if number < 48 else number & 3) + 1
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[11] == total
    assert g.machine.flushes_of_pool == 1, "only when memory was given"
    assert g.machine.pages_given_up


def test_patching_while_others_execute(guest):
    """One hart rewrites a function over and over; the others call it and get an old or a new one."""
    g = guest(
        f"""li s0, {CODE}
        li s5, 3000
        bnez a0, caller
        li s1, {word("li a0, 11")}
        li s2, {word("li a0, 22")}
        1: sw s1, 0(s0)
        fence.i
        sw s2, 0(s0)
        fence.i
        addi s5, s5, -1
        bnez s5, 1b
        ecall
        caller: li s3, 11
        li s4, 22
        2: fence.i
        jalr s0
        beq a0, s3, 3f
        bne a0, s4, wrong
        3: addi s5, s5, -1
        bnez s5, 2b
        ecall
        wrong: wfi""",
        harts=3,
    )
    g.put(CODE, "li a0, 11\n ret")
    assert g.run_all(60) == [ExitKind.ECALL] * 3


def test_memory_slots_may_change_under_running_harts(guest):
    g = guest("1: addi t0, t0, 1\n j 1b", harts=2)
    thread = threading.Thread(target=g.run_all, args=(1.0,), daemon=True)
    thread.start()
    for number in range(50):
        with g.machine.quiesce():
            extra = [SlotView(0x9000_0000, 4096, g.address)] if number % 2 else []
            g.machine.set_slots([SlotView(RAM, SIZE, g.address), *extra])
    thread.join()
    assert all(hart.state.x[5] > 1000 for hart in g.harts)
