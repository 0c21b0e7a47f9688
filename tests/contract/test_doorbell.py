"""KVM_RUN by the doorbell, through a daemon: with kvmcore's code for clients, without it, and when the VM's process dies."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit
from protocol.abi.structs import MEM_GUEST_MEMFD
from protocol.abi.structs_riscv import PC
from protocol.client import Kvm, Vcpu, Vm
from tests.framework.asm import assemble
from tests.framework.full_stack import Daemon

RAM, SIZE = 0x8000_0000, 1 << 20
ECHO = "li s0, 0x10000000\n 1: lw a0, 0(s0)\n addi a0, a0, 1\n sw a0, 4(s0)\n j 1b"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Daemon() as daemon:
        yield daemon.endpoint


def start(endpoint: str, source: str) -> tuple[Vm, Vcpu]:
    vm = Kvm.open(endpoint, name="bell").create_vm()
    memory = vm.create_guest_memfd(SIZE)
    vm.set_user_memory_region2(0, RAM, SIZE, 0, MEM_GUEST_MEMFD, memory, 0, 0)
    image = assemble(source, RAM).image
    mmap.mmap(memory.fd, SIZE)[: len(image)] = image
    vcpu = vm.create_vcpu(0)
    vcpu.set_one_reg(PC, RAM)
    return vm, vcpu


@pytest.mark.parametrize("with_code", [True, False])
def test_the_hand_over_both_ways(endpoint: str, with_code: bool) -> None:
    vm, vcpu = start(endpoint, ECHO)
    if with_code:
        assert vcpu._vdso is not None, "the host lets nobody execute a memfd"
    else:
        vcpu._vdso = None
    for number in range(300):
        assert vcpu.run() == Exit.MMIO
        run_page.U64.pack_into(vcpu.run_page, run_page.MMIO_DATA, number)
        assert vcpu.run() == Exit.MMIO
        _, data, length, is_write = run_page.MMIO.unpack_from(vcpu.run_page, run_page.UNION)
        assert (is_write, length, int.from_bytes(data[:length], "little")) == (1, 4, number + 1)
    vm.close()


def test_a_change_in_the_middle(endpoint: str) -> None:
    """Clients with and without the code may take turns: the words are the same."""
    vm, vcpu = start(endpoint, ECHO)
    code = vcpu._vdso
    for number in range(20):
        vcpu._vdso = code if number % 3 else None
        assert vcpu.run() == Exit.MMIO
    vm.close()


@pytest.mark.parametrize("with_code", [True, False])
def test_the_process_is_killed_while_the_client_waits(endpoint: str, with_code: bool) -> None:
    vm, vcpu = start(endpoint, "1: j 1b")
    if not with_code:
        vcpu._vdso = None
    threading.Timer(0.3, lambda: os.kill(vm.pid, signal.SIGKILL)).start()
    with pytest.raises(KvmError) as failed:
        vcpu.run()
    assert failed.value.errno == errno.ECONNRESET


@pytest.mark.parametrize("with_code", [True, False])
def test_a_kick_ends_the_wait(endpoint: str, with_code: bool) -> None:
    vm, vcpu = start(endpoint, "1: j 1b")
    if not with_code:
        vcpu._vdso = None
    for _ in range(3):
        timer = threading.Timer(0.05, lambda: vm.kick(vcpu))
        timer.start()
        with pytest.raises(KvmError) as failed:
            vcpu.run()
        assert failed.value.errno == errno.EINTR
        timer.join()
    vm.close()


def test_registers_while_it_stands_and_hostile_words(endpoint: str) -> None:
    """The client writes its words at random: its own RUNs may go wrong, ioctls of the vCPU are served."""
    vm, vcpu = start(endpoint, ECHO)
    for _ in range(5):
        vcpu.run()
    for at in range(run_page.DOORBELL_BELL, run_page.DOORBELL_REPLY_SLEEPS + 4, 4):
        vcpu.run_page[at : at + 4] = os.urandom(4)
        begun = time.monotonic()
        vm.kick(vcpu)  # a RUN that the noise has asked for ends
        assert vcpu.get_one_reg(PC) & ~0xFF == RAM
        assert time.monotonic() - begun < 30
    vm.close()
