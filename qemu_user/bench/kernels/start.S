# The guest of `softkvm bench`: a flat kernel at 0x80200000 in S-mode. Sv39 on, 1 GiB pages one to one, report to the UART.
# The word at `group` (offset 64) is a number, patched by the host: 0 cpu, 1 fp, 2 mmu; the next one the budget in ticks.
.option norelax
.globl _start
_start:
    .option norvc
    j begin
    .option rvc
    .balign 4
    .word 0
    .dword 0x200000          # text_offset: what loaders of RISC-V Images look at
    .dword 0x100000
    .dword 0
    .word 2, 0
    .dword 0
    .dword 0x5643534952
    .word 0x05435352, 0
group:
    .dword 0
budget:
    .dword 8000000
begin:
    la sp, stack_end
    li t0, 0x42000           # FS initial, SUM
    csrs sstatus, t0
    la t0, trap
    csrw stvec, t0
    la t0, root
    li t1, 0xcf
    li t2, 0x10000000
    li t3, 4
1:  sd t1, 0(t0)
    add t1, t1, t2
    addi t0, t0, 8
    addi t3, t3, -1
    bnez t3, 1b
    la t0, root
    srli t1, t0, 12
    li t2, 8 << 60
    or t1, t1, t2
    sfence.vma
    csrw satp, t1
    sfence.vma
    la t0, group
    ld a0, 0(t0)
    ld a1, 8(t0)
    call guest_main
    li t0, 0x100000          # the test device: power off
    li t1, 0x5555
    sw t1, 0(t0)
    j .

.globl page_table
page_table:
    la a0, root
    ret

.globl set_fault_page
set_fault_page:
    la t0, fault
    sd a0, 0(t0)
    sd a1, 8(t0)
    ret

# call_user(rounds): into U-mode, where an ecall is made `rounds` times
.globl call_user
call_user:
    la t0, saved
    sd ra, 0(t0)
    sd sp, 8(t0)
    li a1, 0
    la t0, user
    li t1, 2 << 30           # the same code, by a window that U-mode may use: root entry 20
    sub t0, t0, t1
    li t1, 20 << 30
    add t0, t0, t1
    csrw sepc, t0
    la t1, root
    ld t2, 16(t1)
    ori t2, t2, 0x10
    sd t2, 160(t1)
    sfence.vma
    li t0, 0x100
    csrc sstatus, t0
    sret
user:
    li a7, 1
1:  ecall
    addi a0, a0, -1
    bnez a0, 1b
    li a7, 0
    ecall
    j .

.balign 4
trap:
    csrrw t6, sscratch, t6
    csrr t6, scause
    addi t6, t6, -8
    bnez t6, 2f
    beqz a7, 1f              # an ecall of U: counted
    addi a1, a1, 1
    csrr t6, sepc
    addi t6, t6, 4
    csrw sepc, t6
    csrrw t6, sscratch, t6
    sret
1:  la t0, saved             # the last one: back to call_user's caller
    ld ra, 0(t0)
    ld sp, 8(t0)
    mv a0, a1
    ret
2:  addi t6, t6, 8 - 15      # a store's page fault: the page comes
    bnez t6, 3f
    csrw sscratch, t5
    la t6, fault
    ld t5, 8(t6)
    ld t6, 0(t6)
    sd t5, 0(t6)
    csrr t5, sscratch
    sret
3:  li t0, 0x100000          # anything else is a mistake
    li t1, 0x3333
    sw t1, 0(t0)
    j .

.section .bss
.balign 4096
root: .zero 4096
saved: .zero 16
fault: .zero 16
.balign 16
    .zero 65536
stack_end:
