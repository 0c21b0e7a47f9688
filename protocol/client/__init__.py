"""The client's side of the protocol, a "libkvm": typed handles over sessions, memory and kvm_run mapped.

    kvm = Kvm.open("ipc:///run/user/1000/softkvm/kvmcore.sock", name="web")
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    reason = vcpu.run()

Synchronous, and safe to use from several threads. What kvmcore refuses raises KvmError with Linux's errno.
"""

from __future__ import annotations

from protocol.abi.errors import KvmError
from protocol.client.device import Device
from protocol.client.kvm import Kvm
from protocol.client.vcpu import Vcpu
from protocol.client.vm import GuestMemfd, Vm

__all__ = ["Device", "GuestMemfd", "Kvm", "KvmError", "Vcpu", "Vm"]
