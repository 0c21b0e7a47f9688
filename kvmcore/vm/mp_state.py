"""Power states of a vCPU, and what a reset makes of its hart (KVM_ABI 1.12, 2.1 HSM).

Called by kvmcore/ioctl/vcpu.py (GET/SET_MP_STATE), by the SBI through hypercalls.py, and by the vCPU's
thread when it applies a start that another hart asked for. vm.power_lock decides races between starting and
stopping.
"""

from __future__ import annotations

from errno import EINVAL
from typing import TYPE_CHECKING

from protocol.abi import structs, structs_riscv
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu
    from kvmcore.vm.vm import Vm

RUNNABLE, INIT_RECEIVED, STOPPED = (
    structs.MP_STATE_RUNNABLE,
    structs.MP_STATE_INIT_RECEIVED,
    structs.MP_STATE_STOPPED,
)


def set_mp_state(vcpu: Vcpu, state: int) -> None:
    """KVM_SET_MP_STATE. INIT_RECEIVED (with its capability) resets the hart and leaves the state. Else
    EINVAL.
    """
    with vcpu.vm.power_lock:
        if state == RUNNABLE:
            vcpu.power_on()
        elif state == STOPPED:
            vcpu.power_off()
        elif state == INIT_RECEIVED and vcpu.vm.caps.mp_state_reset:
            reset(vcpu)
        else:
            raise KvmError(EINVAL, reason=f"mp_state {state}")


def reset(vcpu: Vcpu) -> None:
    """The state of a new vCPU: everything 0, S-mode, no timer (KVM_ABI 1.11)."""
    vcpu.pending = None
    vcpu.hart.state.pending_access = 0
    vcpu.registers.reset()


def start_at(vcpu: Vcpu, pc: int, opaque: int) -> None:
    """HSM hart_start's entry state, on the vCPU's own thread: a0 = hart id, a1 = opaque, satp 0, interrupts
    off.
    """
    reset(vcpu)
    state = vcpu.hart.state
    state.pc = pc
    state.mode = structs_riscv.MODE_S
    state.x[10] = vcpu.id
    state.x[11] = opaque


def stop_all(vm: Vm) -> None:
    """Every vCPU is STOPPED (system reset). The calling thread's own vCPU is out of guest code already."""
    with vm.power_lock:
        for vcpu in vm.vcpus:
            vcpu.power_off()
