"""What native code does of KVM_RUN by itself: the doorbell, device exits, ioeventfds, the coalesced ring, MSIs by irqfd
(DESIGN 3). The same instructions go through Python the first time, and natively from then on: both must agree.
"""

from __future__ import annotations

import os
import threading
import time
from errno import EFAULT, EINTR, EIO

import pytest

from kvmcore.engine.exits import ExitKind
from protocol.abi import run_page, structs
from protocol.abi.exits import Exit
from tests.unit.kvmcore.vm.test_running_guests import CLAIM, DATA, DEVICE, IMSIC, Machine, aia


class Client:
    """The client's side of the doorbell, on another thread than the vCPU's."""

    def __init__(self, machine: Machine, index: int = 0) -> None:
        self.cpu = machine.cpus[index]
        self.cpu.shared_fds()  # starts the thread
        self.bell, self.page = self.cpu.doorbell, self.cpu.page

    def run(self) -> tuple[int, int]:
        """(exit_reason, 0), or (-1, errno)."""
        sequence = self.bell.request()
        for _ in range(10):
            if (answer := self.bell.wait_reply(sequence)) is not None:
                ret, errno = answer
                return (-1, errno) if ret else (run_page.U32.unpack_from(self.page, run_page.EXIT_REASON)[0], 0)
        pytest.fail("no answer to a RUN")

    def mmio(self) -> tuple[int, int, bool, int]:
        """(address, length, whether it is a store, data)."""
        gpa, data, length, is_write = run_page.MMIO.unpack_from(self.page, run_page.UNION)
        return gpa, length, bool(is_write), int.from_bytes(data[:length], "little")

    def answer(self, value: int) -> None:
        run_page.U64.pack_into(self.page, run_page.MMIO_DATA, value)


@pytest.fixture
def ended(kernel):
    yield
    kernel.vm.destroy()
    for cpu in kernel.vm.vcpus:
        cpu.join(60)


LOADS = {
    "lb": (1, 0x80, -0x80), "lbu": (1, 0x80, 0x80), "lh": (2, 0x8001, 0x8001 - (1 << 16)), "lhu": (2, 0x8001, 0x8001),
    "lw": (4, 0x80000001, 0x80000001 - (1 << 32)), "lwu": (4, 0x80000001, 0x80000001),
    "ld": (8, 1 << 63 | 5, (1 << 63 | 5) - (1 << 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADS)
def test_loads_by_python_and_natively(kernel, ended, name):
    size, value, expected = LOADS[name]
    machine = Machine(kernel, f"""
        li s0, DEVICE
        li s1, DATA
    1:  {name} a0, 16(s0)
        sd a0, 0(s1)
        addi s1, s1, 8
        j 1b
    """)  # fmt: skip
    client = Client(machine)
    for _ in range(4):
        assert client.run() == (Exit.MMIO, 0)
        assert client.mmio()[:3] == (DEVICE + 16, size, False)
        client.answer(value | 0xA5 << 8 * size if size < 8 else value)  # what lies behind the answer is not part of it
    client.run()
    assert [machine.word(DATA + 8 * number) for number in range(4)] == [expected & (1 << 64) - 1] * 4
    stats = machine.cpus[0].stats
    assert (stats.mmio_exit_user, stats.exits) == (5, 5)


def test_stores_and_the_zero_register(kernel, ended):
    machine = Machine(kernel, """
        li s0, DEVICE
        li a1, -2
    1:  sd a1, 8(s0)
        c.sw a1, 4(s0)
        sh a1, 2(s0)
        sb a1, 1(s0)
        lw zero, 0(s0)
        bnez zero, 2f
        j 1b
    2:  ebreak
    """)  # fmt: skip
    client = Client(machine)
    for _ in range(3):
        for offset, length, write in ((8, 8, True), (4, 4, True), (2, 2, True), (1, 1, True), (0, 4, False)):
            assert client.run() == (Exit.MMIO, 0)
            data = (-2) & (1 << 8 * length) - 1
            assert client.mmio()[:3] == (DEVICE + offset, length, write)
            assert not write or client.mmio()[3] == data
            client.answer(0xFFFFFFFF)


def test_most_runs_need_no_python(kernel, ended):
    machine = Machine(kernel, "li s0, DEVICE\n 1: lw a0, 0(s0)\n j 1b")
    client = Client(machine)
    cpu = machine.cpus[0]
    served = []
    plain = cpu.hart.run
    cpu.hart.run = lambda left=None: served.append(left) or plain(left)
    for number in range(50):
        assert client.run() == (Exit.MMIO, 0)
        client.answer(number)
    assert len(served) < 5
    assert cpu.hart.state.x[10] == 48


def test_immediate_exit_completes_and_a_kick_returns(kernel, ended):
    machine = Machine(kernel, "li s0, DEVICE\n 1: lw a0, 0(s0)\n j 1b")
    client = Client(machine)
    for _ in range(3):
        client.run()
    client.answer(77)
    client.page[run_page.IMMEDIATE_EXIT] = 1
    assert client.run() == (-1, EINTR)
    client.page[run_page.IMMEDIATE_EXIT] = 0
    assert machine.cpus[0].hart.state.x[10] == 77
    assert client.run() == (Exit.MMIO, 0)
    machine.cpus[0].kick()
    assert client.run() == (-1, EINTR)
    assert client.run() == (Exit.MMIO, 0)


def test_the_first_run_may_be_one_that_ends_at_once(kernel, ended):
    """The guest's memory and devices are there in the one behind it."""
    machine = Machine(kernel, "li s0, DEVICE\n 1: lw a0, 0(s0)\n j 1b")
    client = Client(machine)
    client.page[run_page.IMMEDIATE_EXIT] = 1
    assert client.run() == (-1, EINTR)
    client.page[run_page.IMMEDIATE_EXIT] = 0
    assert client.run() == (Exit.MMIO, 0)


def test_what_the_page_says_of_the_exit_changes_nothing(kernel, ended):
    machine = Machine(kernel, "li s0, DEVICE\n 1: lw a0, 0(s0)\n addi a2, a2, 1\n j 1b")
    client = Client(machine)
    for _ in range(3):
        client.run()
    run_page.U32.pack_into(client.page, run_page.EXIT_REASON, Exit.RISCV_SBI)
    client.page[run_page.MMIO_IS_WRITE] = 1
    run_page.U32.pack_into(client.page, run_page.MMIO_LEN, 8)
    run_page.U64.pack_into(client.page, run_page.MMIO_DATA, 0xFFFF_FFFF_0000_0001)
    assert client.run() == (Exit.MMIO, 0)
    assert (machine.cpus[0].hart.state.x[10], machine.cpus[0].hart.state.x[12]) == (1, 3)


def test_errors_stay_errors(kernel, ended):
    machine = Machine(kernel, "li s0, DEVICE\n lw a0, 0(s0)\n lw a0, 0(s0)\n 1: lw a0, 1(s0)\n j 1b")
    client = Client(machine)
    assert [client.run(), client.run()] == [(Exit.MMIO, 0)] * 2
    for _ in range(3):
        assert client.run() == (-1, EIO)
    assert kernel.region(3, DEVICE, 0x1000, 0x7000_0000_0000) == 0  # a slot with nothing behind it
    assert client.run() == (-1, EFAULT)


def test_ioctls_between_and_behind_runs(kernel, ended):
    machine = Machine(kernel, "1: j 1b")
    client = Client(machine)
    cpu = machine.cpus[0]
    done = []
    assert cpu.try_now(lambda: done.append("idle"))
    thread = threading.Thread(target=lambda: done.append(client.run()), daemon=True)
    thread.start()
    while not cpu.hart.running:
        time.sleep(0.001)
    assert not cpu.try_now(lambda: done.append("never"))
    cpu.submit(lambda: done.append("behind"))
    cpu.kick()
    thread.join(60)
    until = time.monotonic() + 60
    while len(done) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    assert done[0] == "idle"
    assert sorted(map(str, done[1:])) == ["(-1, 4)", "behind"]


# -- the bus -------------------------------------------------------------------------------------------------

STORES = """
    li s0, DEVICE
    li s1, 3
1:  li a1, 5
    sw a1, 0(s0)
    li a1, 6
    sw a1, 0(s0)
    sh a1, 4(s0)
    sb a1, 4(s0)
    addi s1, s1, -1
    bnez s1, 1b
    sw s1, 64(s0)
"""


def test_ioeventfds(kernel, ended):
    machine = Machine(kernel, STORES)
    (number_five, five), (number_six, six), (number_any, any_size) = (kernel.eventfd() for _ in range(3))
    match = structs.IOEVENTFD_FLAG_DATAMATCH
    for number, addr, length, value, flags in (
        (number_five, DEVICE, 4, 5, match), (number_six, DEVICE, 4, 6, match), (number_any, DEVICE + 4, 0, 0, 0),
    ):  # fmt: skip
        assert kernel.errno(kernel.vm, "IOEVENTFD", fd=number, addr=addr, len=length, datamatch=value, flags=flags) == 0
    assert Client(machine).run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE + 64, 0)
    assert [os.eventfd_read(fd) for fd in (five, six, any_size)] == [3, 3, 6]
    assert machine.cpus[0].stats.mmio_exit_kernel == 12


def test_an_ioeventfd_that_is_gone_is_not_written(kernel, ended):
    machine = Machine(kernel, "li s0, DEVICE\n 1: sw zero, 0(s0)\n sw zero, 64(s0)\n j 1b")
    number, fd = kernel.eventfd()
    assert kernel.errno(kernel.vm, "IOEVENTFD", fd=number, addr=DEVICE, len=4) == 0
    client = Client(machine)
    for _ in range(3):
        assert client.run() == (Exit.MMIO, 0)
        assert machine.stored() == (DEVICE + 64, 0)
    assert os.eventfd_read(fd) == 3
    flags = structs.IOEVENTFD_FLAG_DEASSIGN
    assert kernel.errno(kernel.vm, "IOEVENTFD", fd=number, addr=DEVICE, len=4, flags=flags) == 0
    assert client.run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE, 0)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)


def test_the_coalesced_ring_fills_and_overflows(kernel, ended):
    room = run_page.COALESCED_MAX - 1
    machine = Machine(kernel, "li s0, DEVICE\n 1: addi a1, a1, 1\n sw a1, 8(s0)\n j 1b")
    assert kernel.errno(kernel.vm, "REGISTER_COALESCED_MMIO", addr=DEVICE, size=16, pio=0) == 0
    client = Client(machine)
    assert client.run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE + 8, room + 1)
    ring = kernel.vm.ring.view
    assert (run_page.U32.unpack_from(ring, 0)[0], run_page.U32.unpack_from(ring, 4)[0]) == (0, room)
    for number in (0, 1, room - 1):
        entry = run_page.COALESCED_ENTRY.unpack_from(ring, 8 + number * run_page.COALESCED_ENTRY_SIZE)
        assert entry == (DEVICE + 8, 4, 0, (number + 1).to_bytes(8, "little"))
    run_page.U32.pack_into(ring, 0, 10)  # the client has taken ten
    assert client.run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE + 8, room + 12)
    run_page.U32.pack_into(ring, 4, 5000)  # and then a bad index: an exit each, as the kernel has it
    assert client.run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE + 8, room + 13)


# -- interrupts ----------------------------------------------------------------------------------------------


def test_msis_by_irqfd_wake_a_hart_natively(kernel, ended):
    machine = Machine(kernel, CLAIM + """
        li s0, DEVICE
    1:  wfi
        csrrw t0, stopei, zero
        beqz t0, 1b
        addi s1, s1, 1
        sw s1, 0(s0)
        j 1b
    """)  # fmt: skip
    aia(kernel, 1)
    chip = kernel.vm.irqchip
    message = structs.IRQ_ROUTING_MSI.build(address_lo=IMSIC, address_hi=0, data=5).ljust(32, b"\0")
    chip.set_routing(structs.IRQ_ROUTING_ENTRY.build(gsi=40, type=structs.IRQ_ROUTING_TYPE_MSI, u=message))
    number, fd = kernel.eventfd()
    assert kernel.errno(kernel.vm, "IRQFD", fd=number, gsi=40) == 0
    client = Client(machine)
    for number_of in range(1, 20):  # nobody turns the I/O loop: native code alone can deliver them
        os.eventfd_write(fd, 1)
        assert client.run() == (Exit.MMIO, 0)
        assert machine.stored() == (DEVICE, number_of)
    chip.set_routing(structs.IRQ_ROUTING_ENTRY.build(gsi=40, type=structs.IRQ_ROUTING_TYPE_IRQCHIP, u=bytes(32)))
    os.eventfd_write(fd, 1)
    time.sleep(0.05)
    assert os.eventfd_read(fd) == 1  # it is the I/O loop's now, which does not turn


def test_a_wfi_ends_at_its_time(kernel, ended):
    machine = Machine(kernel, """
        li t0, 32
        csrw sie, t0
        rdtime t0
        li t1, 20000
        add t0, t0, t1
        csrw 0x14d, t0          # stimecmp
        wfi
        rdtime t1
        sltu a0, t1, t0
        li s0, DEVICE
        sw a0, 0(s0)
    """)  # fmt: skip
    assert Client(machine).run() == (Exit.MMIO, 0)
    assert machine.stored() == (DEVICE, 0)
    assert machine.cpus[0].stats.wfi_exit_stat >= 1
    assert machine.cpus[0].stats.halt_wait_ns > 0
    assert sum(machine.cpus[0].stats.halt_wait_hist) == machine.cpus[0].stats.halt_wakeup
    assert machine.cpus[0].hart.state.exit_kind == ExitKind.MMIO_WRITE


def test_slots_and_the_bus_change_under_native_exits(kernel, ended):
    """Native code looks at both tables from outside guest code: old ones stay while it does."""
    machine = Machine(kernel, "li s0, DEVICE\n 1: sw zero, 8(s0)\n lw a0, 0(s0)\n j 1b")
    number, fd = kernel.eventfd()
    kernel.map(0x7000_0000_0000, 0x1000)
    client = Client(machine)
    ended_at = time.monotonic() + 1
    exits: list[int] = []

    def change() -> None:
        flags = 0
        while time.monotonic() < ended_at:
            kernel.errno(kernel.vm, "IOEVENTFD", fd=number, addr=DEVICE + 8, len=4, flags=flags)
            flags ^= structs.IOEVENTFD_FLAG_DEASSIGN
            for slot in range(1, 9):
                assert kernel.region(slot, 0x9000_0000 + (slot << 20), 0x1000, 0x7000_0000_0000) == 0
            for slot in range(1, 9):
                assert kernel.region(slot, 0x9000_0000 + (slot << 20), 0, 0x7000_0000_0000) == 0

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    while thread.is_alive():
        assert client.run() == (Exit.MMIO, 0)
        exits.append(client.mmio()[0])
    thread.join()
    assert set(exits) <= {DEVICE, DEVICE + 8}
    assert DEVICE in exits
    assert not machine.cpus[0].hart.state.in_bus
    os.close(fd)
