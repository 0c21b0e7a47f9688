# A user program under demand paging, with fewer page frames than pages. MODE = 8 (Sv39) or 9 (Sv48).
# Every page of the program, code, data and stack, comes in by a page fault and goes out again when frames run
# short: pages whose D bit is clear are dropped, and compared with their home first. A timer throws everything out
# now and then. The program itself is ordinary: it checks what it computes and says so by ecalls.

.equ FRAMES, 20
.equ DATA_PAGE, 128          # first data page of the user's 512 pages; code begins at page 0
.equ STACK_PAGE, 256         # the stack ends here
.equ PAGES, 256
.equ TICK, 20000             # 2 ms
.equ SV, 1
.equ A_BIT, 0x40
.equ D_BIT, 0x80

.macro load register, symbol
    la \register, \symbol
    ld \register, 0(\register)
.endm

main:
    addi sp, sp, -16
    sd ra, 0(sp)
    # -- tables: the kernel's gigapage, and one leaf table for the user
    la s0, root
.if MODE == 9
    la t0, top
    srli t1, s0, 2
    ori t1, t1, 1
    sd t1, 0(t0)             # the lower 512 GiB
    la t2, upper
    srli t1, t2, 2
    ori t1, t1, 1
    li t3, 8 * 200           # user at 200 * 512 GiB
    add t0, t0, t3
    sd t1, 0(t0)
    li s1, 200 << 39
.else
    la t2, root
    li s1, 0
.endif
    li t1, 0x80000000 >> 12 << 10 | 0xef
    sd t1, 16(s0)
    la t3, middle
    srli t1, t3, 2
    ori t1, t1, 1
    sd t1, 8(t2)             # user at 1 GiB
    la t0, leaf
    srli t1, t0, 2
    ori t1, t1, 1
    sd t1, 24(t3)            # + 3 * 2 MiB
    li t0, 0x40600000
    add s1, s1, t0
    la t0, user_base
    sd s1, 0(t0)
    # frames and homes behind the image
    la t0, end_of_image
    li t1, 0x110000
    add t0, t0, t1
    li t1, -4096
    and t0, t0, t1
    la t1, frame_memory
    sd t0, 0(t1)
    li t1, FRAMES * 4096
    add t0, t0, t1
    la t1, homes
    sd t0, 0(t1)
    la t0, frame_pages
    li t1, -1
    li t2, FRAMES
1:  sd t1, 0(t0)
    addi t0, t0, 8
    addi t2, t2, -1
    bnez t2, 1b
    # the homes of the code pages are in the image
    la t0, kernel_trap
    csrw stvec, t0
.if MODE == 9
    la t0, top
.else
    la t0, root
.endif
    srli t0, t0, 12
    li t1, MODE << 60 | 3 << 44
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
    csrr t1, satp
    expect_equal "satp holds mode, ASID and root", t1, t0
    csrwi scounteren, 7
    # -- run the user program
    la t0, kernel_sp
    sd sp, 0(t0)
    csrw sepc, s1
    csrw sscratch, sp
    li t0, SPP | SUM | MXR
    csrc sstatus, t0
    li t0, STI
    csrs sie, t0
    rdtime a0
    li a1, TICK
    add a0, a0, a1
    sbi EXT_TIME, 0
    li sp, 0
    sret
user_done:
    load sp, kernel_sp
    csrwi sie, 0
    li t0, STI
    csrc sie, t0
    li a0, -1
    sbi EXT_TIME, 0
    csrw satp, zero
    sfence.vma
    la t0, unexpected
    csrw stvec, t0
    load a0, lost
    expect "clean pages equal their homes", a0, 0
    load a0, not_accessed
    load a1, ticks
    slli a1, a1, 2           # an instruction lies on up to two pages and accesses two: a tick may come before it has run
    sltu a0, a1, a0
    expect "pages that were used have their A bit", a0, 0
    load a0, faults
    li t0, 500
    sltu a0, a0, t0
    expect "there were many page faults", a0, 0
    load a0, upgrades
    snez a0, a0
    expect "some pages were read before they were written", a0, 1
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

