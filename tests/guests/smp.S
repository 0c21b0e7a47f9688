# Several harts: HSM, IPIs, remote fences, and what the memory model and the A extension promise between harts.
# The boot hart gives the others functions to run (run_all); tp is a hart's number in the list, 0 = boot hart.

.equ ROUNDS, 20000           # of atomic increments
.equ PATCHES, 100            # of remote fences of each kind
.equ PINGS, 300

.macro load register, symbol
    la \register, \symbol
    ld \register, 0(\register)
.endm
.macro run_all function      # on every hart, this one included; returns when all have returned
    la a0, \function
    call on_all_harts
.endm
.macro barrier
    call wait_for_all
.endm
.macro relax                 # in waiting loops: after a thousand rounds sleep a little, there may be few host CPUs
    addi t5, t5, 1
    andi t6, t5, 1023
    bnez t6, 97f
    jal t4, sleep
97:
.endm

main:
    addi sp, sp, -16
    sd ra, 0(sp)
    li tp, 0
    csrw sie, zero
    # -- who is there
    la s0, hart_ids
    load s1, boot_hart
    sd s1, 0(s0)
    li s2, 1                 # harts found
    li s3, 0                 # id
find:
    beq s3, s1, 1f
    mv a0, s3
    sbi EXT_HSM, 2
    bnez a0, 1f
    expect "another hart is stopped at the start", a1, 1
    slli t0, s2, 3
    add t0, t0, s0
    sd s3, 0(t0)
    addi s2, s2, 1
1:  addi s3, s3, 1
    li t0, MAX_HARTS
    blt s3, t0, find
    la t0, hart_count
    sd s2, 0(t0)
    expect "number of harts", s2, HARTS

    # -- start them
    li s3, 1
start_next:
    bge s3, s2, started
    slli t0, s3, 3
    add t0, t0, s0
    ld a0, 0(t0)
    la a1, hart_entry
    mv a2, s3
    sbi EXT_HSM, 0
    expect "hart_start", a0, 0
    addi s3, s3, 1
    j start_next
started:
    run_all say_hello
    li s3, 1
check_next:
    bge s3, s2, checked
    slli t0, s3, 3
    la t1, hello
    add t1, t1, t0
    ld a0, 0(t1)
    la t1, hart_ids
    add t1, t1, t0
    ld a1, 0(t1)
    expect_equal "a started hart gets its id in a0", a0, a1
    mv a0, a1
    sbi EXT_HSM, 2
    expect "a started hart's status, error", a0, 0
    andi a1, a1, ~4          # a hart in wfi may count as suspended, as KVM has it
    expect "a started hart's status", a1, 0
    slli t0, s3, 3
    la t1, hart_ids
    add t1, t1, t0
    ld a0, 0(t1)
    la a1, hart_entry
    li a2, 0
    sbi EXT_HSM, 0
    expect "hart_start of a started hart", a0, SBI_ALREADY_AVAILABLE
    addi s3, s3, 1
    j check_next
checked:
    load a0, bad_start
    expect "harts start with satp = 0 and SIE = 0", a0, 0

    # -- atomics
    run_all atomics
    li s4, ROUNDS
    mul s4, s4, s2
    la t0, counter_w
    lwu a0, 0(t0)
    expect_equal "amoadd.w on all harts", a0, s4
    load a0, counter_d
    expect_equal "amoadd.d on all harts", a0, s4
    load a0, counter_lr_d
    expect_equal "lr.d/sc.d on all harts", a0, s4
    la t0, counter_lr_w
    lwu a0, 0(t0)
    expect_equal "lr.w/sc.w on all harts", a0, s4
    load a0, counter_locked
    expect_equal "a spin lock of amoswap", a0, s4
    load a0, maximum
    expect "amomaxu.d on all harts", a0, ROUNDS - 1
    load a0, token_errors
    expect "amoswap.d hands each token to one hart", a0, 0
    load a0, mixed_errors
    expect "amoadd.w on both halves of a doubleword that amoadd.d uses", a0, 0
    load a0, order_errors
    expect "stores become visible in the order of fences", a0, 0

    # -- remote fence.i
    run_all patching
    load a0, patch_errors
    expect "remote fence.i", a0, 0

    # -- remote sfence.vma
    call make_tables
    run_all remapping
    load a0, map_errors
    expect "remote sfence.vma", a0, 0

    # -- IPIs with interrupts on
    li s3, 1
