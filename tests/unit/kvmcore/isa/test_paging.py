"""The page walk (privileged ISA 12.3 to 12.5): one access through hand-made tables, on both engines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.loader import Image
from kvmcore.engine.machine import Hart
from kvmcore.engine.reference_hart import InterpretedHart
from kvmcore.isa import traps
from kvmcore.isa.paging import LEVELS, A, D, G, R, U, V, W, X
from tests.framework.bare_guest import RAM, Guest

TABLES, DATA = RAM + 0x10_0000, RAM + 0x20_0000
VA = 0x12_3456_7000
LEAF = V | R | W | X | A | D
ACCESS = {
    "load": ("ld a1, 8(a0)", traps.LOAD_PAGE_FAULT, traps.LOAD_ACCESS_FAULT),
    "store": ("sd a1, 8(a0)", traps.STORE_PAGE_FAULT, traps.STORE_ACCESS_FAULT),
    "fetch": ("addi a0, a0, 8\n jr a0", traps.INSTRUCTION_PAGE_FAULT, traps.INSTRUCTION_ACCESS_FAULT),
    "amo": ("addi a0, a0, 8\n amoadd.d a1, a1, (a0)", traps.STORE_PAGE_FAULT, traps.STORE_ACCESS_FAULT),
}


class Walk:
    """A guest with tables of `mode` whose chain for VA ends at `level`; run() makes one access to VA + 8."""

    def __init__(self, kind: type[Hart], mode: int, level: int, va: int = VA) -> None:
        self.kind, self.mode, self.va = kind, mode, va
        self.entries: dict[int, int] = {}
        """Address -> content of the tables' entries."""
        self.level = level
        top = LEVELS[mode] - 1
        self.at = [TABLES + 4096 * (top - n) + 8 * (va >> (12 + 9 * n) & 511) for n in range(top + 1)]
        """Address of the entry for VA at each level."""
        for n in range(level + 1, top + 1):
            self.entries[self.at[n]] = (TABLES + 4096 * (top - n + 1)) >> 12 << 10 | V
        # The program itself: a gigapage in the upper half of the root for Sv39, deeper for others.
        self.prepare: Callable[[Hart], object] = lambda hart: None

    def leaf(self, flags: int, pa: int = DATA) -> Walk:
        self.entries[self.at[self.level]] = pa >> 12 << 10 | flags
        return self

    def run(self, access: str = "load", user: bool = False, bits: int = 0) -> tuple[int | None, int]:
        """(scause or None, stval); bits are set in sstatus before."""
        text = f"""
            li a0, {self.va:#x}
            la t0, handler
            csrw stvec, t0
            li t0, {self.mode << 60 | TABLES >> 12:#x}
            li t1, {bits:#x}
            csrs sstatus, t1
            la t2, inside
            csrw sepc, t2
            li t1, 0x100
            {"csrc" if user else "csrs"} sstatus, t1
            csrw satp, t0
            sret
            .balign 4
        handler:
            li a7, 1
            ecall
            .balign 4096
        inside:
            {ACCESS[access][0]}
            ebreak
        """
        g = Guest(Image.load(), text, kind=self.kind)
        # Handler page for S-mode and code page for the mode of the access, by chains of their own.
        chain = TABLES + 0x8000
        for page, flags in ((RAM, LEAF), (RAM + 4096, LEAF | (U if user else 0))):
            table = TABLES
            for n in range(LEVELS[self.mode] - 1, 0, -1):
                at = table + 8 * (page >> (12 + 9 * n) & 511)
                if at not in self.entries:
                    self.entries[at] = chain >> 12 << 10 | V
                    chain += 4096
                table = self.entries[at] >> 10 << 12
            self.entries[table + 8 * (page >> 12 & 511)] = page >> 12 << 10 | flags
        for address, entry in self.entries.items():
            g[address] = entry
        g[DATA + 8] = 0x00100073  # ebreak, for fetches
        hart = g.harts[0]
        self.prepare(hart)
        self.guest, self.hart = g, hart
        assert g.run(5) == ExitKind.ECALL
        cause = int(hart.state.scause)
        if cause == traps.BREAKPOINT:
            return None, 0
        return cause, int(hart.state.stval)


@pytest.fixture(params=[Hart, InterpretedHart], ids=["tier1", "reference"])
def kind(request: pytest.FixtureRequest) -> type[Hart]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("access", ACCESS)
def test_every_level_translates(kind: type[Hart], mode: int, access: str) -> None:
    for level in range(LEVELS[mode]):
        size = 4096 << 9 * level
        va = (5 << (3 + 9 * LEVELS[mode])) + 0x34567000
        walk = Walk(kind, mode, level, (va & -size) | (DATA & (size - 1))).leaf(LEAF, DATA & -size)
        assert walk.run(access) == (None, 0), f"level {level}"


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize(
    "flags", [0, LEAF & ~V, V | W | A | D, V | W | X | A | D, LEAF | 1 << 54, LEAF | 1 << 61, LEAF | 1 << 63]
)
def test_reserved_entries_fault(kind: type[Hart], access: str, flags: int) -> None:
    _, fault, _ = ACCESS[access]
    assert Walk(kind, 8, 0).leaf(flags).run(access) == (fault, VA + 8)


