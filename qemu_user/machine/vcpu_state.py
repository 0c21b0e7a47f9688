"""A vCPU's state as data: every register that KVM_GET_REG_LIST names, and whether it runs.

Read and written through ONE_REG while the vCPU is parked (run_loop.py has completed its last exit: KVM_ABI 1.5).
Used by migration/machine_state.py. Knows no register by meaning but those that need an order or a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from protocol.abi import structs_riscv as riscv
from protocol.abi.errors import KvmError
from protocol.abi.structs import MP_STATE_RUNNABLE, MP_STATE_STOPPED
from qemu_user.devices.device import State, StateError, require

if TYPE_CHECKING:
    from protocol.client import Vcpu
    from protocol.client.batch import Batch

_MASK = (1 << 52) - 1
"""Type, subtype and index of a register id: architecture and size are ours to add."""
_TIME, _TIMER_STATE = riscv.TIMER_ID["time"], riscv.TIMER_ID["state"]
_SIP = riscv.CSR_ID["sip"]
_EXTERNAL_PENDING = 1 << 9
MAX_REGISTERS = 4096


class VcpuState(State, frozen=True, tag="vcpu", kw_only=True):
    """`registers`: (id without architecture bits, value). The VM's time is not here: see MachineState."""

    version: Literal[1] = 1
    index: int
    mp_state: int
    registers: list[tuple[int, int]]


def save(vcpu: Vcpu, batch: Batch) -> Callable[[], VcpuState]:
    """Ask for the state of a parked vCPU; what gives it when the batch was sent. KvmError."""
    ids = _registers(vcpu)
    values, mp_state = batch.get_state(vcpu, ids), batch.get_mp_state(vcpu)

    def saved() -> VcpuState:
        registers = []
        for register, value in zip(ids, values.words(), strict=True):
            # What an interrupt controller holds up is its own state; stored here it could never fall again.
            kept = value & ~_EXTERNAL_PENDING if register == _SIP else value
            registers.append((register & ~(0xF << 60), kept))
        return VcpuState(index=vcpu.id, mp_state=mp_state.number(), registers=registers)

    return saved


_known: WeakKeyDictionary[Vcpu, list[int]] = WeakKeyDictionary()


def _registers(vcpu: Vcpu) -> list[int]:
    """The registers that are a vCPU's state. Asked once: the list is its configuration's, which does not change."""
    found = _known.get(vcpu)
    if found is None:
        found = [register for register in vcpu.get_reg_list() if register & _MASK != _TIME & _MASK]
        _known[vcpu] = found
    return found


def check(state: VcpuState, vcpu: Vcpu) -> None:
    """StateError unless restore() can take `state`: a register that this host lacks, or one that it has and the
    state lacks."""
    where = f"CPU {state.index}"
    require(state.mp_state in (MP_STATE_RUNNABLE, MP_STATE_STOPPED), f"{where}: mp_state {state.mp_state}")
    require(len(state.registers) <= MAX_REGISTERS, f"{where}: too many registers")
    ours = {register & ~(0xF << 60) for register in _registers(vcpu)}
    theirs = {register for register, _ in state.registers}
    for register, value in state.registers:
        require(register in ours, f"{where}: register {register:#x} does not exist on this host")
        require(0 <= value < 1 << 8 * riscv.one_reg_size(register), f"{where}: register {register:#x} out of range")
    missing = sorted(ours - theirs)
    require(not missing, f"{where}: registers missing, the first {missing[0] if missing else 0:#x}")


def restore(state: VcpuState, vcpu: Vcpu, batch: Batch, before: VcpuState | None = None) -> Callable[[], None]:
    """Ask for a checked state to be written into a vCPU that has not run; one that was restored `before` needs only what
    differs. Returns what looks at the answers: StateError, a value that this host refuses (an ISA extension that it does not
    have, say)."""
    same = set(before.registers) if before is not None else set()
    wanted = [(pair[0] | riscv.ARCH_RISCV, pair[1]) for pair in state.registers if pair not in same]
    # A timer that is off is how a new vCPU has it, and cannot be said (KVM_ABI 1.11).
    words = [word for pair in wanted if pair != (_TIMER_STATE, 0) for word in pair]
    answers = [batch.set_state(vcpu, words)] if words else []
    if before is None or before.mp_state != state.mp_state:
        answers.append(batch.set_mp_state(vcpu, state.mp_state))

    def done() -> None:
        try:
            for answer in answers:
                answer.checked()
        except KvmError as error:
            raise StateError(f"CPU {state.index}: {error}") from error

    return done
