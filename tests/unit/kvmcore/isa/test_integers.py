"""Results that the manuals or plain arithmetic give, at the edges: bit manipulation, division, shifts."""

from __future__ import annotations

import pytest

from tests.unit.kvmcore.isa.conftest import Execute

U64 = (1 << 64) - 1
LEAST = 1 << 63


@pytest.mark.parametrize(
    ("instruction", "a", "result"),
    [
        ("clz", 0, 64), ("clz", 1, 63), ("clz", LEAST, 0),
        ("clzw", 0, 32), ("clzw", 1 << 32, 32), ("clzw", U64, 0),
        ("ctz", 0, 64), ("ctz", LEAST, 63), ("ctz", 12, 2),
        ("ctzw", 0, 32), ("ctzw", 1 << 32, 32), ("ctzw", LEAST, 32), ("ctzw", 0xFFFFFFFE, 1),
        ("cpop", U64, 64), ("cpop", 0, 0), ("cpopw", U64, 32), ("cpopw", 1 << 40, 0),
        ("sext.b", 0x180, U64 - 0x7F), ("sext.b", 0x17F, 0x7F),
        ("sext.h", 0x8000, U64 - 0x7FFF), ("zext.h", U64, 0xFFFF),
        ("orc.b", 0x0001008000FF1000, 0x00FF00FF00FFFF00), ("orc.b", 0, 0), ("orc.b", 0x0101010101010101, U64),
        ("rev8", 0x0102030405060708, 0x0807060504030201),
    ],
)  # fmt: skip
def test_one_operand(execute: Execute, instruction: str, a: int, result: int) -> None:
    assert execute(f"li a0, {a:#x}\n {instruction} a1, a0").x(11) == result


@pytest.mark.parametrize(
    ("instruction", "a", "b", "result"),
    [
        ("div", 7, 0, U64), ("div", LEAST, U64, LEAST), ("div", U64 - 6, 2, U64 - 2),
        ("divu", 7, 0, U64), ("divu", U64, 2, LEAST - 1),
        ("rem", 7, 0, 7), ("rem", LEAST, U64, 0), ("rem", U64 - 6, 2, U64), ("remu", 7, 0, 7),
        ("divw", 7, 1 << 32, U64), ("divw", 0x80000000, U64, U64 - 0x7FFFFFFF),
        ("divuw", 0x80000000, 1, U64 - 0x7FFFFFFF), ("divuw", 5, 0, U64),
        ("remw", 0x80000000, U64, 0), ("remw", 0x180000005, 0, U64 - 0x7FFFFFFA),
        ("remuw", 0x80000005, 0, U64 - 0x7FFFFFFA),
        ("mulh", U64, U64, 0), ("mulhu", U64, U64, U64 - 1), ("mulhsu", U64, U64, U64),
        ("mulw", 0x7FFFFFFF, 2, U64 - 1),
        ("sll", 1, 127, LEAST), ("srl", LEAST, 127, 1), ("sra", LEAST, 127, U64),
        ("sllw", 1, 63, U64 - 0x7FFFFFFF), ("srlw", U64, 32, U64), ("sraw", 0x80000000, 31, U64),
        ("rol", LEAST | 1, 1, 3), ("rol", 5, 64, 5), ("ror", 1, 1, LEAST), ("ror", 5, 128, 5),
        ("rolw", 0x80000000, 1, 1), ("rorw", 1, 1, U64 - 0x7FFFFFFF), ("rorw", 0x80000000, 32, U64 - 0x7FFFFFFF),
        ("max", U64, 1, 1), ("maxu", U64, 1, U64), ("min", U64, 1, U64), ("minu", U64, 1, 1),
        ("andn", 6, 3, 4), ("orn", 0, U64, 0), ("xnor", 5, 5, U64),
        ("add.uw", U64, 1, 1 << 32), ("sh1add", 3, 1, 7), ("sh2add", 3, 1, 13), ("sh3add", LEAST, 1, 1),
        ("sh1add.uw", U64, 0, 0x1FFFFFFFE), ("sh2add.uw", U64, 0, 0x3FFFFFFFC), ("sh3add.uw", U64, 0, 0x7FFFFFFF8),
        ("bclr", U64, 64, U64 - 1), ("bext", LEAST, 127, 1), ("binv", 0, 63, LEAST), ("bset", 0, 65, 2),
        ("slt", U64, 0, 1), ("sltu", U64, 0, 0),
    ],
)  # fmt: skip
def test_two_operands(execute: Execute, instruction: str, a: int, b: int, result: int) -> None:
    assert execute(f"li a0, {a:#x}\n li a1, {b:#x}\n {instruction} a2, a0, a1").x(12) == result


@pytest.mark.parametrize(
    ("instruction", "a", "result"),
    [
        ("rori a1, a0, 63", LEAST, 1), ("roriw a1, a0, 31", 1, 2), ("slli.uw a1, a0, 63", U64, LEAST),
        ("bclri a1, a0, 63", U64, LEAST - 1), ("bexti a1, a0, 63", LEAST, 1), ("binvi a1, a0, 0", 1, 0),
        ("bseti a1, a0, 63", 0, LEAST), ("sltiu a1, a0, -1", 5, 1), ("addiw a1, a0, 1", 0x7FFFFFFF, U64 - 0x7FFFFFFF),
        ("slliw a1, a0, 31", 1, U64 - 0x7FFFFFFF), ("sraiw a1, a0, 31", 0x80000000, U64),
    ],
)  # fmt: skip
def test_immediate_operands(execute: Execute, instruction: str, a: int, result: int) -> None:
    assert execute(f"li a0, {a:#x}\n {instruction}").x(11) == result


def test_x0_stays_0(execute: Execute) -> None:
    ran = execute("li a0, 5\n add x0, a0, a0\n csrrw x0, sscratch, a0\n lui x0, 1\n mv a1, x0\n .half 0x4005")
    assert (ran.x(0), ran.x(11)) == (0, 0)


def test_jalr_reads_its_target_first(execute: Execute) -> None:
    ran = execute("la a0, target + 1\n jalr a0, 0(a0)\n li a1, 9\n target: nop")
    assert ran.x(11) == 0
    assert ran.cause is None
    assert ran.guest[ran.x(10) - 4] & 0xFFFFFFFF == 0x00050567  # the link: behind the jalr


def test_hints_and_fences_do_nothing(execute: Execute) -> None:
    ran = execute("""
        pause
        fence rw, rw
        .word 0x8330000f  # fence.tso
        .word 0x0ff0000f | 7 << 15 | 9 << 7  # reserved fields are ignored
        .word 0x00006013 | 5 << 15  # prefetch.i
        fence.i
        li a1, 1
    """)
    assert ran.cause is None
    assert ran.x(11) == 1
