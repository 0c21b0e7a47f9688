# The trap handler of the random programs, one page, S-mode. It logs each trap (scause, sepc, stval, sstatus) and
# goes on: behind a faulting instruction, or at the address in the program's resume register after a failed fetch.
# It ends the case when the budget is used up. Offsets into the control block, whose address is in sscratch:
.equ LOGPTR, 256
.equ BUDGET, 264
.equ DELTA, 272              # address of code for U-mode minus that for S-mode
.equ RESUME, 280             # offset of the resume register in the save area

    .rept 16                 # stvec in vectored mode comes to base + 4 * cause
    j handler
    .endr
handler:
    csrrw sp, sscratch, sp
    .rept 32
    .if \+ != 2
    sd x\+, 8*\+(sp)
    .endif
    .endr
    csrr t0, sscratch
    sd t0, 16(sp)
    csrw sscratch, sp
    ld t1, LOGPTR(sp)
    csrr t2, scause
    csrr t3, sepc
    csrr t0, stval
    csrr t4, sstatus
    sd t2, 0(t1)
    sd t3, 8(t1)
    sd t0, 16(t1)
    sd t4, 24(t1)
    addi t1, t1, 32
    sd t1, LOGPTR(sp)
    ld t0, BUDGET(sp)
    addi t0, t0, -1
    sd t0, BUDGET(sp)
    beqz t0, finish
    bltz t2, interrupt
    li t0, 3
    bne t2, t0, 1f
    csrw stval, zero         # after a breakpoint 0 and the address are both right: see differential.excuse
1:  li t0, 8
    beq t2, t0, ecall_from_u
    li t0, 12
    beq t2, t0, fetch
    li t0, 1
    bleu t2, t0, fetch
    li t0, 0xc0000           # SUM and MXR: read the instruction whatever its page says
    csrs sstatus, t0
    lhu t1, 0(t3)
    csrw sstatus, t4
    andi t1, t1, 3
    addi t3, t3, 2
    li t0, 3
    bne t1, t0, set_pc
    addi t3, t3, 2
set_pc:
    csrw sepc, t3
back:
    .rept 32
    .if \+ != 2
    ld x\+, 8*\+(sp)
    .endif
    .endr
    ld sp, 16(sp)
    sret
ecall_from_u:
    addi t3, t3, 4
    ld t0, 8*17(sp)
    li t1, END
    beq t0, t1, finish
    li t1, TO_SUPERVISOR
    bne t0, t1, set_pc
    ld t0, DELTA(sp)
    sub t3, t3, t0
    li t0, 0x100
    csrs sstatus, t0
    j set_pc
fetch:
    ld t0, RESUME(sp)
    add t0, t0, sp
    ld t3, 0(t0)
    sd zero, 0(t0)
    bnez t3, set_pc
    j finish
interrupt:
    andi t2, t2, 15
    li t0, 5
    beq t2, t0, timer
    bgtu t2, t0, finish
    csrci sip, 2
    j back
timer:
    li t0, -1
    csrw stimecmp, t0
    j back
finish:
    li a7, END
    ecall
    j finish
