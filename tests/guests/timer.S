# Timers by SBI and by stimecmp, and WFI: interrupts come, not before their time, once, and wake a sleeping hart.
# SSTC = 1: the hart has stimecmp.

.equ SOON, 2000              # ticks: 200 us
.equ TIMERS, 200

.macro load register, symbol
    la \register, \symbol
    ld \register, 0(\register)
.endm

main:
    addi sp, sp, -16
    sd ra, 0(sp)
    la t0, on_interrupt
    csrw stvec, t0
    # time goes on, and never back
    rdtime s0
    li s2, 1000000
    li s3, 0
1:  rdtime s1
    bgeu s1, s0, 2f
    addi s3, s3, 1
2:  mv s0, s1
    addi s2, s2, -1
    bnez s2, 1b
    expect "time never goes back", s3, 0
    # a tick is 100 ns: the loop took from 2 ms to 20 s
    # -- set_timer with interrupts: never early, each once
    la t0, use_stimecmp
    sd zero, 0(t0)
    call many_timers
.if SSTC
    li t0, 1
    la t1, use_stimecmp
    sd t0, 0(t1)
    call many_timers
    # stimecmp and sip.STIP by level
    csrwi sie, 0
    rdtime t0
    csrw stimecmp, t0
    csrr a0, sip
    andi a0, a0, STI
    expect "stimecmp = now: STIP", a0, STI
    li t1, -1
    csrw stimecmp, t1
    csrr a0, sip
    andi a0, a0, STI
    expect "stimecmp = never: no STIP", a0, 0
    csrr a0, stimecmp
    expect "stimecmp reads back", a0, -1
    li a0, STI
    csrs sip, a0
    csrr a0, sip
    andi a0, a0, STI
    expect "STIP is not writable", a0, 0
    rdtime t0
    li t1, SOON
    add t0, t0, t1
    csrw stimecmp, t0
    csrr a0, sip
    andi a0, a0, STI
1:  csrr a0, sip
    andi a0, a0, STI
    beqz a0, 1b
    rdtime t1
    sltu a0, t1, t0
    expect "STIP rises when time reaches stimecmp, not before", a0, 0
    li t1, -1
    csrw stimecmp, t1
.endif

    # -- WFI with the interrupt pending already, and with SIE off: goes on at once, takes no trap
    la t0, interrupts
    sd zero, 0(t0)
    csrci sstatus, SIE
    li t0, STI
    csrs sie, t0
    rdtime a0
    sbi EXT_TIME, 0
    wfi
    load a0, interrupts
    expect "wfi with SIE off takes no trap", a0, 0
    # WFI sleeps until the timer, with SIE off
    rdtime s0
    li s1, 20000
    add s0, s0, s1
    mv a0, s0
    sbi EXT_TIME, 0
1:  wfi
    csrr t0, sip
    andi t0, t0, STI
    beqz t0, 1b
    rdtime s1
    sltu a0, s1, s0
    expect "wfi until the timer: not early", a0, 0
    sub a0, s1, s0
    li a1, 10000000
    sltu a0, a0, a1
    expect "wfi until the timer: not a second late", a0, 1
    # two enabled sources: a software interrupt wakes a hart that waits for a far timer
    rdtime a0
    li a1, 1000000000
    add a0, a0, a1
    sbi EXT_TIME, 0
    csrsi sie, SSI
    csrsi sip, SSI
    wfi
    csrci sip, SSI
    li a0, 1
    expect "a pending software interrupt ends wfi", a0, 1
    # a timer that is moved away does not come
    la t0, interrupts
    sd zero, 0(t0)
    rdtime a0
    li a1, SOON
    add a0, a0, a1
    sbi EXT_TIME, 0
    li a0, -1
    sbi EXT_TIME, 0
    csrsi sstatus, SIE
    rdtime s0
    li s1, 20000
    add s0, s0, s1
1:  rdtime s1
    bltu s1, s0, 1b
    load a0, interrupts
    expect "a timer that was moved away does not come", a0, 0
    # a loop without traps or branches out of it is interrupted too
    rdtime a0
    li a1, SOON
    add a0, a0, a1
    sbi EXT_TIME, 0
    li t0, STI
    csrs sie, t0
2:  load a0, interrupts
    beqz a0, 2b
    expect "a busy loop is interrupted", a0, 1
    csrci sstatus, SIE
    csrwi sie, 0
    # the timer interrupts U-mode, whatever SIE says
    la t0, interrupts
    sd zero, 0(t0)
    rdtime a0
    li a1, SOON
    add a0, a0, a1
    sbi EXT_TIME, 0
    li t0, STI
    csrs sie, t0
    la t0, user_loop
    csrw sepc, t0
    li t0, SPP
    csrc sstatus, t0
    la t0, back_from_user
    la t1, user_return
    sd t0, 0(t1)
    sret
user_loop:
    addi s5, s5, 1
    j user_loop
back_from_user:
    load a0, interrupts
    expect "the timer interrupts U-mode", a0, 1
    csrwi sie, 0
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

many_timers:
    addi sp, sp, -16
    sd ra, 0(sp)
    la t0, interrupts
    sd zero, 0(t0)
    la t0, early
    sd zero, 0(t0)
    li t0, STI
    csrs sie, t0
    csrsi sstatus, SIE
    li s2, TIMERS
    li s4, 0
1:  rdtime a0
    li a1, SOON
    add a0, a0, a1
    la t0, deadline
    sd a0, 0(t0)
    load t1, use_stimecmp
    bnez t1, 2f
    sbi EXT_TIME, 0
    j 3f
2:
    .if SSTC
    csrw stimecmp, a0
    .endif
3:  addi s4, s4, 1
4:  csrci sstatus, SIE       # wfi races with the interrupt: test and sleep with SIE off
    load t1, interrupts
    bge t1, s4, 5f
    wfi
    csrsi sstatus, SIE
    j 4b
5:  csrsi sstatus, SIE
    addi s2, s2, -1
    bnez s2, 1b
    csrci sstatus, SIE
    csrwi sie, 0
    load a0, interrupts
    expect "one interrupt for each timer", a0, TIMERS
    load a0, early
    expect "no timer is early", a0, 0
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

.balign 4
on_interrupt:
    addi sp, sp, -64
    sd t0, 0(sp)
    sd t1, 8(sp)
    sd a0, 16(sp)
    sd a1, 24(sp)
    sd a6, 32(sp)
    sd a7, 40(sp)
    csrr t0, scause
    li t1, 0x8000000000000005
    beq t0, t1, 1f
    j unexpected
1:  la t0, interrupts
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    rdtime t0
    load t1, deadline
    bgeu t0, t1, 2f
    la t0, early
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
2:  load t1, use_stimecmp
    li a0, -1
    bnez t1, 3f
    sbi EXT_TIME, 0
    j 4f
3:
    .if SSTC
    csrw stimecmp, a0
    .endif
4:  load t0, user_return
    beqz t0, 5f
    csrw sepc, t0
    la t0, user_return
    sd zero, 0(t0)
    li t0, SPP
    csrs sstatus, t0
    li t0, SPIE
    csrc sstatus, t0
5:  ld t0, 0(sp)
    ld t1, 8(sp)
    ld a0, 16(sp)
    ld a1, 24(sp)
    ld a6, 32(sp)
    ld a7, 40(sp)
    addi sp, sp, 64
    sret

    .balign 8
interrupts: .dword 0
early: .dword 0
deadline: .dword 0
use_stimecmp: .dword 0
user_return: .dword 0
end_of_image:
