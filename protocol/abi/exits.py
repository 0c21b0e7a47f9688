"""KVM_EXIT_*: why KVM_RUN returned, and which members of kvm_run then mean something (KVM_ABI 1.5, 1.6).

kvmcore/vm/exits.py fills the page, the client's run loop reads it, both by run_page's offsets. MEMBERS is for
documentation, tracing and tests. Nothing here touches a page.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """kvm_run.exit_reason. Those that RISC-V never produces are absent."""

    UNKNOWN = 0
    """Beside an errno other than EINTR only."""
    DEBUG = 4
    MMIO = 6
    FAIL_ENTRY = 9
    INTR = 10
    """Beside EINTR: a kick or immediate_exit while the guest could have run."""
    SYSTEM_EVENT = 24
    DIRTY_RING_FULL = 31
    RISCV_SBI = 35
    RISCV_CSR = 36
    MEMORY_FAULT = 39


class SystemEvent(IntEnum):
    """kvm_run.system_event.type."""

    SHUTDOWN = 1
    RESET = 2


MEMBERS: dict[Exit, dict[str, tuple[int, str]]] = {
    Exit.MMIO: {"phys_addr": (32, "u64"), "data": (40, "u8[8]"), "len": (48, "u32"), "is_write": (52, "u8")},
    Exit.FAIL_ENTRY: {"hardware_entry_failure_reason": (32, "u64"), "cpu": (40, "u32")},
    Exit.SYSTEM_EVENT: {"type": (32, "u32"), "ndata": (36, "u32"), "data": (40, "u64[16]")},
    Exit.RISCV_SBI: {
        "extension_id": (32, "u64"),
        "function_id": (40, "u64"),
        "args": (48, "u64[6]"),
        "ret": (96, "u64[2]"),
    },
    Exit.RISCV_CSR: {
        "csr_num": (32, "u64"),
        "new_value": (40, "u64"),
        "write_mask": (48, "u64"),
        "ret_value": (56, "u64"),
    },
    Exit.MEMORY_FAULT: {"flags": (32, "u64"), "gpa": (40, "u64"), "size": (48, "u64")},
}
"""exit reason -> member -> (offset in kvm_run, C type). Reasons without an entry have no members."""
