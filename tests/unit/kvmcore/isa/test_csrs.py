"""CSRs as a guest meets them: which bits they hold, who may touch them, what is illegal."""

from __future__ import annotations

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart
from kvmcore.isa import traps
from tests.unit.kvmcore.isa.conftest import USER, Execute

U64 = (1 << 64) - 1
ILLEGAL = traps.ILLEGAL_INSTRUCTION
SSTATUS = 1 << 1 | 1 << 5 | 1 << 8 | 3 << 13 | 1 << 18 | 1 << 19


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("sstatus", U64 & ~2, SSTATUS & ~2 | 2 << 32 | 1 << 63),
        ("sstatus", 0, 2 << 32),
        ("sie", U64, 0x222),
        ("stvec", 0x80001003, 0x80001001),
        ("stvec", 0x80001001, 0x80001001),
        ("scounteren", U64, 0xFFFFFFFF),
        ("senvcfg", U64, 0xF1),
        ("senvcfg", 0x20, 0),  # CBIE = 2 is reserved
        ("sscratch", U64, U64),
        ("sepc", U64, U64 - 1),
        ("scause", U64, U64),
        ("stval", U64, U64),
        ("sip", 0xDDF, 2),
        ("satp", 0xFFFF << 44 | 12, 0xFFFF << 44 | 12),
        ("satp", 7 << 60 | 1, 0),  # an unsupported mode: nothing is written
        ("stimecmp", U64 - 1, U64 - 1),
        ("siselect", U64, 0xFFF),
        ("fcsr", U64, 0xFF),
        ("frm", U64, 7),
        ("fflags", U64, 31),
    ],
)
def test_writable_bits(execute: Execute, name: str, written: int, read: int) -> None:
    ran = execute(f"li a0, {written:#x}\n csrw {name}, a0\n csrr a1, {name}")
    assert ran.cause is None
    assert ran.x(11) == read


def test_forms_of_access(execute: Execute) -> None:
    ran = execute("""
        li a0, 0xf0
        csrw sscratch, a0
        li a1, 0x3c
        csrrs a2, sscratch, a1
        csrrc a3, sscratch, a0
        csrrwi a4, sscratch, 21
        csrrsi a5, sscratch, 10
        csrrci a6, sscratch, 1
        csrr s2, sscratch
    """)
    assert [ran.x(n) for n in (12, 13, 14, 15, 16, 18)] == [0xF0, 0xFC, 0x0C, 21, 31, 30]


@pytest.mark.parametrize(
    "access",
    [
        "csrr a0, 0x7c0",
        "csrr a0, 0x600",  # hstatus
        "csrr a0, 0x300",  # mstatus
        "csrr a0, 0x5c0",
        "csrw cycle, a0",
        "csrrsi a0, time, 1",
        "csrr a0, seed",  # seed must be written (Zkr 4.1)
    ],
)
def test_illegal_accesses(execute: Execute, access: str) -> None:
    ran = execute(access)
    assert ran.cause == ILLEGAL
    raw = ran.guest[ran.state.sepc] & 0xFFFFFFFF
    assert ran.state.stval == raw


@pytest.mark.parametrize("access", ["csrr a0, cycle", "csrr a0, hpmcounter31", "csrrs a0, time, x0"])
def test_reading_counters_is_no_write(execute: Execute, access: str) -> None:
    assert execute(access).cause is None


@pytest.mark.parametrize("enabled", [0, 1])
@pytest.mark.parametrize(("counter", "bit"), [("cycle", 0), ("time", 1), ("instret", 2), ("hpmcounter5", 5)])
def test_scounteren_guards_user_mode(execute: Execute, counter: str, bit: int, enabled: int) -> None:
    ran = execute(f"li a0, {enabled << bit}\n csrw scounteren, a0\n {USER} csrr a1, {counter}\n ecall")
    assert ran.cause == (traps.ECALL_FROM_U if enabled else ILLEGAL)


@pytest.mark.parametrize("name", ["sstatus", "satp", "stopei", "stimecmp"])
def test_supervisor_csrs_are_illegal_in_user_mode(execute: Execute, name: str) -> None:
    assert execute(f"{USER} csrr a0, {name}\n ecall").cause == ILLEGAL


def test_instret_counts_exactly(execute: Execute) -> None:
    ran = execute("csrr a0, instret\n nop\n nop\n csrr a1, instret")
    assert ran.x(11) - ran.x(10) == 3


@pytest.mark.parametrize(
    "instruction", ["fadd.s f1, f2, f3", "fld f1, 0(sp)", "fsd f1, 0(sp)", "fmv.x.d a0, f1", "csrr a0, fflags"]
)
def test_fs_off(execute: Execute, instruction: str) -> None:
    def off(hart: Hart) -> None:
        hart.state.fs = 0

    assert execute(instruction, off).cause == ILLEGAL


@pytest.mark.parametrize(
    ("instruction", "dirty"),
    [
        ("fsd f1, 0(t6)", 1),
        ("csrr a0, fcsr", 1),
        ("fmv.x.w a0, f1", 1),
        ("fadd.s f1, f2, f3", 3),
        ("flw f1, 0(t6)", 3),
        ("csrw fflags, x0", 3),
        ("feq.d a0, f1, f2", 3),
    ],
)
def test_fs_becomes_dirty(execute: Execute, instruction: str, dirty: int) -> None:
    assert execute(instruction).state.fs == dirty


@pytest.mark.parametrize("frm", range(8))
def test_reserved_rounding_modes(execute: Execute, frm: int) -> None:
    assert execute(f"csrwi frm, {frm}\n fadd.d f1, f2, f3, dyn").cause == (ILLEGAL if frm > 4 else None)


def test_without_f_fs_stays_off(execute: Execute) -> None:
    def without(hart: Hart) -> None:
        hart.set_extensions(frozenset({"m", "a", "c"}))
        hart.state.fs = 0

    ran = execute("li a0, 0x6000\n csrs sstatus, a0\n csrr a1, sstatus\n fadd.s f1, f2, f3", without)
    assert ran.x(11) & 0x6000 == 0
    assert ran.cause == ILLEGAL


def test_without_sstc(execute: Execute) -> None:
    def without(hart: Hart) -> None:
        hart.set_extensions(frozenset({"m", "a", "c", "f", "d"}))

    assert execute("csrr a0, stimecmp", without).cause == ILLEGAL


def test_seed_is_user_spaces(execute: Execute) -> None:
    ran = execute("li a1, 7\n csrrw a0, seed, a1\n addi a2, a0, 1")
    state = ran.state
    assert ran.kind == ExitKind.CSR
    assert (state.exit_csr, state.exit_data, state.exit_mask) == (0x15, 7, U64)
    ran.hart.complete_csr(41)
    assert ran.guest.run(5) == ExitKind.ECALL
    assert (ran.x(10), ran.x(12)) == (41, 42)


def test_seed_in_user_mode(execute: Execute) -> None:
    assert execute(f"{USER} csrrw a0, seed, x0\n ecall").cause == ILLEGAL


def test_csrs_by_name(execute: Execute) -> None:
    ran = execute("nop")
    ran.hart.write_csr("sstatus", SSTATUS & ~2)
    assert ran.hart.read_csr("sstatus") == SSTATUS & ~2 | 2 << 32 | 1 << 63
    ran.hart.write_csr("sip", 0x222)
    assert ran.hart.read_csr("sip") == 2
    with pytest.raises(ValueError, match="read-only"):
        ran.hart.write_csr("time", 0)
