"""Traps, interrupts, sret, wfi, and the cache-block instructions' permissions."""

from __future__ import annotations

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart
from kvmcore.isa import traps
from tests.unit.kvmcore.isa.conftest import USER, Execute

INTERRUPT = 1 << 63
ILLEGAL = traps.ILLEGAL_INSTRUCTION


@pytest.mark.parametrize("instruction", ["wfi", "sret", "sfence.vma x0, x0"])
def test_user_mode_may_not(execute: Execute, instruction: str) -> None:
    assert execute(f"{USER} {instruction}").cause == ILLEGAL


def test_trap_entry(execute: Execute) -> None:
    ran = execute("csrsi sstatus, 2\n here: .word 0xffffffff")
    state = ran.state
    assert ran.cause == ILLEGAL
    assert state.stval == 0xFFFFFFFF
    assert (state.mode, state.sstatus_sie, state.sstatus_spie, state.sstatus_spp) == (1, 0, 1, 1)


def test_trap_from_user_mode(execute: Execute) -> None:
    state = execute(f"{USER} ecall").state
    assert (state.mode, state.sstatus_spp, state.scause, state.stval) == (1, 0, traps.ECALL_FROM_U, 0)


def test_short_illegal_instruction_has_16_bits_in_stval(execute: Execute) -> None:
    ran = execute(".half 0x8002\n .half 0xffff")  # c.jr x0 is reserved
    assert ran.cause == ILLEGAL
    assert ran.state.stval == 0x8002


def test_ebreak(execute: Execute) -> None:
    ran = execute("ebreak")
    assert ran.cause == traps.BREAKPOINT
    assert ran.state.stval == ran.state.sepc


def test_ebreak_under_debugging(execute: Execute) -> None:
    def debug(hart: Hart) -> None:
        hart.state.guest_debug = 1

    ran = execute("ebreak", debug)
    assert ran.kind == ExitKind.EBREAK
    assert ran.guest[ran.state.pc] & 0xFFFFFFFF == 0x00100073


def test_sret_restores(execute: Execute) -> None:
    ran = execute("""
        la t0, after
        csrw sepc, t0
        li t0, 0x120
        csrs sstatus, t0
        sret
    after:
        csrr a0, sstatus
    """)
    assert ran.cause is None
    assert ran.x(10) & 0x122 == 0x22  # SPP 0, SPIE 1, SIE from SPIE


@pytest.mark.parametrize(("pending", "taken"), [(0x2, 1), (0x20, 5), (0x22, 1), (0x220, 9), (0x222, 9)])
def test_interrupt_priorities(execute: Execute, pending: int, taken: int) -> None:
    """12.1.3: external, software, timer."""

    def prepare(hart: Hart) -> None:
        hart.state.sip = pending & 0x202
        hart.state.stimecmp = 0 if pending & 0x20 else (1 << 64) - 1

    ran = execute("li a0, 0x222\n csrw sie, a0\n csrsi sstatus, 2\n 1: j 1b", prepare)
    assert ran.cause == INTERRUPT | taken
    assert ran.state.stval == 0


def test_vectored(execute: Execute) -> None:
    ran = execute(
        """
        la t0, table + 1
        csrw stvec, t0
        li a0, 2
        csrw sie, a0
        csrw sip, a0
        csrsi sstatus, 2
        j .
        .balign 4
    table:
        nop
        .option norvc
        j handler
    """.replace(".option norvc", "")
    )
    assert ran.cause == INTERRUPT | traps.SSI


def test_exceptions_are_not_vectored(execute: Execute) -> None:
    ran = execute("""
        la t0, table + 1
        csrw stvec, t0
        .word 0xffffffff
        .balign 4
    table:
        li a0, 77
        j handler
    """)
    assert (ran.cause, ran.x(10)) == (ILLEGAL, 77)


def test_timer_is_a_level(execute: Execute) -> None:
    """Sstc: STIP is time >= stimecmp, and goes with a later stimecmp."""
    ran = execute("csrw stimecmp, x0\n csrr a0, sip\n li t0, -1\n csrw stimecmp, t0\n csrr a1, sip")
    assert (ran.x(10), ran.x(11)) == (0x20, 0)


