"""What kvmcore keeps of a new machine: VM, memory, vCPUs, interrupt controller. Nothing else needs to be there for it, so it
can be made while something is waited for. Used by machine.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from protocol.abi.errors import KvmError
from protocol.abi.structs_riscv import SBI_EXT, SbiExt, one_reg
from qemu_user.config.machine_config import MachineConfig
from qemu_user.machine.irq import AiaInterrupts

if TYPE_CHECKING:
    from protocol.client import Kvm, Vcpu, Vm
    from protocol.client.vm import GuestMemfd

RAM_SEGMENT = 1 << 41
"""Where memory that is no guest_memfd lies in the address space of our session with kvmcore."""


class MadeVm(NamedTuple):
    """A machine's, until close()."""

    kvm: Kvm
    vm: Vm
    aia: AiaInterrupts | None
    """finish() has yet to be called; None: it has none."""
    memfd: GuestMemfd | None
    ram_fd: int
    """The memfd of RAM: that of `memfd`, or the one that was given."""
    vcpus: list[Vcpu]

    def close(self) -> None:
        """Nobody wants it."""
        for handle in (self.memfd, self.vm, self.kvm):
            if handle is not None:
                with suppress(KvmError, OSError):
                    handle.close()


def make_vm(
    config: MachineConfig, endpoint: str, ram_fd: int = -1, vm_made: Callable[[int], None] = lambda pid: None
) -> MadeVm:
    """For a machine of that configuration; `ram_fd`: the sealed memfd that is its memory, which stays the caller's if this
    fails; `vm_made` is called with the VM's process before it has any memory. KvmError, OSError: nothing is left."""
    from protocol.client import Kvm

    kvm = Kvm.open(endpoint, name=config.name, accel="" if config.accel == "kvmcore" else config.accel)
    vm = None
    try:
        vm = kvm.create_vm()
        vm_made(vm.pid)
        aia = AiaInterrupts(vm) if config.aia == "aplic-imsic" else None
        memfd = None
        if ram_fd < 0:
            memfd = vm.create_guest_memfd(config.memory)
            ram_fd = memfd.fd
        else:
            vm.map_segment(RAM_SEGMENT, config.memory, ram_fd)
        vcpus = [vm.create_vcpu(index) for index in range(config.cpus)]
        for vcpu in vcpus:
            vcpu.set_one_reg(one_reg(SBI_EXT, SbiExt.DBCN), 1)
    except BaseException:
        for handle in (vm, kvm):
            if handle is not None:
                with suppress(KvmError, OSError):
                    handle.close()
        raise
    return MadeVm(kvm, vm, aia, memfd, ram_fd, vcpus)
