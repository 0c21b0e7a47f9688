# A small teaching kernel and its user tests: processes in U-mode with page tables of their own, fork with copy on
# write, exec, wait, exit, lazily allocated heap, preemption by the timer, floating-point state, on HARTS harts.
# As such kernels do, it changes satp on every way in and out, uses no ASIDs, and knows no fence.i.
# One lock guards all of the kernel. User memory: code at 0, heap from 2 MiB on, the stack at the end of that 2 MiB.

.equ PROCS, 24
.equ FREE, 0
.equ RUNNABLE, 1
.equ RUNNING, 2
.equ WAITING, 3
.equ ZOMBIE, 4
# a process
.equ P_STATE, 0
.equ P_PID, 8
.equ P_PARENT, 16            # its parent's pid
.equ P_ROOT, 24
.equ P_CODE, 32              # exit code
.equ P_PC, 40
.equ P_FCSR, 48
.equ P_X, 64
.equ P_F, 320
.equ P_SIZE, 576
# a hart
.equ H_SCRATCH, 0
.equ H_PROC, 8
.equ H_STACK, 16
.equ H_NEXT, 24              # where it looks for work next
.equ H_SIZE, 64
.equ SLICE, 2000             # 200 us
.equ PAGE_COUNT, 4096        # physical pages that the kernel gives out
.equ COW, 0x100              # a bit of page table entries that is for software
.equ HEAP, 0x200000
.equ STACK_TOP, 0x400000

.macro load register, symbol
    la \register, \symbol
    ld \register, 0(\register)
.endm

main:
    # page memory: behind the stacks; a list of free pages, and a count of users for each
    la t0, end_of_image
    li t1, 0x200000
    add t0, t0, t1
    li t1, -0x200000
    and t0, t0, t1
    la t1, page_base
    sd t0, 0(t1)
    li s1, PAGE_COUNT
    li s2, 0
1:  sd s2, 0(t0)
    mv s2, t0
    li t1, 4096
    add t0, t0, t1
    addi s1, s1, -1
    bnez s1, 1b
    la t1, free_list
    sd s2, 0(t1)
    li t1, PAGE_COUNT
    la t0, free_pages
    sd t1, 0(t0)
    # the kernel's own table
    la t0, kernel_root
    li t1, 0x80000000 >> 12 << 10 | 0xcf
    sd t1, 16(t0)
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    la t1, kernel_satp
    sd t0, 0(t1)
    csrw satp, t0
    sfence.vma
    # the first process
    call new_process
    mv s0, a0
    mv a0, s0
    la a1, program_one
    call set_program
    li t0, RUNNABLE
    sd t0, P_STATE(s0)
    # the other harts
    li s1, 0
2:  load t0, boot_hart
    beq s1, t0, 3f
    mv a0, s1
    la a1, other_hart
    li a2, 0
    sbi EXT_HSM, 0
    expect "hart_start", a0, 0
3:  addi s1, s1, 1
    li t0, HARTS
    blt s1, t0, 2b
    li a0, 0
    j run_hart

other_hart:
    load t0, kernel_satp
    csrw satp, t0
    sfence.vma
    la t0, next_hart
    li a0, 1
    amoadd.d a0, a0, (t0)
run_hart:                    # a0 = number of this hart
    la tp, harts
    li t0, H_SIZE
    mul t0, t0, a0
    add tp, tp, t0
    la t0, stacks
    ld t0, 0(t0)
    li t1, STACK
    addi t2, a0, 1
    mul t1, t1, t2
    add sp, t0, t1
    sd sp, H_STACK(tp)
    csrw sscratch, tp
    la t0, from_user
    csrw stvec, t0
    li t0, STI
    csrw sie, t0
    csrwi scounteren, 7
    call lock
    # falls through

# -- scheduler: the lock is held ----------------------------------------------------------------------------------------
schedule:
    sd zero, H_PROC(tp)
    ld s1, H_NEXT(tp)
    li s2, PROCS
1:  la s0, processes
    li t0, P_SIZE
    mul t0, t0, s1
    add s0, s0, t0
    addi s1, s1, 1
    li t0, PROCS
    blt s1, t0, 2f
    li s1, 0
2:  ld t0, P_STATE(s0)
    li t1, RUNNABLE
    beq t0, t1, found
    addi s2, s2, -1
    bnez s2, 1b
    # nothing to run: is anything alive?
    load t0, alive
    call unlock
    beqz t0, all_done
    call arm_timer
    wfi
    call lock
    j schedule
all_done:
    load t0, boot_hart       # numbered 0
    la t1, harts
    beq tp, t1, 1f
    csrw sie, zero
3:  wfi
    j 3b
1:  csrw sie, zero
    la t0, unexpected
    csrw stvec, t0
    load a0, free_pages
    expect "all pages came back", a0, PAGE_COUNT
    load a0, switches
    sltiu a0, a0, 50
    expect "processes were preempted", a0, 0
    load a0, copies
    snez a0, a0
    expect "pages were copied on write", a0, 1
    j finish

found:
    sd s1, H_NEXT(tp)
    li t0, RUNNING
    sd t0, P_STATE(s0)
    sd s0, H_PROC(tp)
    # its floating-point registers
    li t0, FS
    csrs sstatus, t0
    .rept 32
    fld f\+, P_F + 8*\+(s0)
    .endr
    ld t0, P_FCSR(s0)
    csrw fcsr, t0
    call unlock
    call arm_timer
to_user:                     # s0 = process
    li t0, FS
    csrc sstatus, t0
    li t0, 0x4000            # clean
    csrs sstatus, t0
    li t0, SPP | SIE
    csrc sstatus, t0
    li t0, SPIE
    csrs sstatus, t0
    ld t0, P_PC(s0)
    csrw sepc, t0
    ld t0, P_ROOT(s0)
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    sfence.vma
    csrw satp, t0
    sfence.vma
    csrw sscratch, tp
    .rept 32
    .if \+ > 0
    .if \+ != 8
    ld x\+, P_X + 8*\+(s0)
    .endif
    .endif
    .endr
    ld s0, P_X + 64(s0)
    sret

.balign 4
from_user:
    csrrw tp, sscratch, tp
    sd t0, H_SCRATCH(tp)
    ld t0, H_PROC(tp)
    bnez t0, 1f
    ld t0, H_SCRATCH(tp)     # an interrupt in the kernel cannot be: SIE is off
    j unexpected
1:  .rept 32
    .if \+ != 4
    .if \+ != 5
    sd x\+, P_X + 8*\+(t0)
    .endif
    .endif
    .endr
    mv s0, t0
    ld t0, H_SCRATCH(tp)
    sd t0, P_X + 40(s0)
    csrr t0, sscratch
    sd t0, P_X + 32(s0)
    csrr t0, sepc
    sd t0, P_PC(s0)
    ld sp, H_STACK(tp)
    load t0, kernel_satp
    csrw satp, t0
    sfence.vma
    csrr t0, sstatus         # floating-point registers, if it changed them
    srli t0, t0, 13
    andi t0, t0, 3
    li t1, 3
    bne t0, t1, 2f
    .rept 32
    fsd f\+, P_F + 8*\+(s0)
    .endr
    csrr t0, fcsr
    sd t0, P_FCSR(s0)
2:  csrr s1, scause
    csrr s2, stval
    bgez s1, 3f
    call arm_timer           # the slice is over
    call lock
    la t0, switches
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    li t0, RUNNABLE
    sd t0, P_STATE(s0)
    j schedule
3:  call lock
    li t0, 8
    beq s1, t0, system_call
    li t0, 13
    beq s1, t0, memory_fault
    li t0, 15
    beq s1, t0, memory_fault
kill:                        # anything else ends the process, code 1000 + cause
    addi a0, s1, 1000
    j exit_process
system_call:
    ld t0, P_PC(s0)
    addi t0, t0, 4
    sd t0, P_PC(s0)
    ld t0, P_X + 8*17(s0)
    ld a0, P_X + 8*10(s0)
    li t1, 1
    beq t0, t1, fork
    li t1, 2
    beq t0, t1, exit_process
    li t1, 3
    beq t0, t1, wait
    li t1, 4
    beq t0, t1, get_pid
    li t1, 5
    beq t0, t1, yield
    li t1, 6
    beq t0, t1, exec
    li t1, 7
    beq t0, t1, report
    j kill

resume:
    call unlock
    j to_user

get_pid:
    ld t0, P_PID(s0)
    sd t0, P_X + 80(s0)
    j resume

yield:
    li t0, RUNNABLE
    sd t0, P_STATE(s0)
    j schedule

report:                      # a0 = value, a1 = expected, a2 = number of the check
    ld s3, P_X + 88(s0)
    bne a0, s3, 1f
    la t0, passed
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    j resume
1:  mv s4, a0
    print "user check "
    ld t5, P_X + 96(s0)
    jal t3, put_decimal
    print ": "
    expect_equal "user", s4, s3
    j resume

exec:                        # a0 = which program
    mv s3, a0
    mv a0, s0
    call free_memory
    mv a0, s0
    la a1, program_one
    beqz s3, 1f
    la a1, program_two
1:  call set_program
    j resume

fork:
    call new_process         # a0 = child
    beqz a0, 4f
    mv s3, a0
    ld t0, P_PID(s0)
    sd t0, P_PARENT(s3)
    ld t0, P_PC(s0)
    sd t0, P_PC(s3)
    ld t0, P_FCSR(s0)
    sd t0, P_FCSR(s3)
    li t0, 512               # x and f
    addi t1, s0, P_X
    addi t2, s3, P_X
1:  ld a0, 0(t1)
    sd a0, 0(t2)
    addi t1, t1, 8
    addi t2, t2, 8
    addi t0, t0, -8
    bnez t0, 1b
    ld t0, P_PID(s3)
    sd t0, P_X + 80(s0)
    sd zero, P_X + 80(s3)
    # share every page, copy on write
    li s4, 0
2:  mv a0, s0
    slli a1, s4, 12
    call entry_of
    ld s5, 0(a0)
    andi t0, s5, 1
    beqz t0, 3f
    andi t0, s5, 4
    beqz t0, 5f
    li t0, COW
    or s5, s5, t0
    andi s5, s5, ~4
    sd s5, 0(a0)
5:  mv a0, s3
    slli a1, s4, 12
    call entry_of
    sd s5, 0(a0)
    srli a0, s5, 10
    slli a0, a0, 12
    call use_page
3:  addi s4, s4, 1
    li t0, 1024
    blt s4, t0, 2b
    sfence.vma
    li t0, RUNNABLE
    sd t0, P_STATE(s3)
    j resume
4:  li t0, -1
    sd t0, P_X + 80(s0)
    j resume

exit_process:                # a0 = code
    sd a0, P_CODE(s0)
    mv a0, s0
    call free_memory
    la t0, alive
    ld t1, 0(t0)
    addi t1, t1, -1
    sd t1, 0(t0)
    li t0, ZOMBIE
    sd t0, P_STATE(s0)
    ld t0, P_PARENT(s0)
    bnez t0, 1f
    li t0, FREE              # nobody waits for the first process
    sd t0, P_STATE(s0)
    j schedule
1:  la t1, processes         # wake the parent
    li t2, PROCS
2:  ld a0, P_PID(t1)
    bne a0, t0, 3f
    ld a0, P_STATE(t1)
    li a1, WAITING
    bne a0, a1, 3f
    li a0, RUNNABLE
    sd a0, P_STATE(t1)
3:  addi t1, t1, P_SIZE
    addi t2, t2, -1
    bnez t2, 2b
    j schedule

wait:                        # -> a0 = pid of a child that ended, a1 = its code; a0 = -1: no children
    ld s3, P_PID(s0)
    li s4, 0
    la t1, processes
    li t2, PROCS
1:  ld t0, P_STATE(t1)
    beqz t0, 2f
    ld t0, P_PARENT(t1)
    bne t0, s3, 2f
    li s4, 1
    ld t0, P_STATE(t1)
    li a0, ZOMBIE
    bne t0, a0, 2f
    ld t0, P_PID(t1)
    sd t0, P_X + 80(s0)
    ld t0, P_CODE(t1)
    sd t0, P_X + 88(s0)
    sd zero, P_STATE(t1)
    sd zero, P_PID(t1)
    j resume
2:  addi t1, t1, P_SIZE
    addi t2, t2, -1
    bnez t2, 1b
    bnez s4, 3f
    li t0, -1
    sd t0, P_X + 80(s0)
    j resume
3:  ld t0, P_PC(s0)          # again when woken
    addi t0, t0, -4
    sd t0, P_PC(s0)
    li t0, WAITING
    sd t0, P_STATE(s0)
    j schedule