# -- the kernel ----------------------------------------------------------------------------------------------------
.balign 4
kernel_trap:                 # only from U-mode; registers go to `frame`
    csrrw sp, sscratch, sp
    addi sp, sp, -512
    .rept 32
    .if \+ != 2
    sd x\+, 8*\+(sp)
    .endif
    .endr
    csrr t0, sscratch
    sd t0, 16(sp)
    csrr t0, sstatus
    andi t0, t0, SPP
    beqz t0, 1f
    j unexpected
1:  csrr s0, scause
    li t0, 0x8000000000000005
    beq s0, t0, tick
    li t0, 8
    beq s0, t0, call_from_user
    csrr s1, stval
    load s2, user_base
    sub s3, s1, s2
    srli s3, s3, 12          # page
    li t0, PAGES
    bgeu s3, t0, bad_access
    la s4, leaf
    slli t0, s3, 3
    add s4, s4, t0           # entry
    li t0, 12
    beq s0, t0, page_fault
    li t0, 13
    beq s0, t0, page_fault
    li t0, 15
    beq s0, t0, page_fault
bad_access:                  # the program may have asked for it: resume there with a0 = cause
    load t0, resume
    bnez t0, 1f
    j unexpected
1:  csrw sepc, t0
    sd s0, 8*10(sp)
    sd s1, 8*11(sp)
    la t0, resume
    sd zero, 0(t0)
    j back

page_fault:
    la t0, faults
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    ld s5, 0(s4)
    andi t0, s5, 1
    beqz t0, bring_in
    # present: a store to a page that was mapped for reading
    li t0, 15
    bne s0, t0, bad_access
    li t0, DATA_PAGE
    blt s3, t0, bad_access
    andi t0, s5, 4
    beqz t0, 1f
    j unexpected             # it was writable: the fault is wrong
1:  ori s5, s5, 4
    sd s5, 0(s4)
    sfence.vma s1, zero
    la t0, upgrades
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    j back

bring_in:
    load s6, next_frame
    mv a0, s6
    call evict
    mv a0, s3
    call home_of
    mv s7, a0
    slli t0, s6, 12
    load s8, frame_memory
    add s8, s8, t0
    mv a1, s8
    call copy_page
    la t0, frame_pages
    slli t1, s6, 3
    add t0, t0, t1
    sd s3, 0(t0)
    addi t1, s6, 1
    li t0, FRAMES
    blt t1, t0, 1f
    li t1, 0
1:  la t0, next_frame
    sd t1, 0(t0)
    srli t0, s8, 2           # PTE: user, not accessed, not dirty
    li t1, DATA_PAGE
    blt s3, t1, 2f
    ori t0, t0, 0x13         # R
    li t1, 15
    bne s0, t1, 3f
    ori t0, t0, 4            # W at once when it is a store
    j 3f
2:  ori t0, t0, 0x1b         # R X
    fence.i
3:  sd t0, 0(s4)
    sfence.vma s1, zero
back:
    .rept 32
    .if \+ > 4
    ld x\+, 8*\+(sp)
    .endif
    .endr
    ld ra, 8(sp)
    ld gp, 24(sp)
    ld tp, 32(sp)
    addi sp, sp, 512
    csrw sscratch, sp
    ld sp, -496(sp)
    sret

evict:                       # a0 = frame: what is in it goes home
    la t0, frame_pages
    slli t1, a0, 3
    add t0, t0, t1
    ld t2, 0(t0)
    bgez t2, 1f
    ret
1:  addi sp, sp, -32
    sd ra, 0(sp)
    li t1, -1
    sd t1, 0(t0)
    la t1, leaf
    slli t3, t2, 3
    add t1, t1, t3
    ld t4, 0(t1)             # the entry
    sd zero, 0(t1)
    load t5, user_base
    slli t6, t2, 12
    add t5, t5, t6
    sfence.vma t5, zero
    ld t6, 0(t1)
    andi t5, t4, A_BIT
    bnez t5, 2f
    la t5, not_accessed
    ld t6, 0(t5)
    addi t6, t6, 1
    sd t6, 0(t5)
2:  load t5, frame_memory
    slli t6, a0, 12
    add t5, t5, t6
    sd t5, 8(sp)
    sd t4, 16(sp)
    mv a0, t2
    call home_of
    ld t4, 16(sp)
    ld t5, 8(sp)
    andi t4, t4, D_BIT
    beqz t4, 3f
    mv a1, a0
    mv a0, t5
    call copy_page
    j 5f
