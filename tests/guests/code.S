# Self-modifying code and fence.i: patches, generated code, moved code, other instruction lengths, other pages, aliases.

.equ N, 300

.macro emit word             # the next word of generated code; t0 = where
    li t1, \word
    sw t1, 0(t0)
    addi t0, t0, 4
.endm

main:
    addi sp, sp, -64
    sd ra, 0(sp)
    # -- one instruction, patched again and again
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    la t0, target
    slli t1, s0, 20
    ori t1, t1, 0x513        # li a0, s0
    sw t1, 0(t0)
    fence.i
    call target
    beq a0, s0, 2f
    addi s1, s1, 1
2:  li t0, N
    blt s0, t0, 1b
    expect "a patched instruction", s1, 0
    # -- patched by bytes, in the immediate only
    la s2, target
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    slli t1, s0, 4
    sb t1, 2(s2)
    srli t1, s0, 4
    sb t1, 3(s2)
    fence.i
    call target
    beq a0, s0, 2f
    addi s1, s1, 1
2:  li t0, N
    blt s0, t0, 1b
    expect "an instruction patched byte by byte", s1, 0
    # -- a loop that patches its own body while it runs
    li s0, 0
    li s1, 0
    la s2, body
1:  addi s0, s0, 1
    slli t1, s0, 20
    li t2, 0x593             # li a1, s0
    or t1, t1, t2
    sw t1, 0(s2)
    fence.i
body:
    li a1, 0
    beq a1, s0, 2f
    addi s1, s1, 1
2:  li t0, N
    blt s0, t0, 1b
    expect "a loop that patches its body", s1, 0
    # -- one 4-byte instruction becomes two of 2 bytes, and back
    li s0, 0
    li s1, 0
    la s2, target
1:  addi s0, s0, 1
    li t1, 0x00700513        # li a0, 7
    sw t1, 0(s2)
    fence.i
    call target
    addi a0, a0, -7
    snez a0, a0
    add s1, s1, a0
    li t1, 0x050d4505        # c.li a0, 1; c.addi a0, 3
    sw t1, 0(s2)
    fence.i
    call target
    addi a0, a0, -4
    snez a0, a0
    add s1, s1, a0
    li t0, N
    blt s0, t0, 1b
    expect "instructions change their length", s1, 0
    # -- entered in the middle: other instructions than from the start
    li t1, 0x45154505        # c.li a0, 1; c.li a0, 5
    sw t1, 0(s2)
    fence.i
    la t0, target
    addi t0, t0, 2
    jalr t0
    expect "entered in the middle", a0, 5
    li t1, 0x00c00513        # li a0, 12, whose upper half is c.addi4spn a2, sp, ..
    sw t1, 0(s2)
    fence.i
    call target
    expect "and then as a whole", a0, 12
    # -- an instruction across two pages, each half patched
    la s2, crossing
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    slli t1, s0, 20
    ori t1, t1, 0x513
    srli t2, t1, 16
    sh t2, 2(s2)             # upper half: on the second page
    fence.i
    call crossing
    beq a0, s0, 2f
    addi s1, s1, 1
2:  li t0, N
    blt s0, t0, 1b
    expect "an instruction across pages, upper half patched", s1, 0
    li t1, 0x0593            # lower half: li a1
    sh t1, 0(s2)
    fence.i
    li a1, 0
    call crossing
    expect "an instruction across pages, lower half patched", a1, N
    # -- generated functions in fresh memory, page after page
    la s2, end_of_image
    li t0, 0x100000
    add s2, s2, t0
    li t0, -4096
    and s2, s2, t0
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    mv t0, s2
    slli t2, s0, 20
    ori t2, t2, 0x513
    sw t2, 0(t0)             # li a0, s0
    addi t0, t0, 4
    emit 0x00150513          # addi a0, a0, 1
    emit 0x00008067          # ret
    fence.i
    jalr s2
    addi a0, a0, -1
    beq a0, s0, 2f
    addi s1, s1, 1
2:  li t0, 4096
    add s2, s2, t0
    li t0, 100
    blt s0, t0, 1b
    expect "generated code in fresh pages", s1, 0
    # -- the same pages again, other code
    li s0, 0
    li s1, 0
    li t0, -409600
    add s2, s2, t0
1:  addi s0, s0, 1
    mv t0, s2
    slli t2, s0, 20
    ori t2, t2, 0x513
    sw t2, 0(t0)
    addi t0, t0, 4
    emit 0x40a00533          # neg a0, a0
    emit 0x00008067
    fence.i
    jalr s2
    add a0, a0, s0
    beqz a0, 2f
    addi s1, s1, 1
2:  li t0, 4096
    add s2, s2, t0
    li t0, 100
    blt s0, t0, 1b
    expect "other code in used pages", s1, 0
    # -- a function is copied to many places and called there
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    la t0, triple
    la t1, triple_end
    slli t2, s0, 1
    add t2, t2, s2           # every 2 bytes
    mv s3, t2
2:  lhu t3, 0(t0)
    sh t3, 0(t2)
    addi t0, t0, 2
    addi t2, t2, 2
    blt t0, t1, 2b
    fence.i
    mv a0, s0
    jalr s3
    slli t0, s0, 1
    add t0, t0, s0
    beq a0, t0, 3f
    addi s1, s1, 1
3:  li t0, N
    blt s0, t0, 1b
    expect "a function copied over itself, 2 bytes further each time", s1, 0
    # -- code patched through another virtual address
    la t0, root
    li t1, 0x80000000 >> 12 << 10 | 0xcf
    sd t1, 16(t0)            # 0x80000000: itself
    sd t1, 24(t0)            # 0xc0000000: the same
    srli t0, t0, 12
    li t1, 8 << 60
    or t0, t0, t1
    csrw satp, t0
    sfence.vma
    li s0, 0
    li s1, 0
    la s2, target
    li t0, 0x40000000
    add s2, s2, t0
1:  addi s0, s0, 1
    slli t1, s0, 20
    ori t1, t1, 0x513
    sw t1, 0(s2)
    fence.i
    call target
    beq a0, s0, 2f
    addi s1, s1, 1
2:  slli t1, s0, 20
    ori t1, t1, 0x513
    li t2, 0x100000
    add t1, t1, t2
    la t0, target
    sw t1, 0(t0)
    fence.i
    jalr s2                  # called at the other address
    addi a0, a0, -1
    beq a0, s0, 3f
    addi s1, s1, 1
3:  li t0, N
    blt s0, t0, 1b
    csrw satp, zero
    sfence.vma
    expect "code patched and called through aliases", s1, 0
    # -- beyond the ISA: without ASIDs, sfence.vma does for code too (teaching kernels know no fence.i)
    la t0, root
    srli t0, t0, 12
    li t1, 8 << 60
    or s3, t0, t1
    la s2, target
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    slli t1, s0, 20
    ori t1, t1, 0x513
    sw t1, 0(s2)
    sfence.vma
    csrw satp, s3
    sfence.vma
    call target
    beq a0, s0, 2f
    addi s1, s1, 1
2:  csrw satp, zero
    sfence.vma
    li t0, N
    blt s0, t0, 1b
    expect "code loaded and entered by sfence.vma alone", s1, 0
    # -- without fence.i, old or new may run, but nothing else
    la s2, target
    li t1, 0x00100513
    sw t1, 0(s2)
    fence.i
    li s0, 0
    li s1, 0
1:  addi s0, s0, 1
    andi t1, s0, 1
    addi t1, t1, 1
    slli t1, t1, 20
    ori t1, t1, 0x513
    sw t1, 0(s2)
    call target
    addi a0, a0, -1
    sltiu a0, a0, 2
    xori a0, a0, 1
    add s1, s1, a0
    li t0, N
    blt s0, t0, 1b
    expect "without fence.i: old or new", s1, 0
    ld ra, 0(sp)
    addi sp, sp, 64
    ret

triple:
    add t0, a0, a0
    c.add a0, t0
    ret
triple_end:

    .balign 64
target:
    li a0, 0
    ret
    .balign 4096
    .zero 4094
crossing:
    li a0, 0
    ret
    .balign 4096
root: .zero 4096
end_of_image:
