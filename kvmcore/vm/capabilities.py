"""What a VM has switched on with KVM_ENABLE_CAP, and KVM_CHECK_EXTENSION's answers (KVM_ABI 1.4).

`VmCaps` hangs on the Vm as `vm.caps`; called by kvmcore/ioctl/{system,vm}.py. The fixed values are
protocol/abi/capabilities.py's; here is only what depends on the host and on the VM.
"""

from __future__ import annotations

import os
from errno import EBUSY, EINVAL
from typing import TYPE_CHECKING

from protocol.abi import capabilities
from protocol.abi.capabilities import Cap
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.vm import Vm

GPA_WIDTHS = (41, 50, 59)
"""Guest-physical widths of Sv39x4, Sv48x4 and Sv57x4."""


def check_extension(compat: Compat, number: int, caps: VmCaps | None = None) -> int:
    """The value of a capability; 0 for whatever is not one. `caps`: asked on a VM handle."""
    if number == Cap.NR_VCPUS:
        return len(os.sched_getaffinity(0))
    if number == Cap.VM_GPA_BITS and caps is not None:
        return caps.gpa_bits
    return capabilities.value(compat, number)


class VmCaps:
    """The capabilities of one VM that can be set. The dirty log's are in memory.dirty."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.gpa_bits = GPA_WIDTHS[-1]
        self.halt_poll_ns: int | None = None
        """Set by the client; ours never polls before it sleeps, so it has no effect."""
        self.mp_state_reset = False
        """Whether SET_MP_STATE takes INIT_RECEIVED."""

    def enable(self, number: int, flags: int, value: int) -> None:
        """KVM_ENABLE_CAP with args[0] = value. EINVAL: unknown, not settable, flags; EBUSY, E2BIG: see
        each.
        """
        offered = capabilities.value(self._vm.session.compat, number)
        dirty = self._vm.memory.dirty
        if flags and number != Cap.DIRTY_LOG_RING_ACQ_REL:  # whose flags Linux's generic code does not look at
            raise KvmError(EINVAL, reason=f"flags {flags:#x}")
        if number == Cap.MANUAL_DIRTY_LOG_PROTECT2:
            dirty.enable_manual(value, offered)
        elif number == Cap.HALT_POLL:
            if value >= 1 << 32:
                raise KvmError(EINVAL, reason="halt_poll_ns is a u32")
            self.halt_poll_ns = value
        elif number == Cap.DIRTY_LOG_RING_ACQ_REL and offered:
            with self._vm.lock:
                dirty.enable_ring(value & 0xFFFFFFFF)
        elif number == Cap.RISCV_MP_STATE_RESET and not self._vm.session.compat.is_6_12:
            self.mp_state_reset = True
        elif number == Cap.VM_GPA_BITS and not self._vm.session.compat.is_6_12:
            self._set_gpa_bits(value)
        else:
            raise KvmError(EINVAL, reason=f"capability {number} cannot be enabled")

    def _set_gpa_bits(self, bits: int) -> None:
        width = next((width for width in GPA_WIDTHS if bits <= width), None)
        if width is None:
            raise KvmError(EINVAL, reason=f"{bits} guest-physical address bits")
        with self._vm.lock:
            if self._vm.vcpus or len(self._vm.memory):
                raise KvmError(EBUSY, reason="set the address width before vCPUs and memslots")
            self.gpa_bits = width
