"""Ioctls of the /dev/kvm handle: one function per row of protocol/abi/ioctls.py, same name in lower case.

Called by kvmcore.ioctl.call on the daemon's I/O thread, as fn(handle, argument); see kvmcore/vm/objects.py.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from kvmcore.vm import capabilities
from protocol.abi import run_page, structs
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.objects import Deferred, Handle, System


def _no_argument(argument: int) -> None:
    if argument:
        raise KvmError(EINVAL, reason="the argument must be 0")


def get_api_version(system: System, argument: int) -> int:
    """12, for ever. EINVAL: argument not 0."""
    _no_argument(argument)
    return structs.API_VERSION


def create_vm(system: System, machine_type: int) -> int | Handle | Deferred:
    """A new VM. RISC-V ignores the type."""
    return system.create_vm(machine_type)


def check_extension(system: System, capability: int) -> int:
    """The value of a capability; 0 for anything unknown, never an error."""
    return capabilities.check_extension(system.session.compat, capability)


def get_vcpu_mmap_size(system: System, argument: int) -> int:
    """Bytes of a vCPU's shared mapping: kvm_run's page and the coalesced ring's. EINVAL: argument not 0."""
    _no_argument(argument)
    return run_page.MMAP_SIZE