memory_fault:                # s1 = cause, s2 = address
    li t0, STACK_TOP
    bgeu s2, t0, kill
    mv a0, s0
    mv a1, s2
    call entry_of
    mv s3, a0
    ld s4, 0(s3)
    andi t0, s4, 1
    bnez t0, 1f
    li t0, HEAP              # heap and stack come when they are used
    bltu s2, t0, kill
    call get_page
    srli t0, a0, 2
    ori t0, t0, 0x17
    sd t0, 0(s3)
    j resume
1:  li t0, 15
    bne s1, t0, kill
    li t0, COW
    and t0, t0, s4
    beqz t0, kill
    la t0, copies
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    srli s5, s4, 10          # the shared page
    slli s5, s5, 12
    call get_page
    mv t0, s5
    mv t1, a0
    li t2, 4096
2:  ld a1, 0(t0)
    sd a1, 0(t1)
    addi t0, t0, 8
    addi t1, t1, 8
    addi t2, t2, -8
    bnez t2, 2b
    srli t0, a0, 12
    slli t0, t0, 10
    andi t1, s4, 0x1b        # V R X U as before
    or t0, t0, t1
    ori t0, t0, 4
    sd t0, 0(s3)
    mv a0, s5
    call put_page
    j resume

# -- memory ---------------------------------------------------------------------------------------------------------------
entry_of:                    # a0 = process, a1 = address below 4 MiB -> a0 = address of the entry
    ld t0, P_ROOT(a0)
    ld t0, 0(t0)
    srli t0, t0, 10
    slli t0, t0, 12
    srli t1, a1, 21
    slli t1, t1, 3
    add t0, t0, t1
    ld t0, 0(t0)
    srli t0, t0, 10
    slli t0, t0, 12
    srli t1, a1, 12
    andi t1, t1, 511
    slli t1, t1, 3
    add a0, t0, t1
    ret

get_page:                    # -> a0: a page of zeros, used once
    la t0, free_list
    ld a0, 0(t0)
    bnez a0, 1f
    print "FAIL out of pages\n"
    j finish
1:  ld t1, 0(a0)
    sd t1, 0(t0)
    la t0, free_pages
    ld t1, 0(t0)
    addi t1, t1, -1
    sd t1, 0(t0)
    mv t0, a0
    li t1, 4096
    add t1, t1, a0
2:  sd zero, 0(t0)
    addi t0, t0, 8
    bltu t0, t1, 2b
use_page:                    # a0 = page: one user more
    load t0, page_base
    sub t0, a0, t0
    srli t0, t0, 12
    la t1, uses
    add t1, t1, t0
    lbu t0, 0(t1)
    addi t0, t0, 1
    sb t0, 0(t1)
    ret

put_page:                    # a0 = page: one user less; free with the last one
    load t0, page_base
    sub t0, a0, t0
    srli t0, t0, 12
    la t1, uses
    add t1, t1, t0
    lbu t0, 0(t1)
    addi t0, t0, -1
    sb t0, 0(t1)
    bnez t0, 1f
    la t0, free_list
    ld t1, 0(t0)
    sd t1, 0(a0)
    sd a0, 0(t0)
    la t0, free_pages
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
1:  ret

make_tables:                 # a0 = process: root, middle, two leaf tables
    addi sp, sp, -32
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    mv s0, a0
    call get_page
    sd a0, P_ROOT(s0)
    li t0, 0x80000000 >> 12 << 10 | 0xcf
    sd t0, 16(a0)
    call get_page
    mv s1, a0
    ld t0, P_ROOT(s0)
    srli t1, s1, 2
    ori t1, t1, 1
    sd t1, 0(t0)
    call get_page
    srli t1, a0, 2
    ori t1, t1, 1
    sd t1, 0(s1)
    call get_page
    srli t1, a0, 2
    ori t1, t1, 1
    sd t1, 8(s1)
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    addi sp, sp, 32
    ret

free_memory:                 # a0 = process: its pages, then its tables
    addi sp, sp, -32
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    mv s0, a0
    li s1, 0
1:  mv a0, s0
    slli a1, s1, 12
    call entry_of
    ld t0, 0(a0)
    andi t1, t0, 1
    beqz t1, 2f
    srli a0, t0, 10
    slli a0, a0, 12
    call put_page
