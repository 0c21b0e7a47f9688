"""Guest code on vCPU threads: SBI between harts, AIA, dirty tracking, holes, power (KVM_ABI 1.5 to 2.1).

Each test assembles a few instructions; results are read from RAM or registers.
"""

from __future__ import annotations

import os
import threading
import time
from errno import EFAULT, EINTR

import pytest

from protocol.abi import run_page, structs
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.abi.structs_riscv import AiaConfig, AiaGroup
from protocol.channel.shared_memory import Mapping
from tests.framework.asm import assemble

POINTEE = 0x7001_0000  # where conftest puts pointees
HVA, GPA, SIZE = 0x10_0000_0000, 0x8000_0000, 0x40_0000
DATA = GPA + 0x10_0000
DEVICE = 0x1000_0000
APLIC, IMSIC = 0x0D00_0000, 0x2800_0000
SBI = """
    .macro sbi eid, fid
    li a7, \\eid
    li a6, \\fid
    ecall
    .endm
    .equ HSM, 0x48534d
    .equ IPI, 0x735049
    .equ RFENCE, 0x52464e43
    .equ TIME, 0x54494d45
    .equ DEVICE, 0x10000000
    .equ DATA, 0x80100000
"""


class Machine:
    """A VM with RAM and vCPUs; run(index) is KVM_RUN on this thread."""

    def __init__(self, kernel, source, cpus=1, flags=0):
        self.kernel = kernel
        memfd = kernel.map(HVA, SIZE)
        self.ram = Mapping([(memfd, 0, SIZE)]).view
        self.program = assemble(SBI + source, GPA)
        self.ram[: len(self.program.image)] = self.program.image
        assert kernel.region(0, GPA, SIZE, HVA, flags) == 0
        self.cpus = []
        for number in range(cpus):
            self.cpus.append(kernel.session.lookup(kernel.call(kernel.vm, "CREATE_VCPU", number)))
        self.cpus[0].hart.state.pc = GPA

    def word(self, address):
        return int.from_bytes(self.ram[address - GPA : address - GPA + 8], "little")

    def run(self, index=0, seconds=60.0):
        """exit_reason; fails when the guest is still running after `seconds`."""
        cpu = self.cpus[index]
        timer = threading.Timer(seconds, cpu.kick)
        timer.start()
        try:
            with cpu.mutex:
                cpu.run()
        except KvmError as error:
            if error.errno == EINTR and timer.is_alive():
                return Exit.INTR
            state = cpu.hart.state
            pytest.fail(f"{error} at pc {state.pc:#x}, scause {state.scause}, stval {state.stval:#x}")
        finally:
            timer.cancel()
            timer.join()
        return Exit(run_page.U32.unpack_from(cpu.page, run_page.EXIT_REASON)[0])

    def stored(self, index=0):
        """(gpa, value) of the MMIO store that the vCPU has left with."""
        gpa, data, length, is_write = run_page.MMIO.unpack_from(self.cpus[index].page, run_page.UNION)
        assert is_write
        return gpa, int.from_bytes(data[:length], "little")

    def start(self, index):
        """Run a vCPU on a thread of its own until it is kicked for the end of the test."""
        thread = threading.Thread(target=self._keep_running, args=(index,), daemon=True)
        thread.start()
        return thread

    def _keep_running(self, index):
        cpu = self.cpus[index]
        try:
            with cpu.mutex:
                cpu.run()
        except KvmError:
            pass


def test_ipi_and_hart_start(kernel):
    machine = Machine(kernel, """
        li a0, 1
        la a1, second
        li a2, 77
        sbi HSM, 0
        bnez a0, fail
    1:  li a0, 1                # until it says that it waits
        sbi HSM, 2
        li t0, 4
        bne a1, t0, 1b
        li a0, 2
        li a1, 0
        sbi IPI, 0
        li t0, DATA
    2:  ld t1, 0(t0)
        beqz t1, 2b
    fail:
        li t0, DEVICE
        sw a0, 0(t0)
    second:
        csrwi sie, 2
    3:  wfi
        csrr t1, sip
        andi t1, t1, 2
        beqz t1, 3b
        csrci sip, 2
        li t0, DATA
        sd a1, 0(t0)
    4:  wfi
        j 4b
    """, cpus=2)  # fmt: skip
    machine.start(1)
    assert machine.run() == Exit.MMIO
    assert machine.stored() == (DEVICE, 0)
    assert machine.word(DATA) == 77
    machine.cpus[1].kick()


