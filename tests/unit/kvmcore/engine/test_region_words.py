"""Words that a region keeps as 32 bits: whoever sees a register sees all 64, whichever way it was set."""

from __future__ import annotations

import itertools

import pytest

from kvmcore.engine.exits import ExitKind
from kvmcore.engine.regions import Code, discover
from tests.framework.bare_guest import RAM
from tests.framework.translated_peer import Regions

DATA = RAM + (4 << 20)
VALUES = (0, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF_80000000, 0x12345678_9ABCDEF0, (1 << 64) - 1)

PROGRAMS = {
    "a word on one way, 64 bits on the other": """
        loop:
            andi t0, a1, 1
            beqz t0, 1f
            addw a0, a0, a2
        1:  sd a0, 0(a3)
            sw a0, 8(a3)
            slt t1, a0, a2
            addi a3, a3, 16
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "bit by bit": """
        loop:
            addw a0, a0, a1
            mulw a2, a2, a0
            xor t0, a0, a2
            or t1, t0, a0
            and t2, t1, a2
            not t3, t2
            and t4, a4, t3
            andi t5, a4, 255
            srliw t6, t3, 7
            sd t3, 0(a3)
            sd t4, 8(a3)
            add a4, a4, t6
            sub a4, a4, t3
            addi a3, a3, 16
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "a word becomes an address, a word, the link register": """
        loop:
            addw ra, a0, a1
            slli t1, a1, 3
            add t2, a3, t1
            sd ra, 0(t2)
            jal ra, 1f
        1:  sd ra, 64(t2)
            subw a0, a0, a2
            mv a2, a0
            lui t3, 0x80000
            xor a0, a0, t3
            zext.b t4, a2
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
    "a device in the middle": """
        loop:
            addw a0, a0, a2
            subw a2, a0, a1
            lw t0, 0(a5)
            addw t1, t0, a0
            sd t1, 0(a3)
            addi a1, a1, -1
            bnez a1, loop
            ecall
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_bits(guest, name: str) -> None:
    """By the interpreter, then in a region: registers, memory, exits and instructions retired agree."""
    plain, translated = guest(PROGRAMS[name]), guest(PROGRAMS[name])
    installed = False
    for first, second in itertools.product(VALUES, VALUES):
        outcomes = []
        for g in (plain, translated):
            state = g.harts[0].state
            for number in range(1, 32):
                state.x[number] = 0
            state.pc = RAM
            state.x[11], state.x[13], state.x[15] = 5, DATA, 0x1000_0000
            state.x[10], state.x[12], state.x[14] = first, second, first ^ second << 7
            g.memory[DATA - RAM : DATA - RAM + 256] = bytes(256)
            before, exits = state.icount, []
            while (kind := g.run()) != ExitKind.ECALL:
                assert kind == ExitKind.MMIO_READ
                exits.append((state.pc, list(state.x)))
                g.harts[0].complete_mmio(0xF0000007)
            memory = g.memory[DATA - RAM : DATA - RAM + 256]
            outcomes.append((list(state.x[:32]), memory, exits, state.icount - before))
        assert outcomes[0] == outcomes[1], f"{first:#x}, {second:#x}"
        if not installed:
            regions = Regions(translated.machine, translated.machine.image)
            assert regions.install(regions.pages()[0], 0)
            installed = True


def test_what_holds_words_is_found(guest) -> None:
    from kvmcore.engine.region_code import RegionEmitter

    g = guest(PROGRAMS["bit by bit"])
    code = Code({0: bytes(g.memory[:4096])}, 0)
    region = discover(code)
    assert region is not None
    emitter = RegionEmitter(code, region, g.machine.image.functions, {})
    words: set[str] = set()
    for step in region.blocks[0].steps:
        words = emitter._words.after(step, words)
    assert words == {f"x{number}" for number in (5, 6, 7, 10, 12, 28, 30, 31)}
