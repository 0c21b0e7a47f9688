# The machine as QEMU's virt has it, addresses and all, driven without a device tree: UART, PLIC, RTC, a virtio disk in
# slot 0, the test device. CONTEXT is hart 0's S-mode context of the PLIC. The disk: 64 sectors, sector n filled with n.

.equ UART, 0x10000000
.equ UART_IRQ, 10
.equ PLIC, 0x0c000000
.equ RTC, 0x00101000
.equ VIRTIO, 0x10001000
.equ VIRTIO_IRQ, 1
.equ QUEUE, 8

.macro load register, symbol
    la \register, \symbol
    ld \register, 0(\register)
.endm

main:
    addi sp, sp, -16
    sd ra, 0(sp)
    # -- PLIC: registers hold what they should
    li s0, PLIC
    li t0, 7
    sw t0, UART_IRQ*4(s0)
    lwu a0, UART_IRQ*4(s0)
    expect "plic: priority reads back", a0, 7
    lwu a0, 0(s0)
    expect "plic: source 0 has no priority", a0, 0
    li s1, PLIC + 0x2000 + CONTEXT * 0x80
    li t0, 1 << UART_IRQ | 1 << VIRTIO_IRQ
    sw t0, 0(s1)
    lwu a0, 0(s1)
    expect_equal "plic: enable reads back", a0, t0
    li s2, PLIC + 0x200000 + CONTEXT * 0x1000
    sw zero, 0(s2)
    lwu a0, 4(s2)
    expect "plic: nothing to claim", a0, 0
    # -- UART: THR empty interrupt through the PLIC
    li s3, UART
    sb zero, 1(s3)
    li t0, 0x80              # DLAB: divisor
    sb t0, 3(s3)
    li t0, 3
    sb t0, 0(s3)
    sb zero, 1(s3)
    sb t0, 3(s3)             # 8 bits
    li t0, 7
    sb t0, 2(s3)             # FIFOs on and empty
    lbu a0, 5(s3)
    andi a0, a0, 0x60
    expect "uart: transmitter empty", a0, 0x60
    li t0, SEI
    csrs sie, t0
    csrr a0, sip
    andi a0, a0, SEI
    expect "no external interrupt yet", a0, 0
    li t0, 2
    sb t0, 1(s3)             # interrupt when THR is empty
    li t1, 10000000
1:  csrr a0, sip
    andi a0, a0, SEI
    bnez a0, 2f
    addi t1, t1, -1
    bnez t1, 1b
2:  expect "uart: external interrupt", a0, SEI
    lwu a0, 4(s2)
    expect "uart: claim", a0, UART_IRQ
    lwu a1, 4(s2)
    expect "a second claim gets nothing", a1, 0
    csrr a1, sip
    andi a1, a1, SEI
    expect "claimed: SEIP is low", a1, 0
    lbu a0, 2(s3)
    andi a0, a0, 15
    expect "uart: IIR says THR empty", a0, 2
    sb zero, 1(s3)
    li t0, UART_IRQ
    sw t0, 4(s2)             # complete
    # text by polling
    la s4, text
3:  lbu a0, 0(s4)
    beqz a0, 5f
4:  lbu t0, 5(s3)
    andi t0, t0, 0x20
    beqz t0, 4b
    sb a0, 0(s3)
    addi s4, s4, 1
    j 3b
5:
    # -- RTC: nanoseconds since 1970, going on
    li s5, RTC
    lwu a0, 0(s5)
    lwu a1, 4(s5)
    slli a1, a1, 32
    or s6, a0, a1
    li t0, 1700000000000000000
    sltu a0, t0, s6
    expect "rtc: it is later than 2023", a0, 1
    rdtime t0
    li t1, 100000
    add t0, t0, t1
6:  rdtime t1
    bltu t1, t0, 6b
    lwu a0, 0(s5)
    lwu a1, 4(s5)
    slli a1, a1, 32
    or a0, a0, a1
    sub a0, a0, s6
    li t0, 9000000
    sltu a1, a0, t0
    expect "rtc: 10 ms later", a1, 0
    # -- virtio disk, as xv6 drives it
    li s0, VIRTIO
    lwu a0, 0(s0)
    expect "virtio: magic", a0, 0x74726976
    lwu a0, 4(s0)
    expect "virtio: version", a0, 2
    lwu a0, 8(s0)
    expect "virtio: a disk", a0, 2
    lwu a0, 12(s0)
    expect "virtio: QEMU's vendor", a0, 0x554d4551
    sw zero, 0x70(s0)        # reset
    lwu a0, 0x70(s0)
    expect "virtio: status after reset", a0, 0
    li t0, 1
    sw t0, 0x70(s0)
    li t0, 3
    sw t0, 0x70(s0)
    li t0, 1
    sw t0, 0x14(s0)
    lwu t1, 0x10(s0)
    andi t1, t1, 1
    expect "virtio: offers VERSION_1", t1, 1
    sw zero, 0x14(s0)        # features, low half: what is offered but for RO, SCSI, CONFIG_WCE, MQ, ANY_LAYOUT and the rings'
    lwu t1, 0x10(s0)
    andi s7, t1, 1 << 9      # FLUSH
    li t0, 1 << 5 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 27 | 1 << 28 | 1 << 29
    not t0, t0
    and t1, t1, t0
    sw t1, 0x20(s0)          # the high half, with VERSION_1, is never written
    li t0, 11
    sw t0, 0x70(s0)
    lwu a0, 0x70(s0)
    expect "virtio: FEATURES_OK stays", a0, 11
    sw zero, 0x30(s0)        # queue 0
    lwu a0, 0x44(s0)
    expect "virtio: queue not ready", a0, 0
    lwu a0, 0x34(s0)
    sltiu a0, a0, QUEUE
    expect "virtio: queue is big enough", a0, 0
    li t0, QUEUE
    sw t0, 0x38(s0)
    la t0, descriptors
    sw t0, 0x80(s0)
    srli t1, t0, 32
    sw t1, 0x84(s0)
    la t0, available
    sw t0, 0x90(s0)
    srli t1, t0, 32
    sw t1, 0x94(s0)
    la t0, used
    sw t0, 0xa0(s0)
    srli t1, t0, 32
    sw t1, 0xa4(s0)
    li t0, 1
    sw t0, 0x44(s0)
    li t0, 15
    sw t0, 0x70(s0)
    lwu a0, 0x100(s0)
    lwu a1, 0x104(s0)
    expect "disk: capacity", a0, 64
    expect "disk: capacity, upper half", a1, 0
    li t0, 1
    li t1, PLIC
    sw t0, VIRTIO_IRQ*4(t1)
    # read sector 5, twice over
    li a0, 0
    li a1, 5
    call request
    expect "disk: read", a0, 0
    la t0, buffer
    ld a0, 0(t0)
    expect "disk: sector 5, first bytes", a0, 0x0505050505050505
    ld a0, 504(t0)
    expect "disk: sector 5, last bytes", a0, 0x0505050505050505
    # write sector 9, read it back, and its neighbours
    la t0, buffer
    li t1, 512
