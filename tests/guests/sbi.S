# The SBI as KVM presents it: every function of BASE, TIME, IPI, RFENCE, HSM, SRST and DBCN with good and bad arguments.
# STRICT = 1 also checks what is KVM's choice and not the specification's (OpenSBI differs there).

main:
    addi sp, sp, -16
    sd ra, 0(sp)

    # BASE
    sbi EXT_BASE, 0
    expect "base: spec version, error", a0, 0
    srli a2, a1, 24
    snez a2, a2
    expect "base: spec version is 0.2 or later", a2, 1
.if STRICT
    expect "base: spec version 2.0", a1, 0x2000000
.endif
    sbi EXT_BASE, 1
    expect "base: implementation id, error", a0, 0
.if STRICT
    expect "base: implementation id is KVM's", a1, 3
.endif
    sbi EXT_BASE, 2
    expect "base: implementation version, error", a0, 0
    .macro probe name, extension, answer
    li a0, \extension
    li a1, 77
    sbi EXT_BASE, 3
    expect \name, a0, 0
    snez a1, a1
    expect \name, a1, \answer
    .endm
    probe "probe BASE", EXT_BASE, 1
    probe "probe TIME", EXT_TIME, 1
    probe "probe IPI", EXT_IPI, 1
    probe "probe RFENCE", EXT_RFENCE, 1
    probe "probe HSM", EXT_HSM, 1
    probe "probe SRST", EXT_SRST, 1
.if STRICT
    probe "probe DBCN", EXT_DBCN, 1
    probe "probe SUSP", 0x53555350, 0
    probe "probe legacy set_timer", 0, 0
    probe "probe legacy putchar", 1, 0
.endif
    probe "probe FWFT", 0x46574654, 0
    probe "probe SSE", 0x535345, 0
    probe "probe an unknown extension", 0x0A123456, 0
    sbi EXT_BASE, 4
    expect "base: mvendorid, error", a0, 0
    sbi EXT_BASE, 5
    expect "base: marchid, error", a0, 0
    sbi EXT_BASE, 6
    expect "base: mimpid, error", a0, 0
    sbi EXT_BASE, 7
    expect "base: unknown function", a0, SBI_NOT_SUPPORTED
    sbi 0x0A123456, 0
    expect "unknown extension", a0, SBI_NOT_SUPPORTED
    # registers other than a0 and a1 are preserved (SBI 3)
    li a2, 0x22
    li a3, 0x33
    li a4, 0x44
    li a5, 0x55
    li t0, 0x66
    li s2, 0x77
    sbi EXT_BASE, 0
    expect "an ecall keeps a2", a2, 0x22
    expect "an ecall keeps a3", a3, 0x33
    expect "an ecall keeps a4", a4, 0x44
    expect "an ecall keeps a5", a5, 0x55
    expect "an ecall keeps a7", a7, EXT_BASE
    expect "an ecall keeps a6", a6, 0
    expect "an ecall keeps t0", t0, 0x66
    expect "an ecall keeps s2", s2, 0x77

    # TIME: set_timer in the past makes STIP pending, in the future not
    rdtime a0
    sbi EXT_TIME, 0
    expect "set_timer(now)", a0, 0
    li s2, 1000000
1:  csrr s3, sip
    andi s3, s3, STI
    bnez s3, 2f
    addi s2, s2, -1
    bnez s2, 1b
2:  expect "STIP is pending after set_timer(now)", s3, STI
    li a0, -1
    sbi EXT_TIME, 0
    expect "set_timer(never)", a0, 0
    csrr s3, sip
    andi s3, s3, STI
    expect "STIP is clear after set_timer(never)", s3, 0
    sbi EXT_TIME, 1
    expect "time: unknown function", a0, SBI_NOT_SUPPORTED

    # IPI to oneself
    la t0, boot_hart
    ld s4, 0(t0)
    li a0, 1
    mv a1, s4
    sbi EXT_IPI, 0
    expect "send_ipi to oneself", a0, 0
    li s2, 1000000
1:  csrr s3, sip
    andi s3, s3, SSI
    bnez s3, 2f
    addi s2, s2, -1
    bnez s2, 1b
2:  expect "SSIP is pending", s3, SSI
    csrci sip, SSI
    csrr s3, sip
    andi s3, s3, SSI
    expect "SSIP is cleared by the guest", s3, 0
    li a0, 0
    li a1, -1
    sbi EXT_IPI, 0
    expect "send_ipi to all harts", a0, 0
    li s2, 1000000
1:  csrr s3, sip
    andi s3, s3, SSI
    bnez s3, 2f
    addi s2, s2, -1
    bnez s2, 1b
2:  expect "SSIP is pending after an IPI to all", s3, SSI
    csrci sip, SSI
    li a0, 0
    li a1, 0
    sbi EXT_IPI, 0
    expect "send_ipi to nobody", a0, 0
.if STRICT
    li a0, 1
    li a1, 900
    sbi EXT_IPI, 0
    expect "send_ipi to a hart that is not there", a0, SBI_INVALID_PARAM
.endif
    sbi EXT_IPI, 1
    expect "ipi: unknown function", a0, SBI_NOT_SUPPORTED

    # RFENCE
    .macro fence name, function, mask, base, start, size, asid, answer
    li a0, \mask
    li a1, \base
    li a2, \start
    li a3, \size
    li a4, \asid
    sbi EXT_RFENCE, \function
    expect \name, a0, \answer
    .endm
    fence "remote fence.i, all", 0, 0, -1, 0, 0, 0, 0
    fence "remote sfence.vma, everything", 1, 0, -1, 0, 0, 0, 0
    fence "remote sfence.vma, size -1", 1, 0, -1, 0, -1, 0, 0
    fence "remote sfence.vma, range", 1, 0, -1, 0x1000, 0x3000, 0, 0
    fence "remote sfence.vma.asid, range", 2, 0, -1, 0x1000, 0x3000, 5, 0
    fence "remote sfence.vma.asid, everything", 2, 0, -1, 0, -1, 5, 0
.if STRICT
    fence "remote hfence.gvma.vmid", 3, 0, -1, 0, 0, 0, SBI_NOT_SUPPORTED
    fence "remote hfence.gvma", 4, 0, -1, 0, 0, 0, SBI_NOT_SUPPORTED
    fence "remote hfence.vvma.asid", 5, 0, -1, 0, 0, 0, SBI_NOT_SUPPORTED
    fence "remote hfence.vvma", 6, 0, -1, 0, 0, 0, SBI_NOT_SUPPORTED
    fence "remote fence.i, nobody there", 0, 1, 900, 0, 0, 0, SBI_INVALID_PARAM
.endif
    fence "rfence: unknown function", 7, 0, -1, 0, 0, 0, SBI_NOT_SUPPORTED

    # HSM
    mv a0, s4
    sbi EXT_HSM, 2
    expect "hart_get_status of oneself, error", a0, 0
    expect "hart_get_status of oneself: started", a1, 0
    li a0, 900
    sbi EXT_HSM, 2
    expect "hart_get_status of no hart", a0, SBI_INVALID_PARAM
    mv a0, s4
    la a1, _start
    li a2, 0
    sbi EXT_HSM, 0
    expect "hart_start of a running hart", a0, SBI_ALREADY_AVAILABLE
    li a0, 900
    la a1, _start
    sbi EXT_HSM, 0
    expect "hart_start of no hart", a0, SBI_INVALID_PARAM
    li a0, 0x7fffffff
    li a1, 0
    li a2, 0
    sbi EXT_HSM, 3
    expect "hart_suspend of a reserved type", a0, SUSPEND_RESERVED
    sbi EXT_HSM, 9
    expect "hsm: unknown function", a0, SBI_NOT_SUPPORTED
    # a retentive suspend comes back when an enabled interrupt is pending, with a0 = 0
    csrsi sip, SSI
    csrsi sie, SSI
    li a0, 0
    li a1, 0
    li a2, 0
    sbi EXT_HSM, 3
    expect "retentive hart_suspend", a0, 0
    csrci sie, SSI
    csrci sip, SSI

    # SRST: what does not reset
    li a0, 3
    li a1, 0
    sbi EXT_SRST, 0
    expect "system_reset of a reserved type", a0, SRST_RESERVED
    sbi EXT_SRST, 1
    expect "srst: unknown function", a0, SBI_NOT_SUPPORTED

    # DBCN
    la t0, has_dbcn
    ld t0, 0(t0)
    beqz t0, no_console
    li a0, 0x2e
    sbi EXT_DBCN, 2
    expect "console_write_byte", a0, 0
    li a0, 0
    la a1, newline
    li a2, 0
    sbi EXT_DBCN, 0
    expect "console_write of nothing, error", a0, 0
    expect "console_write of nothing", a1, 0
    li a0, 1
    la a1, newline
    li a2, 0
    sbi EXT_DBCN, 0
    expect "console_write, error", a0, 0
    expect "console_write", a1, 1
    li a0, 1
    li a1, 0x1000
    li a2, 5
    sbi EXT_DBCN, 0
    expect "console_write from where no memory is", a0, SBI_INVALID_PARAM
    li a0, 1
    la a1, passed
    li a2, 7
    sbi EXT_DBCN, 1
    expect "console_read to where no memory is", a0, SBI_INVALID_PARAM
    li a0, 4
    la a1, scratch
    li a2, 0
    sbi EXT_DBCN, 1
    expect "console_read with no input, error", a0, 0
    expect "console_read with no input", a1, 0
    sbi EXT_DBCN, 3
    expect "dbcn: unknown function", a0, SBI_NOT_SUPPORTED
no_console:
    ld ra, 0(sp)
    addi sp, sp, 16
    ret

    .balign 8
scratch: .dword 0
end_of_image:
