"""One function per reason why native code was left: answers it here, or fills kvm_run for user space
(KVM_ABI 1.5, 1.6).

Called by vcpu.run() on the vCPU's thread. serve() says whether the guest goes on; complete() finishes, at
the next KVM_RUN, what user space has answered. What is pending is private (vcpu.pending): of the page, only
the answer's data is read, never what kind of exit it was. Errors leave exit_reason 0 and the guest where it
was.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT, EIO, EOPNOTSUPP
from typing import TYPE_CHECKING, NamedTuple

from kvmcore import sbi
from kvmcore.engine.completion import packed
from kvmcore.engine.exits import ExitKind
from kvmcore.sbi.extension import After, Result
from kvmcore.vm import csr_access, mp_state
from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.exits import Exit, SystemEvent
from protocol.abi.structs import MEMORY_EXIT_FLAG_USERFAULT
from protocol.abi.structs_riscv import SBI_NOT_SUPPORTED
from protocol.channel.shared_memory import PAGE

if TYPE_CHECKING:
    from kvmcore.vm.dirty import DirtyRing
    from kvmcore.vm.vcpu import Vcpu

_U64 = (1 << 64) - 1
_A0, _A1, _A6, _A7 = 10, 11, 16, 17


class Pending(NamedTuple):
    """An exit that user space answers, but for MMIO: that is the hart's `pending_access`, native code's too."""

    reason: Exit


# -- the next KVM_RUN ------------------------------------------------------------------------------


def complete(vcpu: Vcpu) -> None:
    """Finish the pending exit with the answer in the page. Nothing pending: nothing happens."""
    hart, page = vcpu.hart, vcpu.page
    if hart.state.pending_access:
        hart.state.pending_access = 0
        (answer,) = run_page.U64.unpack_from(page, run_page.MMIO_DATA)
        hart.complete_mmio(answer)
        return
    pending, vcpu.pending = vcpu.pending, None
    if pending is None:
        return
    if pending.reason == Exit.RISCV_SBI:
        error, value = run_page.SBI.unpack_from(page, run_page.UNION)[8:]
        _return_from_sbi(vcpu, error, value)
    elif pending.reason == Exit.RISCV_CSR:
        (answer,) = run_page.U64.unpack_from(page, run_page.CSR_RET_VALUE)
        hart.complete_csr(answer)


def before_entry(vcpu: Vcpu) -> bool:
    """Before each entry into the guest: False when RUN must return 0 instead (the dirty ring is full)."""
    ring = vcpu.dirty_ring
    if ring is None:
        return True
    _harvest(vcpu, ring)
    if ring.full:
        vcpu.set_exit_reason(Exit.DIRTY_RING_FULL)
        return False
    vcpu.hart.state.dirty_budget = ring.budget = ring.soft_limit - ring.used
    return True


def after_run(vcpu: Vcpu) -> None:
    """RUN returns: what the guest has dirtied so far is in the ring when the client looks."""
    if vcpu.dirty_ring is not None:
        _harvest(vcpu, vcpu.dirty_ring)


def _harvest(vcpu: Vcpu, ring: DirtyRing) -> None:
    """Look for newly dirty pages, unless this hart has made none since the last look."""
    dirty = vcpu.vm.memory.dirty
    if dirty.wrote or vcpu.hart.state.dirty_budget != ring.budget:
        dirty.collect(ring)


# -- leaving native code ---------------------------------------------------------------------------


def serve(vcpu: Vcpu, kind: int) -> bool:
    """Deal with an exit of the engine. True: go on in the guest. False: RUN returns 0, the page is filled."""
    vcpu.stats.exits += 1
    return _SERVERS[kind](vcpu)


def _mmio(vcpu: Vcpu, is_write: bool) -> bool:
    """A load or store where the engine found no memory it may use."""
    state = vcpu.hart.state
    gpa, length = state.exit_gpa, state.exit_len
    slot = vcpu.vm.memory.lookup(gpa)
    if slot is not None and slot.host(gpa) == 0:
        raise KvmError(EFAULT, "RUN", f"nothing is mapped behind guest address {gpa:#x}")
    if gpa % length:
        raise KvmError(EIO, "RUN", f"misaligned access of {length} bytes to device address {gpa:#x}")
    data = (state.exit_data & _U64).to_bytes(8, "little")[:length] if is_write else b""
    chip = vcpu.vm.irqchip
    if is_write:
        if (chip is not None and chip.store(gpa, data)) or vcpu.vm.eventfds.write(gpa, data):
            vcpu.stats.mmio_exit_kernel += 1
            vcpu.hart.complete_mmio(0)
            return True
    elif chip is not None:
        answer = chip.load(gpa, length)
        if answer is not None:
            vcpu.stats.mmio_exit_kernel += 1
            vcpu.hart.complete_mmio(int.from_bytes(answer, "little"))
            return True
    vcpu.stats.mmio_exit_user += 1
    page = vcpu.page
    if is_write:
        page[run_page.MMIO_DATA : run_page.MMIO_DATA + length] = data
    run_page.U64.pack_into(page, run_page.MMIO_PHYS_ADDR, gpa)
    run_page.U32.pack_into(page, run_page.MMIO_LEN, length)
    page[run_page.MMIO_IS_WRITE] = is_write
    state.pending_access = packed(state.exit_insn)
    vcpu.set_exit_reason(Exit.MMIO)
    return False


def _mmio_read(vcpu: Vcpu) -> bool:
    return _mmio(vcpu, False)


def _mmio_write(vcpu: Vcpu) -> bool:
    return _mmio(vcpu, True)


def _ecall(vcpu: Vcpu) -> bool:
    """An SBI call: a7 extension, a6 function, a0..a5 arguments."""
    vcpu.stats.ecall_exit_stat += 1
    x = vcpu.hart.state.x
    extension = sbi.find(x[_A7])
    if extension is None or not vcpu.hypercalls.allows(extension):
        _return_from_sbi(vcpu, SBI_NOT_SUPPORTED, 0)
        return True
    result = extension.call(vcpu.hypercalls, x[_A6], x[_A0 : _A0 + 6])
    if result.after is After.FORWARD:
        return _forward_sbi(vcpu)
    if result.after in (After.SHUTDOWN, After.RESET):
        return _system_event(vcpu, result)
    _return_from_sbi(vcpu, result.error, result.value)
    if result.after is After.SLEEP:
        vcpu.sleep_now = not csr_access.interrupt_pending(vcpu.hart)
    return True


def _return_from_sbi(vcpu: Vcpu, error: int, value: int) -> None:
    x = vcpu.hart.state.x
    x[_A0] = error & _U64
    x[_A1] = value & _U64
    vcpu.hart.advance(4)


def _forward_sbi(vcpu: Vcpu) -> bool:
    x = vcpu.hart.state.x
    run_page.SBI.pack_into(vcpu.page, run_page.UNION, x[_A7], x[_A6], *x[_A0 : _A0 + 6], SBI_NOT_SUPPORTED, 0)
    vcpu.pending = Pending(Exit.RISCV_SBI)
    vcpu.set_exit_reason(Exit.RISCV_SBI)
    return False


def _system_event(vcpu: Vcpu, result: Result) -> bool:
    """SRST: every vCPU stops; this one with pc still at the ecall."""
    kind = SystemEvent.SHUTDOWN if result.after is After.SHUTDOWN else SystemEvent.RESET
    mp_state.stop_all(vcpu.vm)
    vcpu.page[run_page.UNION : run_page.UNION + run_page.UNION_SIZE] = bytes(run_page.UNION_SIZE)
    run_page.SYSTEM_EVENT.pack_into(vcpu.page, run_page.UNION, kind, 1, result.value)
    vcpu.set_exit_reason(Exit.SYSTEM_EVENT)
    return False


def _csr(vcpu: Vcpu) -> bool:
    """A CSR that only user space can answer: seed, and the AIA's while there is no IMSIC."""
    vcpu.stats.csr_exit_user += 1
    state = vcpu.hart.state
    run_page.CSR.pack_into(
        vcpu.page, run_page.UNION, state.exit_csr, state.exit_data & _U64, state.exit_mask & _U64, 0
    )
    vcpu.pending = Pending(Exit.RISCV_CSR)
    vcpu.set_exit_reason(Exit.RISCV_CSR)
    return False


def _page_absent(vcpu: Vcpu) -> bool:
    """KVM_MEM_USERFAULT: user space has yet to put the page there. RUN fails with EFAULT, and the page says where."""
    gpa = int(vcpu.hart.state.exit_gpa) & ~(PAGE - 1)
    run_page.MEMORY_FAULT.pack_into(vcpu.page, run_page.UNION, MEMORY_EXIT_FLAG_USERFAULT, gpa, PAGE)
    vcpu.set_exit_reason(Exit.MEMORY_FAULT)
    raise KvmError(EFAULT, "RUN", f"the page at {gpa:#x} is not there yet")


def _breakpoint(vcpu: Vcpu) -> bool:
    """ebreak while guest debugging is on; pc stays on it."""
    vcpu.set_exit_reason(Exit.DEBUG)
    return False


def _error(vcpu: Vcpu) -> bool:
    """An access that cannot be emulated, or memory that is not there: the ioctl fails, the guest has not
    moved.
    """
    errno = vcpu.hart.state.exit_errno
    slot = vcpu.vm.memory.lookup(vcpu.hart.state.exit_gpa)
    if errno == EOPNOTSUPP and slot is not None and slot.host(vcpu.hart.state.exit_gpa) == 0:
        errno = EFAULT
    raise KvmError(errno, "RUN", "the guest's access cannot be emulated")


def _dirty_budget(vcpu: Vcpu) -> bool:
    """The dirty ring is about to be full: before_entry() decides."""
    return True


_SERVERS: dict[int, Callable[[Vcpu], bool]] = {
    ExitKind.MMIO_READ: _mmio_read,
    ExitKind.MMIO_WRITE: _mmio_write,
    ExitKind.ECALL: _ecall,
    ExitKind.CSR: _csr,
    ExitKind.EBREAK: _breakpoint,
    ExitKind.ERROR: _error,
    ExitKind.PAGE_ABSENT: _page_absent,
    ExitKind.DIRTY_BUDGET: _dirty_budget,
}


def reset_hart(vcpu: Vcpu, pc: int, opaque: int) -> None:
    """Apply HSM hart_start's entry state; called by the vCPU's thread on its way into the guest."""
    mp_state.start_at(vcpu, pc, opaque)
