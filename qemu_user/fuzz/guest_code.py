"""Guest code for sequences: a small interpreter in the guest that performs a random script, and random instructions.

The interpreter (SYZOS's idea: the guest is driven by data) is five instructions an entry: the script's entries are
(address, value, kind) triples; it stores, loads, or jumps into random instructions that follow it. CSR numbers are part
of the instruction word, so CSR storms are generated as code. Encodings: RISC-V unprivileged ISA, chapter 35.
"""

from __future__ import annotations

from random import Random

from protocol.abi import structs_riscv as riscv
from protocol.codec import control
from qemu_user.fuzz.sequence import Op

BASE = 0x80000000
APLIC, IMSIC = 0x0C000000, 0x28000000
"""Where sequences that bring the AIA up have it."""
_SCRIPT = 0x80004000
_WRITE_GPA = control.WRITE_GPA
_LOOP = 0x6F
_SBI = (0x10, 0x54494D45, 0x735049, 0x735049, 0x52464E43, 0x52464E43, 0x48534D, 0x48534D, 0x53525354, 0x4442434E, 0x09000001,
        0x08000001, 0, 1, 8, 0x53555350, 0x12345678)  # fmt: skip
"""Extension ids: BASE, TIME, IPI, RFENCE, HSM, SRST, DBCN, vendor and experimental ones, legacy ones, one of nobody."""
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


def program(words: list[int], *, stvec: int = BASE + 0x800) -> list[Op]:
    """Operations that put instructions at the start of memory slot 0, have traps end in a loop, and run vCPU 0 twice."""
    code = b"".join(word.to_bytes(4, "little") for word in (*words, _LOOP))
    return [
        Op("control", ("vm", 0), arg=BASE, tail=code.hex(), extra={"request": _WRITE_GPA}),
        Op("control", ("vm", 0), arg=stvec, tail=_LOOP.to_bytes(4, "little").hex(), extra={"request": _WRITE_GPA}),
        _set(riscv.PC, BASE), _set(riscv.CSR_ID["stvec"], stvec),
        *(Op("run", ("vcpu", 0), "RUN", extra={"brief": 1}) for _ in range(2)),
    ]  # fmt: skip


def li(register: int, value: int) -> list[int]:
    """Instructions that put a 32-bit number, sign-extended, into a register: lui, addiw."""
    low = ((value & 0xFFF) ^ 0x800) - 0x800
    return [(value - low & 0xFFFFF000) | register << 7 | 0x37, (low & 0xFFF) << 20 | register << 15 | register << 7 | 0x1B]


def stores(rng: Random, what: list[tuple[int, int]]) -> list[Op]:
    """A guest that stores to these addresses (address, value), with accesses of any size, and loads from some."""
    words: list[int] = []
    for address, value in what:
        words += [*li(6, address), 32 << 20 | 6 << 15 | 1 << 12 | 6 << 7 | 0x13, 32 << 20 | 6 << 15 | 5 << 12 | 6 << 7 | 0x13]
        words += [*li(7, value), 7 << 20 | 6 << 15 | rng.choice((0, 1, 2, 2, 2, 3)) << 12 | 0x23]
        if rng.random() < 0.4:
            words.append(6 << 15 | rng.randrange(7) << 12 | 28 << 7 | 0x03)
    return program(words)


def sbi(rng: Random, extensions: tuple[int, ...] = ()) -> list[Op]:
    """A guest that makes calls of every extension (or of these), with arguments nearly right (SBI 3.0)."""
    words: list[int] = []
    for _ in range(rng.randrange(1, 5)):
        extension = rng.choice(extensions or _SBI)
        sizes = (0, 0x1000, 1 << 20, -1)
        first, second = rng.choice((0, 1, 1, 2, 3, 0xFF)), rng.choice((0, 1, -1, 0x80000000))
        arguments = (first, second, rng.choice(sizes), rng.choice(sizes))
        function = rng.choice((0, 0, 1, 2, 2, 3, rng.randrange(8)))
        for register, value in zip((10, 11, 12, 13, 16, 17), (*arguments, function, extension), strict=True):
            words += li(register, value)
        words.append(_ECALL)
    return program(words)


def traps(rng: Random) -> list[Op]:
    """A guest that waits, traps, and reads CSRs which leave to user space."""
    kinds = (_WFI, _EBREAK, _FENCE_I, _SFENCE, _SRET, 0x01502573, 0x30002573, 0x0000006F, 0x00000000, 0x10500073)
    debug = Op("ioctl", ("vcpu", 0), "SET_GUEST_DEBUG", members={"control": rng.randrange(2)})
    return [debug, *program([rng.choice(kinds) for _ in range(4)])]


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