2:  addi s1, s1, 1
    li t0, 1024
    blt s1, t0, 1b
    ld s1, P_ROOT(s0)
    ld s1, 0(s1)
    srli s1, s1, 10
    slli s1, s1, 12
    ld a0, 0(s1)
    srli a0, a0, 10
    slli a0, a0, 12
    call put_page
    ld a0, 8(s1)
    srli a0, a0, 10
    slli a0, a0, 12
    call put_page
    mv a0, s1
    call put_page
    ld a0, P_ROOT(s0)
    call put_page
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    addi sp, sp, 32
    ret

new_process:                 # -> a0: a process with empty tables if not forked into, 0: none is free
    la a0, processes
    li t2, PROCS
1:  ld t0, P_STATE(a0)
    beqz t0, 2f
    addi a0, a0, P_SIZE
    addi t2, t2, -1
    bnez t2, 1b
    li a0, 0
    ret
2:  addi sp, sp, -16
    sd ra, 0(sp)
    sd a0, 8(sp)
    la t0, next_pid
    ld t1, 0(t0)
    sd t1, P_PID(a0)
    addi t1, t1, 1
    sd t1, 0(t0)
    sd zero, P_PARENT(a0)
    sd zero, P_FCSR(a0)
    la t0, alive
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    call make_tables
    ld a0, 8(sp)
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

set_program:                 # a0 = process, a1 = program: fresh copy at 0, registers for its start
    addi sp, sp, -48
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    sd s2, 24(sp)
    sd s3, 32(sp)
    mv s0, a0
    mv s1, a1
    ld t0, P_ROOT(s0)        # exec has freed them
    load t1, page_base
    sub t0, t0, t1
    srli t0, t0, 12
    la t1, uses
    add t1, t1, t0
    lbu t0, 0(t1)
    bnez t0, 1f
    mv a0, s0
    call make_tables
1:  li s2, 0
2:  call get_page
    mv s3, a0
    mv t1, s3
    li t2, 4096
3:  ld t0, 0(s1)
    sd t0, 0(t1)
    addi s1, s1, 8
    addi t1, t1, 8
    addi t2, t2, -8
    bnez t2, 3b
    mv a0, s0
    slli a1, s2, 12
    call entry_of
    srli t0, s3, 2
    ori t0, t0, 0x1f         # R W X U
    sd t0, 0(a0)
    addi s2, s2, 1
    li t0, 2
    blt s2, t0, 2b
    sd zero, P_PC(s0)
    li t0, STACK_TOP
    sd t0, P_X + 16(s0)
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    ld s2, 24(sp)
    ld s3, 32(sp)
    addi sp, sp, 48
    ret

lock:
    la t0, kernel_lock
    li t1, 1
1:  amoswap.w.aq t2, t1, (t0)
    beqz t2, 2f
    pause
    j 1b
2:  ret

unlock:
    la t1, kernel_lock
    amoswap.w.rl zero, zero, (t1)
    ret

arm_timer:
    rdtime a0
    li a1, SLICE
    add a0, a0, a1
    sbi EXT_TIME, 0
    ret

    .balign 8
kernel_satp: .dword 0
kernel_lock: .dword 0
page_base: .dword 0
free_list: .dword 0
free_pages: .dword 0
next_pid: .dword 1
next_hart: .dword 1
alive: .dword 0
switches: .dword 0
copies: .dword 0
harts: .zero H_SIZE * MAX_HARTS
processes: .zero P_SIZE * PROCS
uses: .zero PAGE_COUNT
    .balign 4096
kernel_root: .zero 4096

# -- user programs, two pages each, at address 0 ------------------------------------------------------------------------------
.macro system_call number
    li a7, \number
    ecall
.endm
.macro user_check number, got, wanted
    mv a0, \got
    mv a1, \wanted
    li a2, \number
    system_call 7
.endm

    .balign 4096
program_one:
    system_call 4
    li t0, 1
    user_check 1, a0, t0
    # eight children at once
    li s1, 8
1:  system_call 1
    beqz a0, child
    addi s1, s1, -1
    bnez s1, 1b
    li s1, 8
    li s2, 0
