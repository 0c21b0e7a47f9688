"""The guest program of the oracle: each instruction stands where the recorded program counters say it stood.

`code()` is loaded at 0x80000000; `at(label)` is a label's guest address.
"""

from __future__ import annotations

from functools import cache

from tests.framework.asm import Program, assemble

BASE = 0x80000000

SOURCE = """
start:
    lui     t0, 0x10000         # 0x00  t0 = 0x10000000: nothing is there, a device of user space
mmio_lw:
    lw      a0, 0(t0)           # 0x04
    ld      a1, 8(t0)           # 0x08
    lbu     a2, 3(t0)           # 0x0c
    sb      a2, 1(t0)           # 0x10
    sd      a1, 16(t0)          # 0x14
    lw      a3, 1(t0)           # 0x18  misaligned

    .org 0x20
do_ecall:                       # a0 to a7 are set by the host
    ecall
1:  j       1b                  # 0x24

    .org 0x28
breakpoint:
    ebreak
    nop
    ebreak                      # 0x30
1:  j       1b

    .org 0x38
writer:                         # t3 stores of 8 zero bytes from t1 on, t2 apart; then one to the device
    sd      zero, 0(t1)         # 0x38
    add     t1, t1, t2
    addi    t3, t3, -1
    bnez    t3, writer
    lui     t0, 0x10000
    sw      zero, 0(t0)         # 0x4c
1:  j       1b

    .org 0x68
amo:
    amoadd.w a0, a1, (t0)

    .org 0x74
fp_load:
    fld     fa0, 0(t0)

    .org 0x80
posted:                         # two stores into the coalesced zone, one behind it
    sw      t1, 4(t0)
    sw      t1, 0(t0)
    sw      t1, 8(t0)           # 0x88
1:  j       1b

    .org 0x94
loop:                           # for ever; also the trap vector
    j       loop

    .org 0x98
wait:
    wfi
    lui     t0, 0x10000
    sw      zero, 0(t0)         # 0xa0
1:  j       1b

    .org 0xb8
seed_write:
    csrrw   a0, 0x015, zero
1:  j       1b                  # 0xbc

    .org 0xc0
hart_start:                     # SBI HSM hart_start(1, second, 0x55), then its result to the device
    lui     a7, 0x485
    addi    a7, a7, 0x34d       # "HSM"
    addi    a6, zero, 0
    addi    a0, zero, 1
    addi    a2, zero, 0x55
    auipc   a1, 0               # 0xd4
    addi    a1, a1, 0x14
    ecall                       # 0xdc
    lui     t0, 0x10000
    sw      a0, 0(t0)           # 0xe4

    .org 0xe8
second:
    lui     t0, 0x10000
    nop
    sw      a0, 4(t0)           # 0xf0
    sw      a1, 8(t0)           # 0xf4
    csrr    a2, satp
    sw      a2, 12(t0)          # 0xfc
    lui     a7, 0x485
    addi    a7, a7, 0x34d
    addi    a6, zero, 1
    ecall                       # 0x10c  hart_stop
1:  j       1b                  # 0x110

    .org 0x120
seed_read:                      # seed must be written: illegal
    csrr    a0, 0x015

    .org 0x130
unknown_csr:
    csrw    0x7c0, a0

    .org 0x140
hypervisor_csr:                 # hstatus
    csrr    a0, 0x600
"""


@cache
def _program() -> Program:
    return assemble(SOURCE, BASE)


def at(label: str) -> int:
    """Guest address of a label."""
    return _program()[label]


def code() -> bytes:
    """The program's bytes; what is between its pieces are illegal instructions."""
    return _program().image