ping_next:
    bge s3, s2, pinged
    la t0, ping_target
    sd s3, 0(t0)
    run_all pingpong
    addi s3, s3, 1
    j ping_next
pinged:
    load a0, pings
    addi s4, s2, -1
    li t0, PINGS
    mul s4, s4, t0
    expect_equal "IPIs, one for one", a0, s4

    # -- stop and start again
    li s5, 10
restart:
    li s3, 1
restart_next:
    bge s3, s2, restarted
    slli s6, s3, 3
    la t1, commands
    add t1, t1, s6
    la t0, stop_me
    sd t0, 0(t1)
    fence
    mv a0, s3
    call poke
1:  la t1, hart_ids
    add t1, t1, s6
    ld a0, 0(t1)
    sbi EXT_HSM, 2
    li t0, 1
    bne a1, t0, 1b
    la t1, commands
    add t1, t1, s6
    sd zero, 0(t1)
    la t1, hello
    add t1, t1, s6
    sd zero, 0(t1)
    la t1, hart_ids
    add t1, t1, s6
    ld a0, 0(t1)
    la a1, hart_entry
    mv a2, s3
    sbi EXT_HSM, 0
    expect "hart_start after hart_stop", a0, 0
    addi s3, s3, 1
    j restart_next
restarted:
    run_all say_hello
    addi s5, s5, -1
    bnez s5, restart
    load a0, bad_start
    expect "restarted harts start with satp = 0 and SIE = 0", a0, 0

    # -- a suspended hart says so and is woken by an IPI
    li t0, 2
    blt s2, t0, no_suspend
    la t1, commands
    la t0, suspend_me
    sd t0, 8(t1)
    fence
    li a0, 1
    call poke
1:  load t0, suspending      # a hart that idles in wfi may count as suspended
    bnez t0, 3f
    relax
    j 1b
3:
    la t1, hart_ids
    ld a0, 8(t1)
    sbi EXT_HSM, 2
    li t0, 4
    bne a1, t0, 1b
    li a1, 4
    expect "status of a suspended hart", a1, 4
    li a0, 1
    call poke
2:  la t1, commands
    ld t0, 8(t1)
    bnez t0, 2b
    load a0, suspend_result
    expect "hart_suspend returns", a0, 0
no_suspend:
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

# -- the others --------------------------------------------------------------------------------------------------
.balign 4
hart_entry:                  # a0 = hart id, a1 = its number in our list
    mv tp, a1
    csrr t0, satp
    csrr t1, sstatus
    andi t1, t1, SIE
    or t0, t0, t1
    beqz t0, 1f
    la t1, bad_start
    amoor.d zero, t0, (t1)
1:  la t0, stacks
    ld sp, 0(t0)
    li t0, STACK
    addi t1, tp, 1
    mul t0, t0, t1
    add sp, sp, t0
    la t0, hello
    slli t1, tp, 3
    add t0, t0, t1
    sd a0, 0(t0)
    li t0, FS
    csrs sstatus, t0
    la t0, count_ipi
    csrw stvec, t0
    csrwi sie, SSI
idle:
    csrci sip, SSI
    slli t1, tp, 3
    la t0, commands
    add t0, t0, t1
    ld t1, 0(t0)
    bnez t1, 1f
    wfi
    j idle
1:  jalr t1
    slli t1, tp, 3
    la t0, commands
    add t0, t0, t1
    fence
    sd zero, 0(t0)
    j idle

poke:                        # a0 = number of a hart: an IPI to it
    la t0, hart_ids
    slli a0, a0, 3
    add t0, t0, a0
    ld a1, 0(t0)
    li a0, 1
    sbi EXT_IPI, 0
    ret

on_all_harts:                # a0 = function
    addi sp, sp, -48
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    sd s2, 24(sp)
    mv s0, a0
    load s1, hart_count
    li s2, 1
1:  bge s2, s1, 2f
    la t0, commands
    slli t1, s2, 3
    add t0, t0, t1
    sd s0, 0(t0)
    fence
    mv a0, s2
    call poke
    addi s2, s2, 1
    j 1b
2:  jalr s0
    li s2, 1
3:  bge s2, s1, 5f
    la t0, commands
    slli t1, s2, 3
    add t0, t0, t1
4:  ld t1, 0(t0)
    beqz t1, 6f
    relax
    j 4b
6:  addi s2, s2, 1
    j 3b
5:  fence
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    ld s2, 24(sp)
    addi sp, sp, 48
    ret

wait_for_all:                # a barrier; t0 to t2 are lost
    la t0, generation
    ld t1, 0(t0)
    la t2, arrived
    li t0, 1
    amoadd.d.aqrl t0, t0, (t2)
    addi t0, t0, 1
    la t2, hart_count
    ld t2, 0(t2)
    bne t0, t2, 1f
    la t2, arrived
    sd zero, 0(t2)
    fence
    la t2, generation
    addi t1, t1, 1
    sd t1, 0(t2)
    fence
    ret
1:  la t0, generation
2:  ld t2, 0(t0)
    bne t2, t1, 3f
    relax
    j 2b
3:  fence
    ret

sleep:                       # 100 us, or until an IPI; returns to t4, keeps everything but t5 and t6
    addi sp, sp, -48
    sd a0, 0(sp)
    sd a1, 8(sp)
    sd a6, 16(sp)
    sd a7, 24(sp)
    rdtime a0
    li t6, 1000
    add a0, a0, t6
    sbi EXT_TIME, 0
    li t6, STI
    csrs sie, t6
    wfi
    li t6, STI
    csrc sie, t6
    li a0, -1
    sbi EXT_TIME, 0
    ld a0, 0(sp)
    ld a1, 8(sp)
    ld a6, 16(sp)
    ld a7, 24(sp)
    addi sp, sp, 48
    jr t4

say_hello:
    ret

stop_me:
    sbi EXT_HSM, 1
    j stop_me

suspend_me:
    csrci sip, SSI
    la t0, suspending
    li t1, 1
    sd t1, 0(t0)
    fence
    li a0, 0
    li a1, 0
    li a2, 0
    sbi EXT_HSM, 3
    la t0, suspend_result
    sd a0, 0(t0)
    ret

# -- tests that run on all harts at once -----------------------------------------------------------------------------
atomics:
    addi sp, sp, -16
    sd ra, 0(sp)
    barrier
    li a0, 0
    la a1, counter_w
    la a2, counter_d
    la a3, counter_lr_d
    la a4, counter_lr_w
    la a5, lock
    la a6, counter_locked
    li a7, 1
1:  amoadd.w zero, a7, (a1)
    amoadd.d t1, a7, (a2)
2:  lr.d t0, (a3)
    addi t0, t0, 1
    sc.d t1, t0, (a3)
    bnez t1, 2b
3:  lr.w.aq t0, (a4)
    addi t0, t0, 1
    sc.w.rl t1, t0, (a4)
    bnez t1, 3b
4:  amoswap.w.aq t0, a7, (a5)
    beqz t0, 5f
    relax
    j 4b
5:  ld t0, 0(a6)             # an ordinary variable under the lock
    addi t0, t0, 1
    sd t0, 0(a6)
    amoswap.w.rl zero, zero, (a5)
    la t0, maximum
    amomaxu.d t1, a0, (t0)
    addi a0, a0, 1
    li t0, ROUNDS
    blt a0, t0, 1b
    barrier
    # a token that only one may hold: whoever swaps it out must find it again
    li a0, 0
    la a1, token
    la a2, holder
1:  amoswap.d.aq t0, zero, (a1)
    beqz t0, 2f
    li t1, 1
    amoadd.d t1, t1, (a2)    # 0 if nobody else holds it
    beqz t1, 3f
    la t2, token_errors
    amoadd.d zero, a7, (t2)
3:  li t1, -1
    amoadd.d zero, t1, (a2)
    amoswap.d.rl zero, t0, (a1)
2:  addi a0, a0, 1
    li t0, 3000
    blt a0, t0, 1b
    barrier
    # word and doubleword accesses to one place
    li a0, 0
    la a1, mixed
    li a2, 4
    li a3, 1
1:  amoadd.w zero, a3, (a1)
    add a4, a1, a2
    amoadd.w zero, a3, (a4)
    slli t0, a3, 32
    addi t0, t0, 1
    amoadd.d zero, t0, (a1)
    addi a0, a0, 1
    li t0, 3000
    blt a0, t0, 1b
    barrier
    bnez tp, 2f
    load t0, hart_count
    li t1, 6000
    mul t0, t0, t1
    slli t1, t0, 32
    or t0, t0, t1
    load t1, mixed
    sub t1, t1, t0
    la t2, mixed_errors
    sd t1, 0(t2)
2:  # message passing from the boot hart: data, fence, flag
    li a0, 0
    la a1, data
    la a2, flag
    li a3, 3000
1:  addi a0, a0, 1
    bnez tp, 2f
    sd a0, 0(a1)
    fence w, w
    sd a0, 0(a2)
    j 3f
2:  ld t0, 0(a2)
    fence r, r
    ld t1, 0(a1)
    bgeu t1, t0, 3f          # data must be at least as new as the flag
    la t2, order_errors
    amoadd.d zero, a7, (t2)
3:  blt a0, a3, 1b
    barrier
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

patching:                    # the boot hart changes a function, everybody calls it
    addi sp, sp, -48
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    li s0, 0
1:  addi s0, s0, 1
    bnez tp, 2f
    la t0, patched
    slli t1, s0, 20
    li t2, 0x00000513        # li a0, s0
    or t1, t1, t2
    sw t1, 0(t0)
    fence
    fence.i
    li a0, 0
    li a1, -1
    sbi EXT_RFENCE, 0
2:  barrier
    call patched
    beq a0, s0, 3f
    la t2, patch_errors
    li t1, 1
    amoadd.d zero, t1, (t2)
3:  barrier
    li t0, PATCHES
    blt s0, t0, 1b
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    addi sp, sp, 48
    ret
.balign 64
patched:
    li a0, 0
    ret

.equ PAGE_VA, 0x40000000
make_tables:                 # gigapage for RAM; one page at PAGE_VA that is mapped anew all the time
    la t0, root
    li t1, 0x80000000 >> 12 << 10 | 0xcf
    sd t1, 16(t0)
    la t1, middle
    srli t1, t1, 2
    ori t1, t1, 1
    sd t1, 8(t0)
    la t0, middle
    la t1, leaf
    srli t1, t1, 2
    ori t1, t1, 1
    sd t1, 0(t0)
    fence
    ret

remapping:
    addi sp, sp, -48
    sd ra, 0(sp)
    sd s0, 8(sp)
    la t0, root
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    bnez tp, 1f
    la t1, leaf              # before anybody walks
    la t2, page_a
    srli t2, t2, 2
    ori t2, t2, 0xc7
    sd t2, 0(t1)
    fence
1:  barrier
    la t0, root
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
    li t0, PAGE_VA
    ld t1, 0(t0)
    li s0, 0
1:  addi s0, s0, 1
    bnez tp, 2f
    la t2, page_a
    andi t0, s0, 1
    beqz t0, 3f
    la t2, page_b
3:  sd s0, 0(t2)
    srli t2, t2, 2
    ori t2, t2, 0xc7
    la t1, leaf
    sd t2, 0(t1)
    fence
    li t0, PAGE_VA
    sfence.vma t0
    li a0, 0
    li a1, -1
    li a2, PAGE_VA
    li a3, 4096
    sbi EXT_RFENCE, 1
2:  barrier
    li t0, PAGE_VA
    ld a0, 0(t0)
    beq a0, s0, 3f
    la t2, map_errors
    li t1, 1
    amoadd.d zero, t1, (t2)
3:  barrier
    li t0, PATCHES
    blt s0, t0, 1b
    csrw satp, zero
    sfence.vma
    ld ra, 0(sp)
    ld s0, 8(sp)
    addi sp, sp, 48
    ret

pingpong:                    # the boot hart sends IPIs to one hart, which answers each from its trap handler
    load t0, ping_target
    beqz tp, 1f
    beq tp, t0, 3f
    ret
1:  addi sp, sp, -32
    sd ra, 0(sp)
    sd s0, 8(sp)
    sd s1, 16(sp)
    li s0, 0
    csrci sstatus, SIE
    csrwi sie, SSI
7:  load t0, ready           # its idle loop would swallow an IPI that comes too early
    bnez t0, 2f
    relax
    j 7b
2:  la t0, pong
    sd zero, 0(t0)
    la t0, ping
    li t1, 1
    amoswap.d zero, t1, (t0)
    load a0, ping_target
    call poke
4:  csrci sip, SSI
    load t0, pong
    bnez t0, 5f
    wfi
    j 4b
5:  addi s0, s0, 1
    li t0, PINGS
    blt s0, t0, 2b
    csrci sip, SSI
    csrwi sie, 0
    la t0, ready
    sd zero, 0(t0)
    ld ra, 0(sp)
    ld s0, 8(sp)
    ld s1, 16(sp)
    addi sp, sp, 32
    ret
3:  la t0, ready
    li t1, 1
    sd t1, 0(t0)
    load s0, pings           # until PINGS more of them have come
    li t0, PINGS
    add s0, s0, t0
    csrsi sstatus, SIE
6:  load t0, pings
    blt t0, s0, 6b
    csrci sstatus, SIE
    ret

.balign 4
count_ipi:                   # interrupted code keeps all registers
    addi sp, sp, -64
    sd t0, 0(sp)
    sd t1, 8(sp)
    sd a0, 16(sp)
    sd a1, 24(sp)
    sd a6, 32(sp)
    sd a7, 40(sp)
    csrr t0, scause
    bltz t0, 1f
    j unexpected
1:  csrci sip, SSI
    la t0, ping
    amoswap.d t1, zero, (t0)
    beqz t1, 2f              # late news of a command
    la t0, pings
    ld t1, 0(t0)
    addi t1, t1, 1
    sd t1, 0(t0)
    la t0, pong
    sd t1, 0(t0)
    fence
    la t0, boot_hart
    ld a1, 0(t0)
    li a0, 1
    sbi EXT_IPI, 0
2:  ld t0, 0(sp)
    ld t1, 8(sp)
    ld a0, 16(sp)
    ld a1, 24(sp)
    ld a6, 32(sp)
    ld a7, 40(sp)
    addi sp, sp, 64
    sret

    .balign 64
hart_count: .dword 0
generation: .dword 0
bad_start: .dword 0
ping_target: .dword 0
pings: .dword 0
ready: .dword 0
ping: .dword 0
pong: .dword 0
suspend_result: .dword -1
suspending: .dword 0
    .balign 64
arrived: .dword 0
    .balign 64
hart_ids: .zero 8 * MAX_HARTS
hello: .zero 8 * MAX_HARTS
commands: .zero 8 * MAX_HARTS
counter_w: .dword 0
counter_d: .dword 0
counter_lr_d: .dword 0
counter_lr_w: .dword 0
counter_locked: .dword 0
maximum: .dword 0
lock: .dword 0
token: .dword 7
holder: .dword 0
mixed: .dword 0
token_errors: .dword 0
mixed_errors: .dword 0
order_errors: .dword 0
patch_errors: .dword 0
map_errors: .dword 0
    .balign 64
data: .dword 0
    .balign 64
flag: .dword 0
    .balign 4096
root: .zero 4096
middle: .zero 4096
leaf: .zero 4096
page_a: .zero 4096
page_b: .zero 4096
end_of_image:
