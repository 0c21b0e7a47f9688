"""Offsets of a vCPU's shared mapping: kvm_run, the doorbell words, the coalesced ring, the dirty ring.

Used with struct.Struct or memoryview casts on the exit path by both sides; so numbers only, no construct.
The mapping is GET_VCPU_MMAP_SIZE bytes (8192): page 0 kvm_run and doorbell, page 1 the VM's coalesced-MMIO
ring; a dirty ring is a mapping of its own. Whatever the client writes here is hostile: kvmcore reads only
what section 1.5 allows.
"""

from __future__ import annotations

import struct

PAGE = 4096
MMAP_SIZE = 2 * PAGE
KVM_RUN_SIZE = 2352

# struct kvm_run
REQUEST_INTERRUPT_WINDOW = 0
IMMEDIATE_EXIT = 1
EXIT_REASON = 8
READY_FOR_INTERRUPT_INJECTION = 12
IF_FLAG = 13
FLAGS = 14
CR8 = 16
APIC_BASE = 24
UNION = 32
UNION_SIZE = 256
KVM_VALID_REGS = 288
KVM_DIRTY_REGS = 296
SYNC_REGS = 304

# the union, by exit reason
MMIO_PHYS_ADDR, MMIO_DATA, MMIO_LEN, MMIO_IS_WRITE = 32, 40, 48, 52
SBI_EXTENSION_ID, SBI_FUNCTION_ID, SBI_ARGS, SBI_RET = 32, 40, 48, 96
CSR_NUM, CSR_NEW_VALUE, CSR_WRITE_MASK, CSR_RET_VALUE = 32, 40, 48, 56
SYSTEM_EVENT_TYPE, SYSTEM_EVENT_NDATA, SYSTEM_EVENT_DATA = 32, 36, 40
FAIL_ENTRY_REASON, FAIL_ENTRY_CPU = 32, 40
MEMORY_FAULT_FLAGS, MEMORY_FAULT_GPA, MEMORY_FAULT_SIZE = 32, 40, 48

# doorbell words, at the end of page 0 (ours; kvm_run ends at 2352)
DOORBELL_BELL = 4032
"""u32: incremented (and futex-woken) by whoever wants the server's vCPU thread to look."""
DOORBELL_REQUEST = 4036
"""u32: sequence number of the client's last RUN."""
DOORBELL_REPLY = 4040
"""u32: sequence number of the last RUN that the server answered."""
DOORBELL_RET = 4044
"""i32: that RUN's result."""
DOORBELL_ERRNO = 4048
"""u32: its errno when the result is -1."""
DOORBELL_KICK = 4052
"""u32: not zero while a kick is pending."""
DOORBELL_BELL_SLEEPS = 4056
"""u32: not zero while the vCPU thread sleeps on the bell: who rings has to wake it."""
DOORBELL_REPLY_SLEEPS = 4060
"""u32: not zero while the client sleeps on the reply."""

# the coalesced-MMIO ring, page 1
COALESCED_RING = PAGE
COALESCED_FIRST, COALESCED_LAST = COALESCED_RING, COALESCED_RING + 4
COALESCED_ENTRIES = COALESCED_RING + 8
COALESCED_ENTRY_SIZE = 24
COALESCED_MAX = (PAGE - 8) // COALESCED_ENTRY_SIZE
"""170 entries, of which one stays free."""

DIRTY_GFN_SIZE = 16
"""Bytes of one entry of a dirty ring: flags u32, slot u32, offset u64."""

MMIO = struct.Struct("<Q8sIB3x")
"""phys_addr, data, len, is_write, at UNION."""
MMIO_WORDS = struct.Struct("<QQIB3x")
"""The same, data as a number."""
SBI = struct.Struct("<QQ6Q2q")
"""extension_id, function_id, args, ret, at UNION."""
CSR = struct.Struct("<4Q")
"""csr_num, new_value, write_mask, ret_value, at UNION."""
MEMORY_FAULT = struct.Struct("<QQQ")
SYSTEM_EVENT = struct.Struct("<IIQ")
"""type, ndata, data[0], at UNION."""
COALESCED_ENTRY = struct.Struct("<QII8s")
"""phys_addr, len, pio, data."""
DIRTY_GFN = struct.Struct("<IIQ")
"""flags, slot, offset."""
U32 = struct.Struct("<I")
I32 = struct.Struct("<i")
U64 = struct.Struct("<Q")