def test_two_harts_fencing_each_other_do_not_deadlock(kernel):
    machine = Machine(kernel, """
        li a0, 1
        la a1, both
        li a2, 0
        sbi HSM, 0
        li a0, 0
    both:
        mv s0, a0
        li s1, 300
    1:  li a0, 3
        li a1, 0
        li a2, 0
        li a3, -1
        sbi RFENCE, 1
        bnez a0, 2f
        li a0, 3
        li a1, 0
        sbi RFENCE, 0
        bnez a0, 2f
        addi s1, s1, -1
        bnez s1, 1b
    2:  li t0, DATA
        slli t1, s0, 3
        add t0, t0, t1
        addi t2, a0, 1
        sd t2, 0(t0)
        li t0, DATA
    3:  ld t1, 0(t0)            # both go on fencing until both are done: neither sleeps
        ld t2, 8(t0)
        and t1, t1, t2
        beqz t1, 3b
        li t0, DEVICE
        sw zero, 0(t0)
    """, cpus=2)  # fmt: skip
    other = machine.start(1)
    assert machine.run() == Exit.MMIO
    other.join(60)
    assert (machine.word(DATA), machine.word(DATA + 8)) == (1, 1)


def test_timer_by_sbi_ends_wfi(kernel):
    machine = Machine(kernel, """
        csrr a0, time
        li t0, 300000           # 30 ms
        add a0, a0, t0
        sbi TIME, 0
        li t0, 0x20
        csrw sie, t0
    1:  wfi
        csrr t1, sip
        andi t1, t1, 0x20
        beqz t1, 1b
        li a0, -1
        sbi TIME, 0
        csrr t1, sip
        li t0, DEVICE
        sw t1, 0(t0)
    """)  # fmt: skip
    started, cpu = time.monotonic(), time.thread_time()
    assert machine.run() == Exit.MMIO
    took = time.monotonic() - started
    assert took > 0.02
    assert time.thread_time() - cpu < took / 2  # asleep, not polling
    assert machine.stored() == (DEVICE, 0)
    assert machine.cpus[0].stats.wfi_exit_stat >= 1


def aia(kernel, cpus):
    """An initialized AIA with 96 sources."""
    assert kernel.ioctl(kernel.vm, "CREATE_DEVICE", type=11) == 0
    device = kernel.session.table.handle(structs.CREATE_DEVICE.parse(kernel.out).fd)

    def put(group, attr, value, size):
        data = value.to_bytes(size, "little")
        kernel.ioctl(device, "SET_DEVICE_ATTR", data, group=group, attr=attr, addr=POINTEE)

    put(AiaGroup.CONFIG, AiaConfig.SRCS, 96, 4)
    put(AiaGroup.CONFIG, AiaConfig.HART_BITS, max(1, (cpus - 1).bit_length()), 4)
    put(AiaGroup.ADDR, 0, APLIC, 8)
    for index in range(cpus):
        put(AiaGroup.ADDR, 1 + index, IMSIC + 0x1000 * index, 8)
    put(AiaGroup.CTRL, 0, 0, 4)
    return device


CLAIM = """
        csrwi siselect, 0
        li t0, 0x70
        csrw siselect, t0
        csrwi sireg, 1          # eidelivery
        li t0, 0x72
        csrw siselect, t0
        csrwi sireg, 0          # eithreshold
        li t0, 0xc0
        csrw siselect, t0
        li t1, -1
        csrw sireg, t1          # eie0
        li t0, 0x200
        csrw sie, t0
"""


