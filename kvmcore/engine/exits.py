"""Why native code was left: the values of hart.run().

Used by machine.py, by kvmcore/vm/exits.py and by the emitter (as constants). Never touches state.
"""

from __future__ import annotations

from enum import IntEnum


class ExitKind(IntEnum):
    """What hart.run() returns. pc is at the instruction that caused it;
    nothing of that instruction is done.
    """

    NONE = 0
    """Never returned."""
    KICK = 1
    """hart.kick() was called, or quiesce() wants the hart out; nothing to do."""
    MMIO_READ = 2
    """A plain integer load where no memory is: exit_gpa, exit_va, exit_len.

    Finish with complete_mmio(data).
    """
    MMIO_WRITE = 3
    """A plain integer store where no (writable) memory is: and exit_data. Finish with complete_mmio(0)."""
    ECALL = 4
    """ecall from S-mode: arguments in x10 to x17. Finish with a0, a1 and advance(4)."""
    WFI = 5
    """wfi with nothing pending; pc is behind it. Sleep until deadline_ns(), an interrupt or a kick."""
    CSR = 6
    """A CSR that kvmcore does not answer: exit_csr, exit_data (new value), exit_mask.

    Finish with complete_csr().
    """
    EBREAK = 7
    """ebreak while guest_debug is set."""
    EMULATE = 8
    """One instruction for the reference. Handled inside Hart.run()."""
    ERROR = 9
    """The access cannot be done at all:
    exit_errno says how the KVM_RUN fails (KVM_ABI 1.5), exit_gpa where.
    """
    DIRTY_BUDGET = 10
    """dirty_budget ran out: the store that would dirty one page more has not happened."""
    POOL_FULL = 11
    """The pool of code pages is full. Handled inside Hart.run()."""
    PAGE_ABSENT = 14
    """The page at exit_gpa is not there yet (its bit in the slot's userfault bitmap is set): any access to it, fetches and
    page-table walks too. Nothing has happened; run again when it is."""
    STOPPED = 12
    """The machine is quiesced: not entered. Handled inside Hart.run()."""
    USER = 15
    """An MMIO exit that is in kvm_run already; KVM_RUN returns 0. `pending_access` says how it is completed."""
    PROFILE = 13
    """The samples are full, or there is a new decoded page. Handled inside Hart.run()."""


class Wanted(IntEnum):
    """What serve_runs() returns besides an ExitKind."""

    SUMMONED = 0x100
    """hart.summon() was called; the vCPU is nobody's."""
    BUSY = 0x101
    """A RUN has been taken, but the vCPU is somebody else's at this moment."""
    RUN = 0x102
    """A RUN has been taken, the vCPU is ours, and Python does it from its beginning."""