1:  addi t1, t1, -8
    add t2, t0, t1
    sd t1, 0(t2)
    bnez t1, 1b
    li a0, 1
    li a1, 9
    call request
    expect "disk: write", a0, 0
    beqz s7, 2f
    li a0, 4
    li a1, 0
    call request
    expect "disk: flush", a0, 0
2:  li a0, 0
    li a1, 10
    call request
    la t0, buffer
    ld a0, 0(t0)
    expect "disk: the sector behind is untouched", a0, 0x0a0a0a0a0a0a0a0a
    li a0, 0
    li a1, 9
    call request
    la t0, buffer
    ld a0, 504(t0)
    expect "disk: what was written", a0, 504
    li a0, 0
    li a1, 64
    call request
    expect "disk: a read behind the end fails", a0, 1
    li a0, 99
    li a1, 0
    call request
    expect "disk: an unknown request", a0, 2
    # many, so that indices wrap
    li s8, 300
    li s9, 0
3:  li a0, 0
    andi a1, s8, 7
    call request
    add s9, s9, a0
    la t0, buffer
    lbu t0, 17(t0)
    andi t1, s8, 7
    sub t0, t0, t1
    snez t0, t0
    add s9, s9, t0
    addi s8, s8, -1
    bnez s8, 3b
    expect "disk: 300 reads", s9, 0
    load a0, interrupts
    sltiu a0, a0, 300
    expect "disk: an interrupt for each", a0, 0
    li t0, SEI
    csrc sie, t0
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

request:                     # a0 = type, a1 = sector: one request, its status; waits in wfi for the interrupt
    la t0, header
    sw a0, 0(t0)
    sw zero, 4(t0)
    sd a1, 8(t0)
    la t1, descriptors
    sd t0, 0(t1)
    li t2, 16
    sw t2, 8(t1)
    li t2, 1 << 16 | 1       # next = 1
    sw t2, 12(t1)
    la t0, buffer
    sd t0, 16(t1)
    li t2, 512
    sw t2, 24(t1)
    li t2, 2 << 16 | 3       # the device writes
    li t3, 1
    bne a0, t3, 1f
    li t2, 2 << 16 | 1       # it reads
1:  sw t2, 28(t1)
    la t0, status
    li t2, 255
    sb t2, 0(t0)
    sd t0, 32(t1)
    li t2, 1
    sw t2, 40(t1)
    li t2, 2
    sw t2, 44(t1)
    li t3, 4
    bne a0, t3, 2f
    li t2, 2 << 16 | 1       # a flush has no data
    sw t2, 12(t1)
2:  la t0, available
    lhu t1, 2(t0)
    andi t2, t1, QUEUE - 1
    slli t2, t2, 1
    add t2, t2, t0
    sh zero, 4(t2)
    fence
    addi t1, t1, 1
    sh t1, 2(t0)
    fence
    li t0, VIRTIO
    sw zero, 0x50(t0)
3:  wfi
    csrr t0, sip
    andi t0, t0, SEI
    beqz t0, 3b
    li t0, PLIC + 0x200000 + CONTEXT * 0x1000
    lwu t1, 4(t0)
    beqz t1, 3b
    li t2, VIRTIO_IRQ
    bne t1, t2, 3b
    li t2, VIRTIO
    lwu t3, 0x60(t2)
    sw t3, 0x64(t2)
    sw t1, 4(t0)
    la t2, interrupts
    ld t3, 0(t2)
    addi t3, t3, 1
    sd t3, 0(t2)
    fence
    la t0, used
    la t1, available
    lhu t0, 2(t0)
    lhu t1, 2(t1)
    bne t0, t1, 3b
    la t0, status
    lbu a0, 0(t0)
    ret

text: .asciz "text by the UART\n"
    .balign 16
descriptors: .zero 16 * QUEUE
available: .zero 6 + 2 * QUEUE
    .balign 4
used: .zero 6 + 8 * QUEUE
    .balign 8
header: .zero 16
interrupts: .dword 0
status: .byte 0
    .balign 512
buffer: .zero 512
end_of_image:
