"""The guest program of the oracle: each instruction stands where the recorded program counters say it stood.

Encoded by hand, so that no toolchain is needed; tests/conformance/test_oracle.py compares it with the cross
assembler where there is one. `code()` is loaded at 0x80000000; `at(label)` is a label's guest address.
"""

from __future__ import annotations

import struct
from functools import cache

BASE = 0x80000000
ZERO, T0, T1, T2, A0, A1, A2, A3, A6, A7, T3 = 0, 5, 6, 7, 10, 11, 12, 13, 16, 17, 28
SATP, SEED, UNKNOWN, HSTATUS = 0x180, 0x015, 0x7C0, 0x600
_LOAD, _FLOAT_LOAD, _IMMEDIATE, _AUIPC, _STORE, _AMO = 0x03, 0x07, 0x13, 0x17, 0x23, 0x2F
_REGISTER, _LUI, _BRANCH, _JUMP, _SYSTEM = 0x33, 0x37, 0x63, 0x6F, 0x73

NOP, ECALL, EBREAK, WFI, SELF = 0x13, 0x73, 0x100073, 0x10500073, _JUMP


def _i(opcode: int, funct3: int, rd: int, rs1: int, imm: int) -> int:
    return (imm & 0xFFF) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode


def _s(funct3: int, rs2: int, imm: int, rs1: int) -> int:
    return (imm >> 5 & 0x7F) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (imm & 0x1F) << 7 | _STORE


def _lui(rd: int, imm: int) -> int:
    return imm << 12 | rd << 7 | _LUI


def _li(rd: int, imm: int) -> int:
    return _i(_IMMEDIATE, 0, rd, ZERO, imm)


def _sw(rs2: int, imm: int, rs1: int) -> int:
    return _s(2, rs2, imm, rs1)


def _csr(funct3: int, rd: int, csr: int, rs1: int) -> int:
    return _i(_SYSTEM, funct3, rd, rs1, csr)


def _bnez(rs1: int, offset: int) -> int:
    imm = offset & 0x1FFF
    high, low = (imm >> 12 & 1) << 6 | imm >> 5 & 0x3F, (imm >> 1 & 0xF) << 1 | imm >> 11 & 1
    return high << 25 | rs1 << 15 | 1 << 12 | low << 7 | _BRANCH


_HSM = [_lui(A7, 0x485), _i(_IMMEDIATE, 0, A7, A7, 0x34D)]
_TO_DEVICE = _lui(T0, 0x10000)
"""t0 = 0x10000000, where nothing is: a device of user space."""

BLOCKS: dict[int, tuple[str, list[int]]] = {
    0x00: ("start", [_TO_DEVICE]),
    0x04: ("mmio_lw", [
        _i(_LOAD, 2, A0, T0, 0),         # 0x04 lw a0, 0(t0)
        _i(_LOAD, 3, A1, T0, 8),         # 0x08 ld a1, 8(t0)
        _i(_LOAD, 4, A2, T0, 3),         # 0x0c lbu a2, 3(t0)
        _s(0, A2, 1, T0),                # 0x10 sb a2, 1(t0)
        _s(3, A1, 16, T0),               # 0x14 sd a1, 16(t0)
        _i(_LOAD, 2, A3, T0, 1),         # 0x18 lw a3, 1(t0): misaligned
    ]),
    0x20: ("do_ecall", [ECALL, SELF]),   # a0..a7 are set by the host
    0x28: ("breakpoint", [EBREAK, NOP, EBREAK, SELF]),
    0x38: ("writer", [                   # t3 stores of 8 bytes from t1 on, t2 apart; then one to the device
        _s(3, ZERO, 0, T1),              # 0x38
        T2 << 20 | T1 << 15 | T1 << 7 | _REGISTER,
        _i(_IMMEDIATE, 0, T3, T3, -1),
        _bnez(T3, -12),
        _TO_DEVICE,
        _sw(ZERO, 0, T0),                # 0x4c
        SELF,
    ]),
    0x68: ("amo", [A1 << 20 | T0 << 15 | 2 << 12 | A0 << 7 | _AMO]),  # amoadd.w a0, a1, (t0)
    0x74: ("fp_load", [_i(_FLOAT_LOAD, 3, 10, T0, 0)]),               # fld fa0, 0(t0)
    0x80: ("posted", [_sw(T1, 4, T0), _sw(T1, 0, T0), _sw(T1, 8, T0), SELF]),
    0x94: ("loop", [SELF]),              # for ever; also the trap vector
    0x98: ("wait", [WFI, _TO_DEVICE, _sw(ZERO, 0, T0), SELF]),
    0xB8: ("seed_write", [_csr(1, A0, SEED, ZERO), SELF]),
    0xC0: ("hart_start", [               # hart_start(1, second, 0x55), then its result to the device
        *_HSM,
        _li(A6, 0),
        _li(A0, 1),
        _li(A2, 0x55),
        A1 << 7 | _AUIPC,                # 0xd4
        _i(_IMMEDIATE, 0, A1, A1, 0x14),
        ECALL,                           # 0xdc
        _TO_DEVICE,
        _sw(A0, 0, T0),                  # 0xe4
    ]),
    0xE8: ("second", [
        _TO_DEVICE,
        NOP,
        _sw(A0, 4, T0),                  # 0xf0
        _sw(A1, 8, T0),                  # 0xf4
        _csr(2, A2, SATP, ZERO),
        _sw(A2, 12, T0),                 # 0xfc
        *_HSM,
        _li(A6, 1),
        ECALL,                           # 0x10c hart_stop
        SELF,                            # 0x110
    ]),
    0x120: ("seed_read", [_csr(2, A0, SEED, ZERO)]),      # seed must be written: illegal
    0x130: ("unknown_csr", [_csr(1, ZERO, UNKNOWN, A0)]),
    0x140: ("hypervisor_csr", [_csr(2, A0, HSTATUS, ZERO)]),
}  # fmt: skip

LABELS = {label: offset for offset, (label, _) in BLOCKS.items()}


def at(label: str) -> int:
    """Guest address of a label."""
    return BASE + LABELS[label]


@cache
def code() -> bytes:
    """The program's bytes; what is between the blocks is illegal instructions."""
    image = bytearray(0x160)
    for offset, (_, words) in BLOCKS.items():
        struct.pack_into(f"<{len(words)}I", image, offset, *words)
    return bytes(image)
