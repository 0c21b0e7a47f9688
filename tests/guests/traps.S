# Traps, privilege, CSRs: each cause with its sepc, stval and sstatus; U-mode; interrupts direct and vectored.
# The catching handler below leaves scause, sepc, stval and sstatus in s8 to s11, and goes on in S-mode at s7.

.macro try                   # the next instructions, up to the label 1, are expected to trap
    li s8, -99
    la s7, 1f
.endm
.macro enter_user            # goes on behind itself in U-mode
    la t0, 97f
    csrw sepc, t0
    li t0, SPP
    csrc sstatus, t0
    sret
97:
.endm

main:
    addi sp, sp, -16
    sd ra, 0(sp)
    la t0, catch
    csrw stvec, t0
    csrr a0, stvec
    expect_equal "stvec reads back", a0, t0

    # -- exceptions in S-mode
    try
0:  .word 0xffffffff
1:  expect "all ones: cause", s8, 2
    la a0, 0b
    expect_equal "all ones: sepc", s9, a0
    expect "all ones: stval", s10, 0xffffffff
    try
0:  .half 0
    .half 0
1:  expect "all zeros: cause", s8, 2
    expect "all zeros: stval", s10, 0
    try
    csrr a0, mstatus
1:  expect "mstatus: cause", s8, 2
    expect "mstatus: stval", s10, 0x30002573
    try
    mret
1:  expect "mret: cause", s8, 2
    try
    csrw cycle, a0
1:  expect "write of cycle: cause", s8, 2
    try
    csrrsi a0, time, 1
1:  expect "set bits of time: cause", s8, 2
    try
    csrrs a0, time, zero
1:  expect "read of time does not trap", s8, -99
    try
    csrrci a0, time, 0
1:  expect "clear no bits of time does not trap", s8, -99
    try
0:  ebreak
1:  expect "ebreak: cause", s8, 3
    la a0, 0b
    expect_equal "ebreak: sepc", s9, a0
    try
0:  c.ebreak
    c.nop
1:  expect "c.ebreak: cause", s8, 3
    la a0, 0b
    expect_equal "c.ebreak: sepc", s9, a0
    la a1, word
    addi a1, a1, 2
    try
    lr.w a0, (a1)
1:  expect "misaligned lr: cause", s8, 4
    expect_equal "misaligned lr: stval", s10, a1
    try
    amoadd.d a0, a0, (a1)
1:  expect "misaligned amo: cause", s8, 6
    expect_equal "misaligned amo: stval", s10, a1
    try
    ld a0, 1(a1)
    sd a0, 1(a1)
1:  expect "misaligned ld and sd do not trap", s8, -99
    # a jump to an odd address: the bit is dropped
    la a0, 2f
    jalr a1, 1(a0)
2:  li a2, 1
    expect "jalr clears bit 0", a2, 1
    # sstatus on the way in and out
    csrci sstatus, SIE
    li t0, SPIE
    csrs sstatus, t0
    try
    ebreak
1:  andi a0, s11, SIE | SPIE | SPP
    expect "trap with SIE = 0: SPP = 1, SPIE = 0", a0, SPP
    csrr a0, sstatus
    andi a0, a0, SIE | SPIE
    expect "sret back: SIE = 0, SPIE = 1", a0, SPIE
    csrsi sstatus, SIE
    try
    ebreak
