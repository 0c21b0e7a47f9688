"""Ioctls of a vCPU handle: one function per row of protocol/abi/ioctls.py, same name in lower case.

Called by kvmcore.ioctl.call as fn(vcpu, argument) with vcpu.mutex held (INTERRUPT alone without it, on the
I/O thread); see kvmcore/vm/objects.py. Structs come parsed; rows with a variable tail get the pointer.
"""

from __future__ import annotations

from array import array
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING, Any

from kvmcore.vm import mp_state, statistics
from kvmcore.vm.csr_access import SEI
from protocol.abi import structs
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.objects import Handle
    from kvmcore.vm.vcpu import Vcpu

_SIGSET_SIZE = 8


def run(vcpu: Vcpu, argument: int) -> int:
    """KVM_RUN (section 1.5). EINVAL: argument not 0."""
    if argument:
        raise KvmError(EINVAL, reason="the argument must be 0")
    return vcpu.run()


def interrupt(vcpu: Vcpu, argument: Any) -> None:
    """0xffffffff raises the supervisor external interrupt, any other value lowers it. Asynchronous."""
    if argument.irq == structs.INTERRUPT_SET:
        vcpu.hart.set_pending(SEI)
        vcpu.wake()
    else:
        vcpu.hart.clear_pending(SEI)
    vcpu.registers.interrupt_line_changed()


def get_one_reg(vcpu: Vcpu, argument: Any) -> None:
    """The value of a register goes to the caller's address."""
    vcpu.session.mm.copy_to_user(argument.addr, vcpu.registers.get(argument.id))


def set_one_reg(vcpu: Vcpu, argument: Any) -> None:
    """Write a register with the value at the caller's address."""
    value = vcpu.session.mm.copy_from_user(argument.addr, vcpu.registers.size(argument.id))
    vcpu.registers.set(argument.id, value)


def get_reg_list(vcpu: Vcpu, pointer: int) -> None:
    """n and that many ids at the argument. E2BIG, with n written, when there was no room for them."""
    mm = vcpu.session.mm
    room = structs.REG_LIST.parse(mm.copy_from_user(pointer, structs.REG_LIST.size)).n
    ids = vcpu.registers.ids()
    mm.copy_to_user(pointer, structs.REG_LIST.build(n=len(ids)))
    if room < len(ids):
        raise KvmError(E2BIG, reason=f"{len(ids)} registers")
    mm.copy_to_user(pointer + structs.REG_LIST.size, array("Q", ids).tobytes())


def get_mp_state(vcpu: Vcpu, argument: int) -> bytes:
    """RUNNABLE or STOPPED."""
    return structs.MP_STATE.build(mp_state=vcpu.mp_state)


def set_mp_state(vcpu: Vcpu, argument: Any) -> None:
    """RUNNABLE, STOPPED, or INIT_RECEIVED once its capability is on."""
    mp_state.set_mp_state(vcpu, argument.mp_state)


def set_guest_debug(vcpu: Vcpu, argument: Any) -> None:
    """With ENABLE, ebreak leaves to user space. Other control bits mean nothing here."""
    vcpu.hart.state.guest_debug = int(bool(argument.control & structs.GUESTDBG_ENABLE))


def set_signal_mask(vcpu: Vcpu, pointer: int) -> None:
    """A mask of signals that RUN would block. Stored, without effect: a kick is no signal. NULL resets."""
    if pointer == 0:
        vcpu.signal_mask = None
        return
    mm = vcpu.session.mm
    if structs.SIGNAL_MASK.parse(mm.copy_from_user(pointer, structs.SIGNAL_MASK.size)).len != _SIGSET_SIZE:
        raise KvmError(EINVAL, reason="a signal mask has 8 bytes")
    vcpu.signal_mask = mm.copy_from_user(pointer + structs.SIGNAL_MASK.size, _SIGSET_SIZE)


def get_stats_fd(vcpu: Vcpu, argument: int) -> Handle:
    """The vCPU's statistics file. The argument is ignored."""
    return statistics.vcpu_stats_file(vcpu)