2:  system_call 3
    add s2, s2, a1
    addi s1, s1, -1
    bnez s1, 2b
    li t0, 88                # each says 11 when all was right
    user_check 2, s2, t0
    system_call 3
    li t0, -1
    user_check 3, a0, t0
    # what a child writes, its parent does not see
    la s3, variable          # relative to pc: the right one at address 0 too
    li t0, 55
    sd t0, 0(s3)
    system_call 1
    bnez a0, 3f
    ld s4, 0(s3)
    li t0, 66
    sd t0, 0(s3)
    ld a0, 0(s3)
    add a0, a0, s4
    system_call 2
3:  system_call 3
    li t0, 121
    user_check 4, a1, t0
    ld s4, 0(s3)
    li t0, 55
    user_check 5, s4, t0
    # a chain of forks, each waiting for the next
    li s5, 0
4:  li t0, 12
    beq s5, t0, 5f
    addi s5, s5, 1
    system_call 1
    beqz a0, 4b
    system_call 3
    addi a1, a1, 1
    li t0, 1
    beq s5, t0, 6f
    mv a0, a1
    system_call 2
5:  li a0, 0
    system_call 2
6:  li t0, 12
    user_check 6, a1, t0
    # fork, exec, wait again and again: page frames change between programs and data
    li s5, 60
    li s6, 0
7:  system_call 1
    bnez a0, 8f
    li a0, 1
    system_call 6
8:  system_call 3
    add s6, s6, a1
    addi s5, s5, -1
    bnez s5, 7b
    li t0, 60 * 77
    user_check 7, s6, t0
    # what is not allowed ends a child: kernel memory, code outside, an illegal instruction
    system_call 1
    bnez a0, 9f
    li t0, 0x80200000
    ld t0, 0(t0)
9:  system_call 3
    li t0, 1013
    user_check 8, a1, t0
    system_call 1
    bnez a0, 1f
    li t0, 0x80200000
    jr t0
1:  system_call 3
    li t0, 1012
    user_check 9, a1, t0
    system_call 1
    bnez a0, 2f
    csrw satp, zero
2:  system_call 3
    li t0, 1002
    user_check 10, a1, t0
    system_call 1
    bnez a0, 3f
    li t0, 100
    sd t0, -8(zero)
3:  system_call 3
    li t0, 1015
    user_check 11, a1, t0
    li a0, 0
    system_call 2

child:                       # integer, heap and floating-point work that must survive being preempted
    system_call 4
    mv s1, a0
    fcvt.d.l fa0, s1         # fa0 = pid, in a register for all the time
    fcvt.d.l fs1, zero
    li s2, HEAP
    li s3, 0
1:  slli t0, s3, 12
    add t0, t0, s2
    mul t1, s1, s3
    sd t1, 16(t0)
    fadd.d fs1, fs1, fa0
    addi s3, s3, 1
    li t0, 24
    blt s3, t0, 1b
    li s4, 300000
2:  addi s4, s4, -1
    fadd.d fs1, fs1, fa0
    fsub.d fs1, fs1, fa0
    xor s5, s4, s1
    add s6, s6, s5
    sub s6, s6, s5
    slli t0, s4, 48          # now and then it gives way by itself
    bnez t0, 3f
    system_call 5
3:  bnez s4, 2b
    li s3, 0
    li s5, 0
4:  slli t0, s3, 12
    add t0, t0, s2
    ld t1, 16(t0)
    mul t2, s1, s3
    sub t1, t1, t2
    snez t1, t1
    add s5, s5, t1
    addi s3, s3, 1
    li t0, 24
    blt s3, t0, 4b
    fcvt.l.d t0, fs1
    li t1, 24
    mul t1, t1, s1
    sub t0, t0, t1
    snez t0, t0
    add s5, s5, t0
    system_call 4
    sub a0, a0, s1
    snez a0, a0
    add s5, s5, a0
    bnez s6, 5f
    bnez s5, 5f
    li a0, 11
    system_call 2
5:  li a0, 0
    system_call 2
    .balign 8
variable: .dword 0
    .balign 4096
    .zero 4096

program_two:
    li s1, 70
    addi s1, s1, 7
    li t0, HEAP
    ld t1, 16(t0)            # fresh memory is zero
    add s1, s1, t1
    addi sp, sp, -64
    ld t1, 0(sp)
    add s1, s1, t1
    mv a0, s1
    system_call 2
    .balign 4096
    .zero 4096
end_of_image:
