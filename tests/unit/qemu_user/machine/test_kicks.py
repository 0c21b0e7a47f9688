"""Doorbells of devices: made known to kvmcore one by one, or many at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from errno import EEXIST

import pytest

from protocol.abi.structs import IOEVENTFD_FLAG_DEASSIGN
from protocol.client import Kvm, Vm
from qemu_user.backends.io_loop import IoLoop
from qemu_user.machine.kicks import Kicks
from tests.framework.full_stack import Daemon

HERE, THERE = 0x40000000, 0x40001000


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Daemon() as daemon:
        kvm = Kvm.open(daemon.endpoint, name="kicks")
        yield kvm.create_vm()
        kvm.close()


def is_free(vm: Vm, address: int) -> bool:
    """Whether kvmcore knows of no doorbell there."""
    fd = os.eventfd(0)
    batch = vm.batch()
    placed = batch.ioeventfd(vm, fd, address, 4, None)
    batch.send()
    free = placed.reply is not None and placed.reply.errno != EEXIST
    if free:
        vm.ioeventfd(fd, address, 4, flags=IOEVENTFD_FLAG_DEASSIGN)
    os.close(fd)
    return free


def test_two_at_one_address(vm: Vm) -> None:
    """As BARs may be while firmware moves them about: the second one has the place when it asks again."""

    def fail(error: BaseException) -> None:
        raise error

    loop = IoLoop(fail)
    kicks = Kicks(vm)
    one, two = (kicks.make(loop, lambda: None, 4) for _ in range(2))
    with kicks.at_once():
        one.place(HERE)
        two.place(HERE)
        assert is_free(vm, HERE), "all at the end"
    assert not is_free(vm, HERE)
    one.place(THERE)
    assert is_free(vm, HERE)
    two.place(HERE)
    assert not is_free(vm, HERE)
    with kicks.at_once():
        one.place(None)
        two.place(None)
    assert is_free(vm, HERE)
    assert is_free(vm, THERE)
    kicks.close()
    loop.close()
