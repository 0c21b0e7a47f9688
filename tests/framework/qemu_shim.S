# M-mode shim for the QEMU peer: takes cases from a mailbox in RAM, runs each in S or U mode, writes back what is left.
# Assembled by qemu_peer.py, which defines the addresses and sizes. It never returns; the peer ends QEMU.
# The shim delegates every trap and interrupt to S-mode except ecalls from S (its SBI) and the machine timer
# (its watchdog), opens all memory by PMP, and enables counters, stimecmp and the cache block instructions.

# Header of a slot, in doublewords: see qemu_peer.py.
.equ STATUS, 0
.equ MODE, 8
.equ PC, 16
.equ X, 24
.equ F, 280
.equ CSR, 536
.equ LIMIT, 640
.equ CAUSE, 648

_start:
    csrr t0, mhartid
    bnez t0, park
    la t0, trap
    csrw mtvec, t0
    li t0, -1
    csrw pmpaddr0, t0
    li t0, 0x1f
    csrw pmpcfg0, t0
    li t0, 0xb1ff            # all of the base ISA but ecall from S (9) and M (11)
    csrw medeleg, t0
    li t0, 0x222
    csrw mideleg, t0
    li t0, MENVCFG
    csrw menvcfg, t0
    li t0, -1
    csrw mcounteren, t0
    csrw mcountinhibit, zero
    li s0, MAILBOX
    li s1, 0                 # number of the last batch done

wait:                        # sleep 50 us at a time until a batch is announced
    li t0, MTIME
    ld t1, 0(t0)
    addi t1, t1, 500
    li t0, MTIMECMP
    sd t1, 0(t0)
    li t0, 0x80
    csrw mie, t0
    wfi
    ld t1, 0(s0)
    beq t1, s1, wait
    fence
    mv s1, t1
    ld s2, 8(s0)             # number of cases
    li s3, SLOTS
next_case:
    beqz s2, batch_done
    # copy the image into the window
    li t0, 4096
    add t0, s3, t0
    li t1, WINDOW
    li t2, WINDOW_SIZE
    add t2, t2, t1
1:  ld a0, 0(t0)
    ld a1, 8(t0)
    ld a2, 16(t0)
    ld a3, 24(t0)
    ld a4, 32(t0)
    ld a5, 40(t0)
    ld a6, 48(t0)
    ld a7, 56(t0)
    sd a0, 0(t1)
    sd a1, 8(t1)
    sd a2, 16(t1)
    sd a3, 24(t1)
    sd a4, 32(t1)
    sd a5, 40(t1)
    sd a6, 48(t1)
    sd a7, 56(t1)
    addi t0, t0, 64
    addi t1, t1, 64
    bltu t1, t2, 1b
    fence.i
    sc.d t0, t0, (t1)        # drop a reservation that the last case left
    # registers
    li t0, 0x6000
    csrs mstatus, t0
    csrw satp, zero
    sfence.vma
    .rept 32
    fld f\+, F+8*\+(s3)
    .endr
    ld t0, CSR+0(s3)
    csrw fcsr, t0
    ld t0, CSR+8(s3)
    csrw sstatus, t0
    ld t0, CSR+16(s3)
    csrw sie, t0
    ld t0, CSR+24(s3)
    csrw stvec, t0
    ld t0, CSR+32(s3)
    csrw scounteren, t0
    ld t0, CSR+40(s3)
    csrw senvcfg, t0
    ld t0, CSR+48(s3)
    csrw sscratch, t0
    ld t0, CSR+56(s3)
    csrw sepc, t0
    ld t0, CSR+64(s3)
    csrw scause, t0
    ld t0, CSR+72(s3)
    csrw stval, t0
    li t1, 2
    csrc mip, t1
    ld t0, CSR+80(s3)
    csrw sip, t0
    ld t0, CSR+88(s3)
    csrw stimecmp, t0
    ld t0, CSR+96(s3)
    csrw satp, t0
    sfence.vma
    li t0, 0x1880            # MPP = U, MPIE = 0
    csrc mstatus, t0
    ld t0, MODE(s3)
    slli t0, t0, 11
    csrs mstatus, t0
    ld t0, PC(s3)
    csrw mepc, t0
    # watchdog
    li t0, MTIME
    ld t1, 0(t0)
    ld t2, LIMIT(s3)
    add t1, t1, t2
    li t0, MTIMECMP
    sd t1, 0(t0)
    # remember the shim's own registers, and go
    sd s0, 16(s0)
    sd s1, 24(s0)
    sd s2, 32(s0)
    csrw mscratch, s3
    mv x31, s3
    .rept 31
    ld x\+, X+8*\+(x31)
    .endr
    ld x31, X+8*31(x31)
    mret

.align 2
trap:
    csrrw x31, mscratch, x31 # x31 = the slot
    .rept 31
    sd x\+, X+8*\+(x31)
    .endr
    csrr t0, mscratch
    sd t0, X+8*31(x31)
    csrw mscratch, x31
    mv s3, x31
    csrr t0, mcause
    sd t0, CAUSE(s3)
    csrr t1, mepc
    sd t1, PC(s3)
    li t2, 1
    li t3, 9
    bne t0, t3, not_ecall
    li t3, END
    beq a7, t3, finish
    addi t1, t1, 4           # an SBI call: not supported
    csrw mepc, t1
    li a0, -2
    sd a0, X+8*10(s3)
    sd zero, X+8*11(s3)
    .rept 31
    ld x\+, X+8*\+(x31)
    .endr
    ld x31, X+8*31(x31)
    mret
not_ecall:
    li t2, 2
    bltz t0, finish          # the watchdog
    li t2, 3
finish:
    sd t2, STATUS(s3)
    csrr t0, mstatus
    srli t0, t0, 11
    andi t0, t0, 1
    sd t0, MODE(s3)
    csrr t0, sstatus         # before FS is forced on
    sd t0, CSR+8(s3)
    li t0, 0x6000
    csrs mstatus, t0
    csrr t0, fcsr
    sd t0, CSR+0(s3)
    csrr t0, sie
    sd t0, CSR+16(s3)
    csrr t0, stvec
    sd t0, CSR+24(s3)
    csrr t0, scounteren
    sd t0, CSR+32(s3)
    csrr t0, senvcfg
    sd t0, CSR+40(s3)
    csrr t0, sscratch
    sd t0, CSR+48(s3)
    csrr t0, sepc
    sd t0, CSR+56(s3)
    csrr t0, scause
    sd t0, CSR+64(s3)
    csrr t0, stval
    sd t0, CSR+72(s3)
    csrr t0, sip
    sd t0, CSR+80(s3)
    csrr t0, stimecmp
    sd t0, CSR+88(s3)
    csrr t0, satp
    sd t0, CSR+96(s3)
    .rept 32
    fsd f\+, F+8*\+(s3)
    .endr
    # the window back into the slot
    li t0, 4096
    add t0, s3, t0
    li t1, WINDOW
    li t2, WINDOW_SIZE
    add t2, t2, t1
1:  ld a0, 0(t1)
    ld a1, 8(t1)
    ld a2, 16(t1)
    ld a3, 24(t1)
    ld a4, 32(t1)
    ld a5, 40(t1)
    ld a6, 48(t1)
    ld a7, 56(t1)
    sd a0, 0(t0)
    sd a1, 8(t0)
    sd a2, 16(t0)
    sd a3, 24(t0)
    sd a4, 32(t0)
    sd a5, 40(t0)
    sd a6, 48(t0)
    sd a7, 56(t0)
    addi t0, t0, 64
    addi t1, t1, 64
    bltu t1, t2, 1b
    li s0, MAILBOX
    ld s1, 24(s0)
    ld s2, 32(s0)
    addi s2, s2, -1
    li t0, 4096 + WINDOW_SIZE
    add s3, s3, t0
    j next_case
batch_done:
    fence
    sd s1, 40(s0)            # announced to the peer
    j wait

park:
    wfi
    j park
