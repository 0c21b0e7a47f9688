"""What every handle answers, whatever the request (KVM_ABI 1.1, 1.2): unknown requests, bad pointers, hidden rows."""

from __future__ import annotations

import os
from errno import EFAULT, EINVAL, EIO, ENOTTY

import pytest

from kvmcore import ioctl
from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.session import ClientSession, Peer
from kvmcore.vm.irqchip.aia import Aia
from kvmcore.vm.objects import System
from kvmcore.vm.vm import Vm
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_REQUEST, IOCTLS, UNKNOWN_ERRNO

UNMAPPED = 0x1000


class Handles:
    """One handle of each kind, in a session of its own."""

    def __init__(self, compat: Compat) -> None:
        peer = Peer(os.getpid(), os.getuid())
        self.session = ClientSession(ClientSession.new_id(), peer, Quotas.of_this_process(), compat=compat)
        vm = Vm(self.session, EventLoop(), name="rules")
        self.by_kind = {"system": System(self.session), "vm": vm}
        self.session.install(vm)
        self.by_kind["vcpu"] = vm.create_vcpu(0)
        self.by_kind["device"] = Aia(vm)
        for kind in ("vcpu", "device"):
            self.session.install(self.by_kind[kind])

    def errno(self, kind: str, request: int, argument: int = 0) -> int:
        try:
            ioctl.call(self.by_kind[kind], request, argument)
        except KvmError as error:
            return error.errno or 0
        return 0


@pytest.fixture(params=[Compat.DEFAULT, Compat.STRICT], ids=lambda compat: compat.value)
def handles(request):
    made = Handles(request.param)
    yield made
    made.session.close()


@pytest.mark.parametrize("kind", ["system", "vm", "vcpu", "device"])
def test_unknown_requests(handles, kind):
    wanted = {"EINVAL": EINVAL, "ENOTTY": ENOTTY}[UNKNOWN_ERRNO[kind]]
    foreign = [row.number for row in IOCTLS if kind not in row.on]
    for request in [0, 0x5401, 0xAE7F, 0xFFFFFFFF, *foreign]:
        if (kind, request) not in BY_REQUEST:
            assert handles.errno(kind, request, UNMAPPED) == wanted


@pytest.mark.parametrize(
    ("kind", "row"),
    [(kind, row) for row in IOCTLS for kind in row.on if row.argument is not None and row.capability],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_bad_pointer_is_efault_before_anything_else(handles, kind, row):
    hidden = row.extension and not handles.session.compat.extended
    assert handles.errno(kind, row.number, UNMAPPED) == (EINVAL if hidden else EFAULT)


def test_a_dead_vm_answers_eio_to_everything(handles):
    handles.by_kind["vm"].destroy()
    for kind in ("vm", "vcpu", "device"):
        for request in (0, *(number for on, number in BY_REQUEST if on == kind)):
            assert handles.errno(kind, request, UNMAPPED) == EIO
