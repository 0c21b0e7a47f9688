"""The IMSIC's CSRs (AIA specification, chapter 3): siselect, sireg, stopei, stopi."""

from __future__ import annotations

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.machine import Hart
from kvmcore.isa import traps
from tests.unit.kvmcore.isa.conftest import Execute

ILLEGAL = traps.ILLEGAL_INSTRUCTION


def imsic(*pending: int, identities: int = 255, enabled: bool = True) -> object:
    """A hart with an IMSIC, these identities pending, all enabled, delivery on."""

    def prepare(hart: Hart) -> None:
        hart.enable_imsic(identities)
        hart.write_imsic("eidelivery", 0, 1)
        for word in range(identities // 64 + 1):
            hart.write_imsic("eie", word, (1 << 64) - 1 if enabled else 0)
        for identity in pending:
            hart.inject_msi(identity)

    return prepare


def access(number: int, what: str) -> str:
    return f"li t0, {number}\n csrw siselect, t0\n {what}\n"


def test_claiming(execute: Execute) -> None:
    ran = execute(
        "csrr a0, stopei\n csrrw a1, stopei, x0\n csrrwi a2, stopei, 5\n csrr a3, stopei\n csrr a4, sip",
        imsic(130, 7),
    )
    assert [ran.x(n) for n in (10, 11, 12, 13, 14)] == [7 << 16 | 7, 7 << 16 | 7, 130 << 16 | 130, 0, 0]


def test_external_interrupt(execute: Execute) -> None:
    ran = execute("li a0, 0x200\n csrw sie, a0\n csrsi sstatus, 2\n 1: j 1b", imsic(3))
    assert ran.cause == 1 << 63 | traps.SEI


@pytest.mark.parametrize(("threshold", "seen"), [(0, 9), (10, 9), (9, 0), (1, 0)])
def test_threshold(execute: Execute, threshold: int, seen: int) -> None:
    body = access(0x72, f"li a0, {threshold}\n csrw sireg, a0\n csrr a1, stopei\n csrr a2, sip\n csrr a3, sireg")
    ran = execute(body, imsic(9))
    assert ran.x(11) == seen << 16 | seen
    assert ran.x(12) == (0x200 if seen else 0)
    assert ran.x(13) == threshold


def test_delivery_gates_only_the_interrupt(execute: Execute) -> None:
    ran = execute(access(0x70, "csrw sireg, x0\n csrr a0, sip\n csrr a1, stopei"), imsic(9))
    assert (ran.x(10), ran.x(11)) == (0, 9 << 16 | 9)


def test_disabled_identities_are_not_seen(execute: Execute) -> None:
    ran = execute("csrr a0, stopei\n" + access(0x80, "csrr a1, sireg"), imsic(9, enabled=False))
    assert (ran.x(10), ran.x(11)) == (0, 1 << 9)


@pytest.mark.parametrize("number", [0x80, 0xC0])
def test_arrays(execute: Execute, number: int) -> None:
    body = access(number, "li a0, -1\n csrw sireg, a0\n csrr a1, sireg\n li t1, 6\n csrrc a2, sireg, t1\n csrr a3, sireg")
    body += access(number + 8, "csrw sireg, a0\n csrr a4, sireg")
    ran = execute(body, imsic(enabled=False))
    full = (1 << 64) - 2
    assert [ran.x(n) for n in (11, 12, 13, 14)] == [full, full, full & ~6, 0]  # 256 and up do not exist


def test_setting_bits_leaves_others(execute: Execute) -> None:
    ran = execute(access(0x80, "li a0, 4\n csrrs a1, sireg, a0\n csrr a2, sireg"), imsic(9))
    assert (ran.x(11), ran.x(12)) == (1 << 9, 1 << 9 | 4)


@pytest.mark.parametrize("number", [0x30, 0x3E])
def test_priorities_are_fixed(execute: Execute, number: int) -> None:
    assert execute("li a1, 5\n" + access(number, "li a0, -1\n csrw sireg, a0\n csrr a1, sireg"), imsic()).x(11) == 0


@pytest.mark.parametrize("number", [0, 0x2F, 0x31, 0x40, 0x6F, 0x71, 0x73, 0x81, 0xFF, 0x100])
def test_reserved_registers(execute: Execute, number: int) -> None:
    assert execute(access(number, "csrr a0, sireg"), imsic()).cause == ILLEGAL


def test_stopi(execute: Execute) -> None:
    body = "li a0, {:#x}\n csrw sie, a0\n csrw sip, a0\n csrr a1, stopi"
    assert execute(body.format(0x222), imsic(3)).x(11) == traps.SEI << 16 | 1
    assert execute(body.format(0x022), imsic(3)).x(11) == traps.SSI << 16 | 1
    assert execute(body.format(0x020), imsic(3)).x(11) == 0


@pytest.mark.parametrize(("name", "number"), [("sireg", 0x151), ("stopei", 0x15C)])
def test_without_an_imsic_user_space_answers(execute: Execute, name: str, number: int) -> None:
    ran = execute(f"li a0, 6\n csrrs a1, {name}, a0\n mv a2, a1")
    assert ran.kind == ExitKind.CSR
    assert (ran.state.exit_csr, ran.state.exit_mask) == (number, 6)
    ran.hart.complete_csr(9)
    assert ran.guest.run(5) == ExitKind.ECALL
    assert ran.x(12) == 9


@pytest.mark.parametrize("name", ["siselect", "sireg", "stopei", "stopi"])
def test_without_ssaia(execute: Execute, name: str) -> None:
    def without(hart: Hart) -> None:
        hart.set_extensions(frozenset({"m", "a", "c"}))

    assert execute(f"csrr a0, {name}", without).cause == ILLEGAL