def test_supervisor_interrupts_reach_user_mode_always(execute: Execute) -> None:
    ran = execute(f"li a0, 2\n csrw sie, a0\n csrci sstatus, 2\n {USER} 1: j 1b", lambda h: h.set_pending(1))
    assert ran.cause == INTERRUPT | traps.SSI
    assert ran.state.sstatus_spp == 0


def test_wfi_waits(execute: Execute) -> None:
    ran = execute("wfi\n wfi")
    assert ran.kind == ExitKind.WFI
    assert ran.guest.run(5) == ExitKind.WFI


def test_wfi_does_not_wait_for_what_is_pending(execute: Execute) -> None:
    ran = execute("li a0, 2\n csrw sie, a0\n csrw sip, a0\n wfi\n csrw sip, x0")
    assert ran.kind == ExitKind.ECALL


def test_sip_writes_leave_other_bits(execute: Execute) -> None:
    ran = execute("li a0, 0x222\n csrrc a1, sip, a0\n csrr a2, sip\n csrrs a3, sip, a0", lambda h: h.set_pending(9))
    assert (ran.x(11), ran.x(12), ran.x(13)) == (0x200, 0x200, 0x200)
    assert ran.state.sip == 0x202


@pytest.mark.parametrize("instruction", ["amoadd.w a0, a1, (a2)", "sc.w a0, a1, (a2)", "amoswap.d a0, a1, (a2)"])
def test_misaligned_atomics(execute: Execute, instruction: str) -> None:
    ran = execute(f"li a2, 0x80001002\n {instruction}")
    assert ran.cause == traps.STORE_MISALIGNED
    assert ran.state.stval == 0x80001002


def test_misaligned_lr(execute: Execute) -> None:
    assert execute("li a2, 0x80001004\n lr.d a0, (a2)").cause == traps.LOAD_MISALIGNED


def test_sc_needs_its_reservation(execute: Execute) -> None:
    ran = execute("""
        li a2, 0x80001000
        sc.w a0, a2, (a2)
        lr.w a1, (a2)
        sc.w a1, a2, (a2)
        sc.w a3, a2, (a2)
        lr.w a4, (a2)
        addi a5, a2, 8
        sc.w a4, a2, (a5)
        lr.d a6, (a2)
        sc.w a6, a2, (a2)
    """)
    assert [ran.x(n) for n in (10, 11, 13, 14)] == [1, 0, 1, 1]


CBO = [("cbo.inval (a0)", 0x30), ("cbo.clean (a0)", 0x40), ("cbo.flush (a0)", 0x40), ("cbo.zero (a0)", 0x80)]


@pytest.mark.parametrize(("instruction", "bits"), CBO)
def test_senvcfg_guards_cache_blocks(execute: Execute, instruction: str, bits: int) -> None:
    body = f"li a0, 0x80001000\n li a1, {{}}\n csrw senvcfg, a1\n {USER} {instruction}\n ecall"
    assert execute(body.format(bits)).cause == traps.ECALL_FROM_U
    assert execute(body.format(0xF0 & ~bits)).cause == ILLEGAL


@pytest.mark.parametrize(("instruction", "bits"), CBO)
def test_cache_blocks_switched_off(execute: Execute, instruction: str, bits: int) -> None:
    def without(hart: Hart) -> None:
        hart.set_extensions(frozenset({"m", "a", "c", "f", "d", "sstc"}))

    assert execute(f"li a0, 0x80001000\n {instruction}", without).cause == ILLEGAL
    assert execute(f"li a0, 0x80001000\n {instruction}").cause is None


def test_cbo_zero_clears_its_block(execute: Execute) -> None:
    ran = execute("""
        li a0, 0x80001000
        li t0, -1
        li t1, 32
    1:  sd t0, 0(a0)
        addi a0, a0, 8
        addi t1, t1, -1
        bnez t1, 1b
        li a0, 0x80001055
        cbo.zero (a0)
    """)
    zeros = [address for address in range(0x80001000, 0x80001100, 8) if ran.guest[address] == 0]
    assert zeros == list(range(0x80001040, 0x80001080, 8))
