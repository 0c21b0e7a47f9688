"""Guest code for sequences: a small interpreter in the guest that performs a random script, and random instructions.

The interpreter (SYZOS's idea: the guest is driven by data) is five instructions an entry: the script's entries are
(address, value, kind) triples; it stores, loads, or jumps into random instructions that follow it. CSR numbers are part
of the instruction word, so CSR storms are generated as code. Encodings: RISC-V unprivileged ISA, chapter 35.
"""

from __future__ import annotations

from random import Random

from protocol.abi import structs_riscv as riscv
from qemu_user.fuzz.sequence import Op

BASE = 0x80000000
APLIC, IMSIC = 0x0C000000, 0x28000000
"""Where sequences that bring the AIA up have it."""
_SCRIPT = 0x80004000
_ECALL, _WFI, _FENCE_I, _SFENCE, _SRET, _EBREAK = 0x73, 0x10500073, 0x100F, 0x12000073, 0x10200073, 0x100073
_CSRS = (
    0x100, 0x104, 0x105, 0x106, 0x10A, 0x140, 0x141, 0x142, 0x143, 0x144, 0x14D, 0x150, 0x151, 0x15C, 0x180, 0xC00, 0xC01,
    0xC02, 0xDB0, 0x001, 0x002, 0x003, 0x015, 0x600, 0x300, 0x7C0,
)  # fmt: skip
#: x5 = script; loop: x6 = address, x7 = value, x28 = kind; kind 0 stores, 1 loads, 2 leaves the loop.
_INTERPRETER = (
    0x0002B303,  # loop: ld   x6, 0(x5)
    0x0082B383,  #       ld   x7, 8(x5)
    0x0102BE03,  #       ld   x28, 16(x5)
    0x01828293,  #       addi x5, x5, 24
    0x000E0863,  #       beqz x28, store   (+16)
    0xFFFE0E13,  #       addi x28, x28, -1
    0x000E0A63,  #       beqz x28, load    (+20)
    0x0180006F,  #       j    out          (+24)
    0x00733023,  # store: sd  x7, 0(x6)
    0xFDDFF06F,  #       j    loop         (-36)
    0x00000013,  #       nop
    0x00033383,  # load: ld   x7, 0(x6)
    0xFD1FF06F,  #       j    loop         (-48)
)


def load(rng: Random) -> list[Op]:
    """Operations that put a program at the start of memory slot 0 and vCPU 0's pc on it."""
    script = b"".join(
        number.to_bytes(8, "little")
        for _ in range(rng.randrange(1, 12))
        for number in (
            rng.choice((0x10000000, 0x10000004, IMSIC, IMSIC + 0x1000, APLIC + 4 * rng.randrange(0x1000),
                        BASE + 0x8000, BASE + 0x8003, BASE + 0xFFFC, rng.getrandbits(64))),
            rng.getrandbits(64),
            rng.randrange(2),
        )
    ) + (0).to_bytes(8, "little") * 2 + (2).to_bytes(8, "little")  # fmt: skip
    code = b"".join(
        word.to_bytes(4, "little") for word in (*_INTERPRETER, *(instruction(rng) for _ in range(rng.randrange(4, 200))))
    )
    start = riscv.PC
    return [
        Op("control", ("vm", 0), arg=BASE, tail=code.hex(), extra={"request": 0xAF06}),
        Op("control", ("vm", 0), arg=_SCRIPT, tail=script.hex(), extra={"request": 0xAF06}),
        _set(start, BASE), _set(riscv.CORE_ID["t0"], _SCRIPT), _set(riscv.CSR_ID["stvec"], BASE + 0x40 * rng.randrange(8)),
        *(Op("run", ("vcpu", 0), "RUN", extra={"brief": int(rng.random() < 0.97)}) for _ in range(2)),
    ]  # fmt: skip


def _set(register: int, value: int) -> Op:
    return Op("ioctl", ("vcpu", 0), "SET_ONE_REG", members={"id": register, "addr": {"in": value.to_bytes(8, "little").hex()}})


def instruction(rng: Random) -> int:
    """A random word: CSR access, memory access, SBI call, fence, or any bits."""
    chance = rng.random()
    registers = rng.randrange(32) << 7 | rng.randrange(32) << 15
    if chance < 0.3:
        return rng.choice(_CSRS) << 20 | rng.choice((1, 2, 3, 5, 6, 7)) << 12 | registers | 0x73
    if chance < 0.5:
        return rng.getrandbits(12) << 20 | rng.randrange(8) << 12 | registers | rng.choice((0x03, 0x23, 0x07, 0x27, 0x2F))
    if chance < 0.6:
        return rng.choice((_ECALL, _WFI, _FENCE_I, _SFENCE, _SRET, _EBREAK))
    if chance < 0.8:
        return (
            rng.getrandbits(7) << 25
            | rng.randrange(32) << 20
            | rng.randrange(8) << 12
            | registers
            | rng.choice((0x13, 0x33, 0x1B, 0x3B, 0x53))
        )
    return rng.getrandbits(32)
