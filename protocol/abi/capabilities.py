"""KVM_CAP_*: their numbers, what each one opens, and the value that CHECK_EXTENSION gives (KVM_ABI section
1.4).

kvmcore's check_extension starts from value() and adjusts what depends on the VM (GPA bits, number of CPUs).
A capability that is not in VALUES is 0, as is any number that is not a capability: never an error.
"""

from __future__ import annotations

from enum import IntEnum

from protocol.abi.compat import Compat


class Cap(IntEnum):
    """Capability numbers of <linux/kvm.h> that mean something on RISC-V, and those whose absence is asked
    for.
    """

    IRQCHIP = 0
    USER_MEMORY = 3
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    COALESCED_MMIO = 15
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    SET_GUEST_DEBUG = 23
    IRQ_ROUTING = 25
    JOIN_MEMORY_REGIONS_WORKS = 30
    IRQFD = 32
    IOEVENTFD = 36
    INTERNAL_ERROR_DATA = 40
    MAX_VCPUS = 66
    ONE_REG = 70
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    DEVICE_CTRL = 89
    ENABLE_CAP_VM = 98
    CHECK_EXTENSION_VM = 105
    IOEVENTFD_ANY_LENGTH = 122
    MAX_VCPU_ID = 128
    IMMEDIATE_EXIT = 136
    COALESCED_PIO = 162
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    HALT_POLL = 182
    STEAL_TIME = 187
    DIRTY_LOG_RING = 192
    BINARY_STATS_FD = 203
    VM_GPA_BITS = 207
    SYSTEM_EVENT_DATA = 215
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    RISCV_MP_STATE_RESET = 242
    GUEST_MEMFD_FLAGS = 244


MAX_VCPUS = 1024
NR_MEMSLOTS = 32767
MAX_IRQ_ROUTES = 4096
MAX_DIRTY_RING_BYTES = 1 << 20
COALESCED_MMIO_PAGE = 1
"""Page of the vCPU mapping that holds the coalesced ring."""
DIRTY_RING_PAGE = 64
"""First page of the vCPU mapping that holds its dirty ring."""
MANUAL_PROTECT_ENABLE, INITIALLY_SET = 1, 2
GUEST_MEMFD_FLAGS = 3
"""Flags that CREATE_GUEST_MEMFD takes: MMAP, INIT_SHARED."""

# What each capability is worth on Linux 7.2 (and opens: the rows of ioctls.IOCTLS that name it).
_LINUX_7_2: dict[Cap, int] = {
    Cap.IRQCHIP: 1,
    Cap.USER_MEMORY: 1,
    Cap.NR_MEMSLOTS: NR_MEMSLOTS,
    Cap.MP_STATE: 1,
    Cap.COALESCED_MMIO: COALESCED_MMIO_PAGE,
    Cap.SYNC_MMU: 1,
    Cap.DESTROY_MEMORY_REGION_WORKS: 1,
    Cap.SET_GUEST_DEBUG: 1,
    Cap.IRQ_ROUTING: MAX_IRQ_ROUTES,
    Cap.JOIN_MEMORY_REGIONS_WORKS: 1,
    Cap.IRQFD: 1,
    Cap.IOEVENTFD: 1,
    Cap.INTERNAL_ERROR_DATA: 1,
    Cap.MAX_VCPUS: MAX_VCPUS,
    Cap.ONE_REG: 1,
    Cap.SIGNAL_MSI: 1,
    Cap.READONLY_MEM: 1,
    Cap.DEVICE_CTRL: 1,
    Cap.ENABLE_CAP_VM: 1,
    Cap.CHECK_EXTENSION_VM: 1,
    Cap.IOEVENTFD_ANY_LENGTH: 1,
    Cap.IMMEDIATE_EXIT: 1,
    Cap.COALESCED_PIO: 1,
    Cap.MANUAL_DIRTY_LOG_PROTECT2: MANUAL_PROTECT_ENABLE | INITIALLY_SET,
    Cap.HALT_POLL: 1,
    Cap.BINARY_STATS_FD: 1,
    Cap.VM_GPA_BITS: 59,
    Cap.SYSTEM_EVENT_DATA: 1,
    Cap.DIRTY_LOG_RING_ACQ_REL: MAX_DIRTY_RING_BYTES,
    Cap.USER_MEMORY2: 1,
}
_LINUX_6_12 = {
    **_LINUX_7_2,
    Cap.MANUAL_DIRTY_LOG_PROTECT2: MANUAL_PROTECT_ENABLE,
    Cap.DIRTY_LOG_RING_ACQ_REL: 0,
}
_EXTENDED = {**_LINUX_7_2, Cap.GUEST_MEMFD: 1, Cap.GUEST_MEMFD_FLAGS: GUEST_MEMFD_FLAGS}

VALUES: dict[Compat, dict[Cap, int]] = {
    Compat.DEFAULT: _EXTENDED,
    Compat.STRICT: _LINUX_7_2,
    Compat.LINUX_7_2: _LINUX_7_2,
    Compat.LINUX_6_12: _LINUX_6_12,
}


def value(compat: Compat, number: int) -> int:
    """CHECK_EXTENSION's answer as far as it is fixed: 0 for whatever is not a capability, and for NR_VCPUS.
    """
    try:
        return VALUES[compat].get(Cap(number), 0)
    except ValueError:
        return 0