3:  li t6, 512               # clean: must be as it came
4:  ld t0, 0(t5)
    ld t1, 0(a0)
    bne t0, t1, 6f
    addi t5, t5, 8
    addi a0, a0, 8
    addi t6, t6, -1
    bnez t6, 4b
    j 5f
6:  la t5, lost
    ld t6, 0(t5)
    addi t6, t6, 1
    sd t6, 0(t5)
5:  ld ra, 0(sp)
    addi sp, sp, 32
    ret

home_of:                     # a0 = page -> address of its home
    li t0, DATA_PAGE
    blt a0, t0, 1f
    sub a0, a0, t0
    slli a0, a0, 12
    load t0, homes
    add a0, a0, t0
    ret
1:  slli a0, a0, 12
    la t0, user_start
    add a0, a0, t0
    ret

copy_page:                   # a0 = from, a1 = to
    li t0, 4096
    add t0, t0, a0
1:  ld t1, 0(a0)
    ld t2, 8(a0)
    sd t1, 0(a1)
    sd t2, 8(a1)
    addi a0, a0, 16
    addi a1, a1, 16
    bltu a0, t0, 1b
    ret

tick:                        # everything out
    la t0, ticks
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    li s0, 0
1:  mv a0, s0
    call evict
    addi s0, s0, 1
    li t0, FRAMES
    blt s0, t0, 1b
    sfence.vma
    rdtime a0
    li a1, TICK
    add a0, a0, a1
    sbi EXT_TIME, 0
    j back

call_from_user:              # a7: 1 check a0 = a1, number a2; 2 done; 3 the next fault resumes at a0
    csrr t0, sepc
    addi t0, t0, 4
    csrw sepc, t0
    ld a7, 8*17(sp)
    ld a0, 8*10(sp)
    ld a1, 8*11(sp)
    ld a2, 8*12(sp)
    li t0, 2
    beq a7, t0, user_done
    li t0, 3
    bne a7, t0, 1f
    la t0, resume
    sd a0, 0(t0)
    j back
1:  bne a0, a1, 2f
    la t0, passed
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    j back
2:  mv s0, a0
    print "user check "
    mv t5, a2
    jal t3, put_decimal
    print ": "
    expect_equal "user", s0, a1
    j back

    .balign 8
user_base: .dword 0
kernel_sp: .dword 0
frame_memory: .dword 0
homes: .dword 0
next_frame: .dword 0
resume: .dword 0
ticks: .dword 0
faults: .dword 0
upgrades: .dword 0
lost: .dword 0
not_accessed: .dword 0
frame_pages: .zero 8 * FRAMES
    .balign 4096
top: .zero 4096
upper: .zero 4096
root: .zero 4096
middle: .zero 4096
leaf: .zero 4096

# -- the user program: runs at user_base, position-independent -----------------------------------------------------------
.macro user_check number, got, wanted
    mv a0, \got
    mv a1, \wanted
    li a2, \number
    li a7, 1
    ecall
.endm
.equ DATA_OFFSET, DATA_PAGE << 12

    .balign 4096
user_start:
    la s0, user_start
    li t0, DATA_OFFSET
    add s1, s0, t0           # data
    li t0, STACK_PAGE << 12
    add sp, s0, t0
    # 1: fill 64 pages, read them back in another order, three times
    li s2, 3
again:
    li s3, 0                 # page
    li s4, 0                 # sum of what is written
    li s5, 12345
1:  li t1, 1103515245
    mul s5, s5, t1
    addi s5, s5, 1234
    srli t2, s5, 20
    andi t2, t2, 511
    slli t2, t2, 3
    li t3, 27
    mul t3, t3, s3
    andi t3, t3, 63          # a permutation of the pages
    slli t3, t3, 12
    add t2, t2, t3
    add t2, t2, s1
    ld t4, 0(t2)
    add t4, t4, s5
    sd t4, 0(t2)
    add s4, s4, s5
    addi s3, s3, 1
    li t0, 500
    blt s3, t0, 1b
    addi s2, s2, -1
    bnez s2, again
    li s3, 0
    li s6, 0
    li t0, 64 << 12
    add t1, s1, t0
    mv t2, s1
2:  ld t3, 0(t2)
    add s6, s6, t3
    addi t2, t2, 8
    bltu t2, t1, 2b
    slli t0, s4, 1
    add t0, t0, s4
    user_check 1, s6, t0
    # 2: accesses across pages
    li s3, 0
    li s6, 0
    li t0, 70 << 12
    add s7, s1, t0
3:  slli t1, s3, 12
    add t1, t1, s7
    li t2, 4092
    add t1, t1, t2
    addi t2, s3, 1
    slli t3, t2, 36
    or t2, t2, t3
    sd t2, 1(t1)
    ld t3, 1(t1)
    sub t3, t3, t2
    add s6, s6, t3
    lwu t3, 2(t1)
    srli t4, t2, 8
    slli t4, t4, 32
    srli t4, t4, 32
    sub t3, t3, t4
    add s6, s6, t3
    addi s3, s3, 1
    li t0, 30
    blt s3, t0, 3b
    user_check 2, s6, zero
    # 3: atomics on pages that are not there, and on pages that were only read
    li s3, 0
    li s6, 0
    li t5, 7
4:  slli t1, s3, 12
    add t1, t1, s7
    andi t0, s3, 1
    beqz t0, 5f
    ld t2, 64(t1)
5:  addi t1, t1, 64
    amoadd.d t2, t5, (t1)
    add s6, s6, t2
6:  lr.w t2, (t1)
    addi t2, t2, 1
    sc.w t3, t2, (t1)
    bnez t3, 6b
    addi s3, s3, 1
    li t0, 40
    blt s3, t0, 4b
    user_check 3, s6, zero
    li s3, 0
    li s6, 0
7:  slli t1, s3, 12
    add t1, t1, s7
    ld t2, 64(t1)
    add s6, s6, t2
    addi s3, s3, 1
    li t0, 40
    blt s3, t0, 7b
    li t0, 320
    user_check 4, s6, t0
    # 4: floating point through faults: registers and flags survive
    csrwi fcsr, 0
    li t0, 1
    fcvt.d.l fa0, t0
    fmv.d.x fa1, zero
    fmv.d fa2, fa0
    li s3, 0
8:  slli t1, s3, 12
    add t1, t1, s7
    fdiv.d fa3, fa0, fa2
    fsd fa3, 128(t1)
    fld fa4, 128(t1)
    fadd.d fa1, fa1, fa4
    fadd.d fa2, fa2, fa0
    addi s3, s3, 1
    li t0, 40
    blt s3, t0, 8b
    frflags t1
    li t0, 1
    user_check 5, t1, t0     # inexact
    fmv.x.d t1, fa1
    li t0, 0x40111d3a62eb0a6f
    user_check 6, t1, t0     # sum of 1/k for k = 1..40
    # 5: a deep recursion
    li a0, 15
    call fibonacci
    li t0, 610
    user_check 7, a0, t0
    li a0, 800
    call deep
    li t0, 320400
    user_check 8, a0, t0
    # 6: all over the code pages
    li a0, 0
    call hop_1
    li t0, 3375
    user_check 9, a0, t0
    li s3, 100
9:  li a0, 0
    call hop_1
    addi s3, s3, -1
    bnez s3, 9b
    li t0, 3375
    user_check 10, a0, t0
    # 7: faults that stay faults: store to code, fetch of data, outside
    la a0, 1f
    li a7, 3
    ecall
    li a1, 0
    sd zero, 0(s0)
    li a0, 99
1:  mv t1, a0
    mv t2, a1
    li t0, 15
    user_check 11, t1, t0
    user_check 12, t2, s0
    la a0, 1f
    li a7, 3
    ecall
    ld t0, 0(s1)             # the page is there
    jr s1
1:  mv t1, a0
    mv t2, a1
    li t0, 12
    user_check 13, t1, t0
    user_check 14, t2, s1
    la a0, 1f
    li a7, 3
    ecall
    li t3, 0x80200000        # the kernel's memory
    ld t0, 0(t3)