def test_irqfd_through_aplic_and_imsic(kernel):
    machine = Machine(kernel, CLAIM + """
        li s0, 0x0d000000
        li t0, 4
        sw t0, 20(s0)           # source 5: rising edge
        li t1, 0x3004 + 16
        add t1, s0, t1
        li t0, 33
        sw t0, 0(t1)            # target: hart 0, identity 33
        li t1, 0x1edc
        add t1, s0, t1
        li t0, 5
        sw t0, 0(t1)            # enable
        li t0, 0x100
        sw t0, 0(s0)
        li t0, DEVICE
        sw zero, 0(t0)          # ready
    1:  wfi
        csrrw t1, stopei, zero
        beqz t1, 1b
        sw t1, 4(t0)
    """)  # fmt: skip
    aia(kernel, 1)
    number, event = kernel.eventfd()
    assert kernel.errno(kernel.vm, "IRQFD", fd=number, gsi=5) == 0
    assert machine.run() == Exit.MMIO
    os.eventfd_write(event, 1)
    poller = threading.Timer(0.05, kernel.turn)
    poller.start()
    assert machine.run() == Exit.MMIO
    poller.join()
    assert machine.stored() == (DEVICE + 4, 33 << 16 | 33)
    assert machine.cpus[0].hart.state.eip[0] == 0


def test_msi_from_hart_to_hart_by_store(kernel):
    machine = Machine(kernel, """
        li a0, 1
        la a1, second
        sbi HSM, 0
        li t0, 0x28001000
        li t1, 40
        sw t1, 0(t0)
        li t0, DATA
    1:  ld t1, 0(t0)
        beqz t1, 1b
        li t0, DEVICE
        sw t1, 0(t0)
    second:
    """ + CLAIM + """
    2:  wfi
        csrrw t1, stopei, zero
        beqz t1, 2b
        li t0, DATA
        sd t1, 0(t0)
    3:  j 3b
    """, cpus=2)  # fmt: skip
    aia(kernel, 2)
    machine.start(1)
    assert machine.run() == Exit.MMIO
    assert machine.stored() == (DEVICE, 40 << 16 | 40)
    machine.cpus[1].kick()


def test_imsic_state_by_attribute(kernel):
    machine = Machine(kernel, "1: j 1b")
    device = aia(kernel, 1)

    def get(select):
        kernel.ioctl(device, "GET_DEVICE_ATTR", bytes(8), group=AiaGroup.IMSIC, attr=select, addr=POINTEE)
        return int.from_bytes(kernel.pointee, "little")

    def put(select, value):
        data = value.to_bytes(8, "little")
        kernel.ioctl(device, "SET_DEVICE_ATTR", data, group=AiaGroup.IMSIC, attr=select, addr=POINTEE)

    for select, value, back in (
        (0x70, 3, 1),
        (0x72, 7, 7),
        (0x80, (1 << 64) - 1, (1 << 64) - 2),
        (0xC2, 5, 5),
    ):
        put(select, value)
        assert get(select) == back
    late = kernel.session.lookup(kernel.call(kernel.vm, "CREATE_VCPU", 9))
    assert kernel.errno(device, "GET_DEVICE_ATTR", bytes(8), group=AiaGroup.IMSIC, attr=9 << 12 | 0x70,
                        addr=POINTEE) == 19  # fmt: skip
    assert late.hart.state.imsic_present == 0
    assert machine.cpus[0].hart.state.imsic_present == 1


def test_dirty_log_while_running(kernel):
    machine = Machine(kernel, """
        li t0, DATA
        li t2, 0x1000
    1:  ld t1, 0(t0)            # one page for ever, until told
        addi t1, t1, 1
        sd t1, 0(t0)
        lw t3, 8(t0)
        beqz t3, 1b
        add t4, t0, t2
        sd t1, 0(t4)            # then the next one
        li t0, DEVICE
        sw zero, 0(t0)
    """, flags=1)  # fmt: skip

    def dirty():
        kernel.ioctl(kernel.vm, "GET_DIRTY_LOG", bytes(SIZE // 4096 // 8), slot=0, dirty_bitmap=POINTEE)
        return int.from_bytes(kernel.pointee, "little")

    runner = threading.Thread(target=machine.run, daemon=True)
    runner.start()
    page = 1 << 0x100
    for _ in range(20):
        before = machine.word(DATA)
        while machine.word(DATA) < before + 2:  # stores have been made since the last look at the log
            assert runner.is_alive()
            time.sleep(0.001)
        assert dirty() == page, "a page that is written must be dirty in every round"
    machine.ram[0x100008] = 1
    runner.join(60)
    assert not runner.is_alive()
    assert dirty() & page << 1
    assert dirty() == 0


def test_memslot_deleted_under_a_running_vcpu(kernel):
    machine = Machine(kernel, """
        li t0, 0x90000000
    1:  sw zero, 0(t0)
        j 1b
    """)  # fmt: skip
    assert kernel.region(1, 0x9000_0000, 0x1000, HVA + 0x20_0000) == 0
    runner = threading.Thread(target=machine.run, daemon=True)
    runner.start()
    machine.ram[0x200000:0x200004] = b"\xff" * 4
    while bytes(machine.ram[0x200000:0x200004]) != bytes(4):  # until the guest stores
        assert runner.is_alive()
        time.sleep(0.001)
    assert kernel.region(1, 0, 0, 0) == 0
    machine.ram[0x200000:0x200004] = b"\xff" * 4
    runner.join(60)
    assert machine.stored() == (0x9000_0000, 0)
    assert bytes(machine.ram[0x200000:0x200004]) == b"\xff" * 4


def test_an_access_to_unmapped_user_memory_is_efault(kernel):
    machine = Machine(kernel, """
        li t0, 0x90000000
        lw t1, 0(t0)
        li t0, DEVICE
        sw t1, 0(t0)
    """)  # fmt: skip
    assert kernel.region(1, 0x9000_0000, 0x1000, 0x20_0000_0000) == 0
    cpu = machine.cpus[0]
    for _ in range(2):
        with pytest.raises(KvmError) as refused, cpu.mutex:
            cpu.run()
        assert refused.value.errno == EFAULT
        assert run_page.U32.unpack_from(cpu.page, run_page.EXIT_REASON) == (0,)
    memfd = kernel.map(0x20_0000_0000, 0x1000)
    Mapping([(memfd, 0, 0x1000)]).view[0] = 7
    assert machine.run() == Exit.MMIO
    assert machine.stored() == (DEVICE, 7)


def test_a_read_only_slot(kernel):
    machine = Machine(kernel, """
        li t0, 0x90000000
        lw t1, 0(t0)
        sd t1, 8(t0)
    """)  # fmt: skip
    machine.ram[0x200000:0x200004] = (0x1234).to_bytes(4, "little")
    assert kernel.region(1, 0x9000_0000, 0x1000, HVA + 0x20_0000, 2) == 0
    assert machine.run() == Exit.MMIO
    assert machine.stored() == (0x9000_0008, 0x1234)


def test_suspend_returns_when_an_interrupt_is_pending(kernel):
    machine = Machine(kernel, """
        csrr t0, time
        li t1, 200000
        add t0, t0, t1
        csrw stimecmp, t0
        li t0, 0x20
        csrw sie, t0
        li a0, 0
        sbi HSM, 3
        csrr t1, sip
        li t0, DEVICE
        sw t1, 0(t0)
    """)  # fmt: skip
    assert machine.run() == Exit.MMIO
    assert machine.stored() == (DEVICE, 0x20)


def test_kick_is_sticky_and_stops_once(kernel):
    machine = Machine(kernel, "1: j 1b")
    cpu = machine.cpus[0]
    cpu.kick()
    assert machine.run() == Exit.INTR
    timer = threading.Timer(0.05, cpu.kick)
    started = time.monotonic()
    timer.start()
    assert machine.run() == Exit.INTR
    assert time.monotonic() - started > 0.03
    assert run_page.U32.unpack_from(cpu.page, run_page.EXIT_REASON) == (Exit.INTR,)
    timer.join()
