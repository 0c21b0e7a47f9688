"""The VM process that waits for a VM: taken by the next one, made again behind it, missed by nobody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import psutil
import pytest

from protocol.abi.structs_riscv import PC
from protocol.client import Kvm
from tests.framework.full_stack import Daemon
from tests.framework.merging import may_merge


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as running:
        yield running


def spares(daemon: Daemon) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(daemon.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # others come and go
            if process.name() == "kvmcore-spare":
                found.append(process)
    return found


def the_spare(daemon: Daemon) -> psutil.Process:
    end = time.monotonic() + 60
    while not (found := spares(daemon)) or found[0].num_threads() < 3:  # it waits, with its sockets open
        assert time.monotonic() < end, "no spare VM process"
        time.sleep(0.05)
    return found[0]


def make_vm(daemon: Daemon, name: str, accel: str = "") -> int:
    """A VM that works; its process."""
    with closing(Kvm.open(daemon.endpoint, name=name, accel=accel)) as kvm, closing(kvm.create_vm()) as vm:
        vcpu = vm.create_vcpu(0)
        vcpu.set_one_reg(PC, 0x1234)
        assert vcpu.get_one_reg(PC) == 0x1234
        assert psutil.Process(vm.pid).name() == f"kvmcore-vm {name}"
        return vm.pid


def test_the_next_vm_takes_it(daemon: Daemon) -> None:
    assert spares(daemon) == []  # who makes no VM pays for none
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    assert make_vm(daemon, "second") == spare.pid
    assert the_spare(daemon).pid != spare.pid


def test_the_host_may_merge_equal_pages_of_vms(daemon: Daemon) -> None:
    make_vm(daemon, "first")
    assert may_merge(the_spare(daemon).pid)
    assert not may_merge(daemon.process.pid), "whose memory is no VM's"


def test_two_at_once(daemon: Daemon) -> None:
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    with closing(Kvm.open(daemon.endpoint, name="a")) as kvm, closing(kvm.create_vm()) as one, closing(kvm.create_vm()) as two:
        assert one.pid == spare.pid != two.pid
        one.create_vcpu(0)
        two.create_vcpu(0)


def test_another_engine_is_not_what_it_has(daemon: Daemon) -> None:
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    assert make_vm(daemon, "other", accel="interpreter") != spare.pid
    assert spare.is_running()


def test_it_is_killed(daemon: Daemon) -> None:
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    spare.kill()
    make_vm(daemon, "second")
    assert the_spare(daemon).pid != spare.pid


def test_it_is_killed_when_it_has_been_taken(daemon: Daemon) -> None:
    """It stands still, is given its order, and dies before it answers: the client gets another one."""
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    spare.suspend()
    pid = os.fork()
    if not pid:
        time.sleep(0.5)
        os.kill(spare.pid, signal.SIGKILL)
        os._exit(0)
    assert make_vm(daemon, "second") != spare.pid
    os.waitpid(pid, 0)


def test_it_goes_with_the_daemon(daemon: Daemon) -> None:
    make_vm(daemon, "first")
    spare = the_spare(daemon)
    daemon.process.kill()
    end = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while spare.status() != psutil.STATUS_ZOMBIE:  # init may take its time
            assert time.monotonic() < end, "it is still there"
            time.sleep(0.05)
