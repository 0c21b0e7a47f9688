# What every conformance guest begins with: start-up, console over SBI, checks, the end of the run.
# Assembled in front of each guest by tests/framework/guest_program.py. The guest's own code begins at `main`, entered
# on the boot hart with a0 = hartid, a1 = device tree, sp = a stack. Registers t3 to t6 belong to the check macros.
# Output: one line per failed check, then "RESULT pass=N fail=M" and a shutdown (reason 0, or 1 if anything failed).

.equ EXT_BASE, 0x10
.equ EXT_TIME, 0x54494D45
.equ EXT_IPI, 0x735049
.equ EXT_RFENCE, 0x52464E43
.equ EXT_HSM, 0x48534D
.equ EXT_SRST, 0x53525354
.equ EXT_DBCN, 0x4442434E
.equ SBI_FAILED, -1
.equ SBI_NOT_SUPPORTED, -2
.equ SBI_INVALID_PARAM, -3
.equ SBI_ALREADY_AVAILABLE, -6
.equ SIE, 2
.equ SPIE, 0x20
.equ SPP, 0x100
.equ FS, 0x6000
.equ SUM, 0x40000
.equ MXR, 0x80000
.equ SSI, 2
.equ STI, 0x20
.equ SEI, 0x200
.equ STACK, 8192             # bytes of stack of each hart
.equ MAX_HARTS, 16

.macro sbi extension, function
    li a7, \extension
    li a6, \function
    ecall
.endm

.macro print text
    la t4, 98f
    jal t3, puts
    j 99f
98: .asciz \text
    .balign 4
99:
.endm

# Checks that a register has a value; saves nothing but t3 to t6.
.macro expect name, register, value
    mv t5, \register
    li t6, \value
    la t4, 98f
    jal t3, check
    j 99f
98: .asciz \name
    .balign 4
99:
.endm

# The same with the expected value in a register.
.macro expect_equal name, register, other
    mv t5, \register
    mv t6, \other
    la t4, 98f
    jal t3, check
    j 99f
98: .asciz \name
    .balign 4
99:
.endm

_start:
    mv s0, a0
    mv s1, a1
    la sp, end_of_image
    li t0, 0xfff
    add sp, sp, t0
    not t0, t0
    and sp, sp, t0
    la t0, stacks
    sd sp, 0(t0)
    li t1, STACK
    add sp, sp, t1
    csrw sie, zero
    csrw satp, zero
    la t0, unexpected
    csrw stvec, t0
    li t0, FS
    csrs sstatus, t0
    la t0, boot_hart
    sd s0, 0(t0)
    li a0, EXT_DBCN
    sbi EXT_BASE, 3
    la t0, has_dbcn
    sd a1, 0(t0)
    print "BEGIN\n"
    mv a0, s0
    mv a1, s1
    call main
    # falls through
finish:
    la t4, result_text
    jal t3, puts
    la t0, passed
    ld t5, 0(t0)
    jal t3, put_decimal
    la t4, fail_count_text
    jal t3, puts
    la t0, failed
    ld t5, 0(t0)
    jal t3, put_decimal
    print "\n"
    la t0, failed
    ld a1, 0(t0)
    snez a1, a1
    li a0, 0
    sbi EXT_SRST, 0
1:  wfi
    j 1b
result_text: .asciz "RESULT pass="
fail_count_text: .asciz " fail="
    .balign 4

# The default trap vector: says what happened, and ends the run.
.balign 4
unexpected:
    csrw satp, zero
    la t0, failed
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    print "FAIL unexpected trap: cause "
    csrr t5, scause
    jal t3, put_hex
    print " at "
    csrr t5, sepc
    jal t3, put_hex
    print " value "
    csrr t5, stval
    jal t3, put_hex
    print "\n"
    j finish

# t4 = name, t5 = value, t6 = expected value, t3 = return address.
check:
    bne t5, t6, 1f
    la t4, passed
    ld t5, 0(t4)
    addi t5, t5, 1
    sd t5, 0(t4)
    jr t3
1:  addi sp, sp, -32
    sd t3, 0(sp)
    sd t4, 8(sp)
    sd t5, 16(sp)
    sd t6, 24(sp)
    la t4, failed
    ld t5, 0(t4)
    addi t5, t5, 1
    sd t5, 0(t4)
    la t4, fail_text
    jal t3, puts
    ld t4, 8(sp)
    jal t3, puts
    la t4, got_text
    jal t3, puts
    ld t5, 16(sp)
    jal t3, put_hex
    la t4, expected_text
    jal t3, puts
    ld t5, 24(sp)
    jal t3, put_hex
    la t4, newline
    jal t3, puts
    ld t3, 0(sp)
    addi sp, sp, 32
    jr t3

# t4 = text: to the console by DBCN, or by the legacy call where firmware is older. Physical addresses.
puts:
    addi sp, sp, -80
    sd a0, 0(sp)
    sd a1, 8(sp)
    sd a2, 16(sp)
    sd a6, 24(sp)
    sd a7, 32(sp)
    sd t0, 40(sp)
    sd t4, 48(sp)
    la t0, has_dbcn
    ld t0, 0(t0)
    beqz t0, 3f
    mv t0, t4
1:  lbu a0, 0(t0)
    beqz a0, 2f
    addi t0, t0, 1
    j 1b
2:  ld a1, 48(sp)
    sub a0, t0, a1
    beqz a0, 9f
    li a2, 0
    sbi EXT_DBCN, 0
    bnez a0, 9f
    ld a0, 48(sp)
    add a1, a0, a1           # it may have written less
    sd a1, 48(sp)
    mv t0, a1
    j 1b
3:  mv t0, t4
4:  lbu a0, 0(t0)
    beqz a0, 9f
    sbi 1, 0
    addi t0, t0, 1
    j 4b
9:  ld a0, 0(sp)
    ld a1, 8(sp)
    ld a2, 16(sp)
    ld a6, 24(sp)
    ld a7, 32(sp)
    ld t0, 40(sp)
    addi sp, sp, 80
    jr t3

# t5 = number, in hexadecimal.
put_hex:
    addi sp, sp, -48
    sd t3, 40(sp)
    li t4, 0x7830            # "0x"
    sh t4, 8(sp)
    li t3, 16
1:  addi t3, t3, -1
    andi t4, t5, 15
    addi t4, t4, 0x30
    li t6, 0x3a
    blt t4, t6, 2f
    addi t4, t4, 39
2:  add t6, sp, t3
    sb t4, 10(t6)
    srli t5, t5, 4
    bnez t3, 1b
    sb zero, 26(sp)
    addi t4, sp, 8
    jal t3, puts
    ld t3, 40(sp)
    addi sp, sp, 48
    jr t3

# t5 = number, in decimal.
put_decimal:
    addi sp, sp, -48
    sd t3, 40(sp)
    addi t4, sp, 32
    sb zero, 0(t4)
    li t6, 10
1:  remu t3, t5, t6
    addi t3, t3, 0x30
    addi t4, t4, -1
    sb t3, 0(t4)
    divu t5, t5, t6
    bnez t5, 1b
    jal t3, puts
    ld t3, 40(sp)
    addi sp, sp, 48
    jr t3

fail_text: .asciz "FAIL "
got_text: .asciz ": got "
expected_text: .asciz ", expected "
newline: .asciz "\n"
    .balign 8
has_dbcn: .dword 0
passed: .dword 0
failed: .dword 0
boot_hart: .dword 0
stacks: .dword 0             # MAX_HARTS stacks of STACK bytes each, hart 0 of the list is the boot hart's
    .balign 16