1:  mv t1, a0
    mv t2, a1
    li t0, 13
    user_check 15, t1, t0
    user_check 16, t2, t3
    la a0, 1f
    li a7, 3
    ecall
    li t3, 1 << 62           # not canonical
    sd t0, 0(t3)
1:  mv t1, a0
    mv t2, a1
    li t0, 15
    user_check 17, t1, t0
    user_check 18, t2, t3
    la a0, 1f
    li a7, 3
    ecall
    li t3, 0x80200000        # code that is the kernel's
    jr t3
1:  mv t1, a0
    li t0, 12
    user_check 19, t1, t0
    # 8: sort 4000 numbers over 8 pages (shell sort), check order and sum
    li t0, 120 << 12
    add s7, s1, t0
    sub s7, s7, t0
    li s3, 0
    li s5, 999
    li s6, 0
1:  li t1, 1103515245
    mul s5, s5, t1
    addi s5, s5, 1234
    slli t2, s3, 3
    add t2, t2, s7
    sd s5, 0(t2)
    add s6, s6, s5
    addi s3, s3, 1
    li t0, 4000
    blt s3, t0, 1b
    li s8, 1093              # gap
2:  mv s3, s8
3:  slli t1, s3, 3
    add t1, t1, s7
    ld t2, 0(t1)             # to be inserted
    mv t3, s3
4:  blt t3, s8, 5f
    sub t4, t3, s8
    slli t5, t4, 3
    add t5, t5, s7
    ld t6, 0(t5)
    ble t6, t2, 5f
    slli t0, t3, 3
    add t0, t0, s7
    sd t6, 0(t0)
    mv t3, t4
    j 4b
5:  slli t0, t3, 3
    add t0, t0, s7
    sd t2, 0(t0)
    addi s3, s3, 1
    li t0, 4000
    blt s3, t0, 3b
    li t0, 3
    divu s8, s8, t0
    bnez s8, 2b
    li s3, 1
    li s9, 0
    ld t1, 0(s7)
    mv s10, t1
6:  slli t2, s3, 3
    add t2, t2, s7
    ld t3, 0(t2)
    add s10, s10, t3
    slt t4, t3, t1
    add s9, s9, t4
    mv t1, t3
    addi s3, s3, 1
    li t0, 4000
    blt s3, t0, 6b
    user_check 20, s9, zero
    user_check 21, s10, s6
    # 9: the clock and counters are there
    rdtime t1
    snez t1, t1
    li t0, 1
    user_check 22, t1, t0
    li a7, 2
    ecall

fibonacci:
    li t0, 2
    blt a0, t0, 1f
    addi sp, sp, -1040       # frames that fill pages quickly
    sd ra, 0(sp)
    sd a0, 1024(sp)
    addi a0, a0, -1
    call fibonacci
    ld t0, 1024(sp)
    sd a0, 1024(sp)
    addi a0, t0, -2
    call fibonacci
    ld t0, 1024(sp)
    add a0, a0, t0
    ld ra, 0(sp)
    addi sp, sp, 1040
1:  ret

deep:
    beqz a0, 1f
    addi sp, sp, -64
    sd ra, 0(sp)
    sd a0, 8(sp)
    addi a0, a0, -1
    call deep
    ld t0, 8(sp)
    add a0, a0, t0
    ld ra, 0(sp)
    addi sp, sp, 64
1:  ret

    # functions at the ends of pages; the add of each lies across two pages
.macro hop number, next
    .balign 4096
    .zero 4092
hop_\number:
    c.nop
    addi a0, a0, \number * 5
    j hop_\next
.endm
    hop 1, 20
    hop 2, 19
    hop 3, 18
    hop 4, 17
    hop 5, 16
    hop 6, 15
    hop 7, 14
    hop 8, 13
    hop 9, 12
    hop 10, 11
    hop 11, 21
    hop 12, 10
    hop 13, 9
    hop 14, 8
    hop 15, 7
    hop 16, 6
    hop 17, 5
    hop 18, 4
    hop 19, 3
    hop 20, 2
    hop 21, 22
    hop 22, 23
    hop 23, 24
    hop 24, 25
    hop 25, 26
    hop 26, 27
    .balign 4096
    .zero 4092
hop_27:
    addi a0, a0, 1620
    ret
    .balign 4096
end_of_image:
