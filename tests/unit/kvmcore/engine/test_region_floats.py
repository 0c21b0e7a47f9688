"""Singles that a region keeps without their box: what is not boxed stays what it is, and is a NaN where a single is read."""

from __future__ import annotations

import itertools

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.regions import Code, discover
from tests.framework.bare_guest import RAM
from tests.framework.translated_peer import Regions

DATA = RAM + (4 << 20)
VALUES = (
    0xFFFFFFFF_3FC00000,  # 1.5, boxed
    0x3FF80000_00000000,  # 1.5, a double
    0x00000000_3FC00000,  # 1.5, not boxed
    0xFFFFFFFF_7F800001,  # a signaling NaN
    0xFFFFFFFE_40000000,  # one bit short of a box
)

PROGRAMS = {
    "read as single from the head on": """
        loop:
            fadd.s fa2, fa0, fa1
            fmv.d fa0, fa2
            fsd fa0, 0(a3)
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "single on one way, anything on the other": """
        loop:
            andi t0, a1, 1
            beqz t0, 1f
            fmul.s fa0, fa1, fa1
        1:  fsd fa0, 0(a3)
            fsw fa0, 8(a3)
            fmv.x.w t1, fa0
            addi a3, a3, 16
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "read as single on one way only": """
        loop:
            andi t0, a1, 2
            beqz t0, 1f
            fadd.s fa2, fa0, fa0
            fsgnjn.s fa0, fa2, fa1
        1:  fcvt.d.s fa3, fa1
            fsd fa3, 0(a3)
            fld fa1, 0(a3)
            addi a3, a3, 8
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "a trap with singles in registers": """
        loop:
            fadd.s fa0, fa0, fa1
            fcvt.s.w fa2, a1
            lw t0, 0(a4)
            fadd.s fa1, fa2, fa0
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_boxes(guest, name: str) -> None:
    """By the interpreter, then in a region: registers, flags, memory, exits and instructions retired agree."""
    plain, translated = guest(PROGRAMS[name]), guest(PROGRAMS[name])
    installed = 0
    for first, second in itertools.product(VALUES, VALUES):
        outcomes = []
        for g in (plain, translated):
            state = g.harts[0].state
            state.pc, state.fs, state.fflags = RAM, 3, 0
            state.x[11], state.x[13], state.x[14] = 5, DATA, 0x1000_0000
            for number in range(32):
                state.f[number] = 0
            state.f[10], state.f[11] = first, second
            g.memory[DATA - RAM : DATA - RAM + 256] = bytes(256)
            before, exits = state.icount, []
            while (kind := g.run()) != ExitKind.ECALL:
                assert kind == ExitKind.MMIO_READ
                exits.append((state.pc, list(state.f)))
                g.harts[0].complete_mmio(7)
            memory = g.memory[DATA - RAM : DATA - RAM + 256]
            outcomes.append((list(state.x), list(state.f), state.fflags, memory, exits, state.icount - before))
        assert outcomes[0] == outcomes[1], f"{first:#x}, {second:#x}"
        if not installed:
            regions = Regions(translated.machine, translated.machine.image)
            assert regions.install(regions.pages()[0], 0)
            installed = 1


def test_what_holds_singles_is_found(guest) -> None:
    from kvmcore.engine.region_code import RegionEmitter

    g = guest(PROGRAMS["a trap with singles in registers"])
    g.harts[0].state.x[11] = 1
    code = Code({0: bytes(g.memory[:4096])}, 0)
    region = discover(code)
    assert region is not None
    emitter = RegionEmitter(code, region, g.machine.image.functions, {})
    assert emitter._floats.at[0] == {"f10", "f11"}