@pytest.mark.parametrize("extra", [U, A, D])
def test_pointers_with_leaf_bits_fault(kind: type[Hart], extra: int) -> None:
    walk = Walk(kind, 8, 0).leaf(LEAF)
    walk.entries[walk.at[1]] |= extra
    assert walk.run()[0] == traps.LOAD_PAGE_FAULT


def test_global_pointers_are_fine(kind: type[Hart]) -> None:
    walk = Walk(kind, 8, 0).leaf(LEAF | G | 3 << 8)
    walk.entries[walk.at[1]] |= G | 3 << 8
    assert walk.run() == (None, 0)


def test_a_pointer_at_the_last_level_faults(kind: type[Hart]) -> None:
    assert Walk(kind, 8, 0).leaf(V).run()[0] == traps.LOAD_PAGE_FAULT


def test_misaligned_superpage(kind: type[Hart]) -> None:
    assert Walk(kind, 8, 1).leaf(LEAF, DATA + 4096).run()[0] == traps.LOAD_PAGE_FAULT


@pytest.mark.parametrize("mode", LEVELS)
@pytest.mark.parametrize("access", ACCESS)
def test_addresses_must_be_canonical(kind: type[Hart], mode: int, access: str) -> None:
    walk = Walk(kind, mode, 0).leaf(LEAF)
    walk.va |= 1 << (11 + 9 * LEVELS[mode] + 1)
    assert walk.run(access) == (ACCESS[access][1], walk.va + 8)


@pytest.mark.parametrize("access", ACCESS)
def test_tables_outside_memory(kind: type[Hart], access: str) -> None:
    walk = Walk(kind, 8, 0)
    walk.entries[walk.at[1]] = 0x1000 >> 12 << 10 | V
    assert walk.run(access) == (ACCESS[access][2], VA + 8)


PERMISSIONS = [
    # flags, access, user, sstatus bits, allowed
    (V | R | A, "load", False, 0, True),
    (V | R | A, "store", False, 0, False),
    (V | R | A, "fetch", False, 0, False),
    (V | X | A, "load", False, 0, False),
    (V | X | A, "load", False, 1 << 19, True),  # MXR
    (V | X | A, "fetch", False, 0, True),
    (LEAF | U, "load", False, 0, False),
    (LEAF | U, "load", False, 1 << 18, True),  # SUM
    (LEAF | U, "store", False, 1 << 18, True),
    (LEAF | U, "fetch", False, 1 << 18, False),
    (LEAF | U, "load", True, 0, True),
    (LEAF | U, "fetch", True, 0, True),
    (LEAF, "load", True, 1 << 18, False),
    (LEAF, "store", True, 0, False),
    (LEAF, "fetch", True, 0, False),
    (V | R | A, "amo", False, 0, False),
]


@pytest.mark.parametrize(("flags", "access", "user", "bits", "allowed"), PERMISSIONS)
def test_permissions(kind: type[Hart], flags: int, access: str, user: bool, bits: int, allowed: bool) -> None:
    expected = (None, 0) if allowed else (ACCESS[access][1], VA + 8)
    assert Walk(kind, 8, 0).leaf(flags).run(access, user, bits) == expected


@pytest.mark.parametrize(("access", "set_bits"), [("load", A), ("fetch", A), ("store", A | D), ("amo", A | D)])
def test_accessed_and_dirty(kind: type[Hart], access: str, set_bits: int) -> None:
    walk = Walk(kind, 8, 0).leaf(LEAF & ~(A | D))
    assert walk.run(access) == (None, 0)
    assert walk.guest[walk.at[0]] & (A | D) == set_bits


def test_a_fault_sets_no_bits(kind: type[Hart]) -> None:
    walk = Walk(kind, 8, 0).leaf(V | R)
    assert walk.run("store")[0] == traps.STORE_PAGE_FAULT
    assert walk.guest[walk.at[0]] & (A | D) == 0


@pytest.mark.parametrize(
    ("access", "flags", "faults"),
    [("load", LEAF & ~A, True), ("store", LEAF & ~D, True), ("load", LEAF & ~D, False), ("store", LEAF, False)],
)
def test_without_svadu_software_sets_them(kind: type[Hart], access: str, flags: int, faults: bool) -> None:
    walk = Walk(kind, 8, 0).leaf(flags)
    walk.prepare = lambda hart: hart.set_extensions(frozenset({"m", "a", "c", "f", "d"}))
    assert walk.run(access) == ((ACCESS[access][1], VA + 8) if faults else (None, 0))
    assert walk.guest[walk.at[0]] & (A | D) == flags & (A | D)