1:  andi a0, s11, SIE | SPIE | SPP
    expect "trap with SIE = 1: SPIE = 1, SIE = 0", a0, SPP | SPIE
    csrr a0, sstatus
    andi a0, a0, SIE
    expect "sret back: SIE = 1", a0, SIE
    csrci sstatus, SIE

    # -- CSRs
    li a0, -1
    csrw sepc, a0
    csrr a1, sepc
    ori a1, a1, SEPC_BIT_0   # QEMU 7.2 keeps the bit
    expect "sepc has no bit 0", a1, -2 | SEPC_BIT_0
    li a0, 0x123456789abcdef0
    csrw sscratch, a0
    csrr a1, sscratch
    expect_equal "sscratch holds 64 bits", a1, a0
    csrw stval, a0
    csrr a1, stval
    expect_equal "stval holds 64 bits", a1, a0
    li a0, 9
    csrw scause, a0
    csrr a1, scause
    expect "scause holds a cause", a1, 9
    li a0, -1
    csrw sie, a0
    csrr a1, sie
    andi a1, a1, 0x222
    expect "sie has three enables", a1, 0x222
    csrw sie, zero
    li a0, 0x1000000000000000
    csrw satp, a0
    csrr a1, satp
    expect "satp ignores a reserved mode", a1, 0
    csrr a0, sstatus
    srli a0, a0, 32
    andi a0, a0, 3
    expect "sstatus.UXL is 64 bits", a0, 2

    # -- floating point and FS
    li t0, FS
    csrc sstatus, t0
    try
    fadd.d fa0, fa0, fa0
1:  expect "FS off: fadd.d", s8, 2
    try
    fld fa0, 0(a0)
1:  expect "FS off: fld", s8, 2
    try
    c.fldsp fa0, 0(sp)
1:  expect "FS off: c.fldsp", s8, 2
    try
    csrr a0, fcsr
1:  expect "FS off: fcsr", s8, 2
    csrr a0, sstatus
    srli a0, a0, 63
    expect "FS off: SD clear", a0, 0
    li t0, 0x2000
    csrs sstatus, t0
    li a0, 0x3ff0000000000000
    fmv.d.x fa0, a0
    fadd.d fa0, fa0, fa0
    csrr a0, sstatus
    srli a1, a0, 63
    expect "FS dirty after fadd.d: SD", a1, 1
    srli a0, a0, 13
    andi a0, a0, 3
    expect "FS dirty after fadd.d", a0, 3
    fmv.x.d a0, fa0
    expect "1.0 + 1.0", a0, 0x4000000000000000
    csrwi frm, 5
    try
    fadd.d fa0, fa0, fa0
1:  expect "dynamic rounding mode 5: fadd.d", s8, 2
    try
    fadd.d fa0, fa0, fa0, rne
1:  expect "static rounding mode beside a bad frm does not trap", s8, -99
    try
    fsgnj.d fa0, fa0, fa0
1:  expect "fsgnj.d beside a bad frm does not trap", s8, -99
    csrwi fcsr, 0
    fmv.d.x fa1, zero
    fdiv.d fa2, fa0, fa1
    csrr a0, fflags
    expect "division by zero raises DZ and does not trap", a0, 8
    fmv.x.d a0, fa2
    expect "4.0 / 0.0 is infinity", a0, 0x7ff0000000000000
    csrwi fcsr, 0

    # -- U-mode
    try
    enter_user
0:  ecall
1:  expect "ecall from U: cause", s8, 8
    la a0, 0b
    expect_equal "ecall from U: sepc", s9, a0
    expect "ecall from U: stval", s10, 0
    andi a0, s11, SPP
    expect "ecall from U: SPP", a0, 0
    .macro user_illegal name, instruction
    try
    enter_user
    \instruction
1:  expect \name, s8, 2
    .endm
    user_illegal "U: sret", sret
    user_illegal "U: wfi", wfi
    user_illegal "U: sfence.vma", sfence.vma
    try
    enter_user
    csrr a0, sstatus
1:  expect "U: sstatus", s8, 2
    try
    enter_user
    csrw satp, zero
1:  expect "U: satp", s8, 2
.if STRICT                   # OpenSBI answers for the counter
    csrwi scounteren, 0
    try
    enter_user
    rdtime a0
1:  expect "U: time without scounteren.TM", s8, 2
.endif
    csrwi scounteren, 2
    try
    enter_user
    rdtime a0
    li a7, 5
    ecall
1:  expect "U: time with scounteren.TM", s8, 8
    expect "U: registers survive", a7, 5
.if STRICT
    try
    enter_user
    rdinstret a0
1:  expect "U: instret without scounteren.IR", s8, 2
.endif
    csrwi scounteren, 7
    try
    enter_user
    rdinstret a0
    rdcycle a0
    ecall
1:  expect "U: counters with scounteren", s8, 8

    # -- software interrupts
    csrci sip, SSI
    csrsi sie, SSI
    li s8, -99
    la s7, 1f
    csrsi sstatus, SIE
    csrsi sip, SSI
0:  nop
    nop
1:  expect "SSI: cause", s8, 0x8000000000000001
    la a0, 0b
    expect_equal "SSI: sepc is the next instruction", s9, a0
    csrci sip, SSI
    csrci sstatus, SIE
    csrsi sip, SSI
    li s8, -99
    nop
    expect "SSI with SIE = 0 in S-mode is held back", s8, -99
    wfi                      # pending and enabled in sie: goes on
    la s7, 1f
0:  csrsi sstatus, SIE       # now it is taken
    nop
1:  expect "SSI when SIE is set", s8, 0x8000000000000001
    csrci sstatus, SIE
    la s7, 1f
    li s8, -99
    enter_user               # in U-mode it is taken whatever SIE says
0:  nop
    nop
1:  expect "SSI in U-mode with SIE = 0", s8, 0x8000000000000001
    andi a0, s11, SPP
    expect "SSI in U-mode: SPP", a0, 0
    csrci sip, SSI
    # vectored
    la t0, vectors
    ori t0, t0, 1
    csrw stvec, t0
    csrr a0, stvec
    expect_equal "stvec vectored reads back", a0, t0
    li s6, 0
    la s7, 1f
    csrsi sip, SSI
    csrsi sstatus, SIE
    nop
1:  expect "vectored: SSI enters at base + 4", s6, 1
    csrci sstatus, SIE
    csrci sip, SSI
    li s6, 0
    try
    ebreak
1:  expect "vectored: exceptions enter at base", s6, 100
    # timer and software at once: software first (privileged ISA, 12.1.3)
    li s6, 0
    li a0, 0
    sbi EXT_TIME, 0
    li s2, 1000000
2:  csrr a0, sip
    andi a0, a0, STI
    bnez a0, 3f
    addi s2, s2, -1
    bnez s2, 2b
3:  csrsi sip, SSI
    li a0, SSI | STI
    csrs sie, a0
    la s7, 1f
    csrsi sstatus, SIE
    nop
1:  expect "SSI before STI", s6, 1
    csrci sip, SSI
    li s6, 0
    la s7, 1f
    csrsi sstatus, SIE
    nop
1:  expect "STI when SSI is gone", s6, 5
    csrci sstatus, SIE
    csrw sie, zero
    li a0, -1
    sbi EXT_TIME, 0
    la t0, catch
    csrw stvec, t0

.if STRICT
    # instret counts exactly
    rdinstret a0
    nop
    nop
    nop
    rdinstret a1
    sub a1, a1, a0
    expect "instret over four instructions", a1, 4
    rdinstret a0
    c.nop
    c.nop
    beqz zero, 2f
    nop
2:  rdinstret a1
    sub a1, a1, a0
    expect "instret over a taken branch", a1, 4
.endif

    la t0, unexpected
    csrw stvec, t0
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

.balign 4
catch:
    csrr s8, scause
    csrr s9, sepc
    csrr s10, stval
    csrr s11, sstatus
    bltz s8, 1f
2:  csrw sepc, s7
    csrrw zero, sscratch, t0
    li t0, SPP
    csrs sstatus, t0
    csrr t0, sscratch
    sret
1:  csrw sscratch, t0        # an interrupt: go on with interrupts off
    li t0, SPIE
    csrc sstatus, t0
    csrr t0, sscratch
    j 2b

.balign 256
vectors:
    j 1f
    j 2f
    j unexpected
    j unexpected
    j unexpected
    j 3f
    .rept 10
    j unexpected
    .endr
1:  li s6, 100
    j catch
2:  li s6, 1
    j catch
3:  li s6, 5
    j catch

    .balign 8
    .zero 8
word: .dword 0, 0
end_of_image:
