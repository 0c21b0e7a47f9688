"""What the table of ioctls does not say about its arguments: which values of a member are worth trying.

One row per struct member; members without a row get boundary values of their type. To add a rule, add a row: a
function of a random.Random that gives a value (qemu_user/fuzz/sequence.py says what values are).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from protocol.abi import structs_riscv as riscv
from protocol.abi.capabilities import Cap

PAGE = 4096
MAPS = 4
"""Segments of the session's address space that sequences map."""
MAP_SIZE = 16 * PAGE
Rule = Callable[[Random], Any]

BOUNDARY = {
    bits: sorted(
        {0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 4095, 4096, 4097, 65535, 65536}
        | {
            (1 << n) + d for n in (8, 16, 31, 32, 44, 56, 63, 64) if n <= bits for d in (-1, 0, 1)
            if (1 << n) + d < 1 << bits
        }
    )
    for bits in (8, 16, 32, 64)
}  # fmt: skip


def of(*values: Any) -> Rule:
    """One of these."""
    return lambda rng: rng.choice(values)


def flags(*bits: int, rare: tuple[int, ...] = (0x10, 0x100, 1 << 31)) -> Rule:
    """Any combination of these bits, now and then with one that means nothing."""

    def pick(rng: Random) -> int:
        value = sum(bit for bit in bits if rng.random() < 0.35)
        return value | rng.choice(rare) if rng.random() < 0.06 else value

    return pick


def mostly(often: Rule, seldom: Rule, chance: float = 0.85) -> Rule:
    """The first, else the second."""
    return lambda rng: often(rng) if rng.random() < chance else seldom(rng)


def boundary(bits: int) -> Rule:
    """A value at an edge of an unsigned type, or any."""
    return lambda rng: rng.choice(BOUNDARY[bits]) if rng.random() < 0.8 else rng.getrandbits(bits)


def reference(kind: str) -> Rule:
    """The number of a resource."""
    return lambda rng: {"ref": [kind, rng.randrange(3)]}


def room(*sizes: int) -> Rule:
    """A pointer to room of one of these sizes, or to nothing."""
    return lambda rng: {"out": rng.choice(sizes)} if rng.random() < 0.9 else rng.choice((0, 1, 1 << 63))


def value(*values: int, size: int = 8) -> Rule:
    """A pointer to one of these values."""

    def pick(rng: Random) -> Any:
        number = rng.choice(values) if values and rng.random() < 0.7 else boundary(size * 8)(rng)
        return {"in": (number & (1 << 8 * size) - 1).to_bytes(size, "little").hex()}

    return pick


_U32, _U64 = boundary(32), boundary(64)
_DESCRIPTOR = mostly(reference("eventfd"), of(0, 0xFFFFFFFF, 0xFFFF, 1 << 16, {"ref": ["vm", 0]}), 0.9)
_SLOT = mostly(of(0, 0, 0, 1, 2, 3), of(32766, 32767, 0xFFFF, 1 << 16, (1 << 16) + 1))
_GPA = mostly(
    of(*(0x80000000 + i * MAP_SIZE // 2 for i in range(8)), 0, 0x10000000),
    mostly(of(0x80000800, (1 << 64) - PAGE, 1 << 59, 1 << 60), _U64),
)
_BYTES = mostly(of(0, PAGE, 2 * PAGE, MAP_SIZE // 2, MAP_SIZE), mostly(of(PAGE // 2, 1 << 43, 1 << 44), _U64), 0.9)
_HVA = mostly(
    lambda rng: {"map": rng.randrange(MAPS) * MAP_SIZE + rng.choice((0, 0, PAGE, MAP_SIZE // 2))}, of(0, 1, PAGE, 1 << 63)
)
_ADDRESS = mostly(of(0x10000000, 0x10000004, 0x10000008, 0x10000100, 0x80000000, 0x80001000), _U64)
_CAP_VALUE = mostly(of(0, 1, 2, 3, 4, 41, 50, 59, 60, PAGE, 65536, 1 << 20, 1 << 30), _U64)
_REG_VALUE = value(0, 1, 5, 0x80000000, 0x80000002, 10_000_000)
_ATTR_VALUE = value(0, 1, 63, 96, 255, 2047, 0x28000000, 0x28001000, 0xC000000)
_IRQ = mostly(of(0, 1, 5, 31, 32, 95, 96, 97, 1023), _U32)

_REGISTERS = (
    *riscv.CONFIG_ID.values(), *riscv.CORE_ID.values(), *riscv.CSR_ID.values(), *riscv.CSR_AIA_ID.values(),
    *riscv.TIMER_ID.values(), *riscv.FP_D_ID.values(),
    *(riscv.one_reg(riscv.FP_F, i, 0, riscv.SIZE_U32) for i in (0, 31, 32)),
    *(riscv.one_reg(riscv.ISA_EXT, ext) for ext in riscv.IsaExt),
    *(riscv.one_reg(riscv.ISA_EXT, i, sub) for sub in (1, 2) for i in (0, 1)),
    *(riscv.one_reg(riscv.SBI_EXT, ext) for ext in riscv.SbiExt),
    *(riscv.one_reg(riscv.SBI_STATE, i, sub) for sub in (0, 1) for i in (0, 1)),
)  # fmt: skip


def _register(rng: Random) -> int:
    if rng.random() < 0.8:
        return rng.choice(_REGISTERS)
    return riscv.one_reg(rng.randrange(12), rng.choice((0, 1, 8, 33, 0xFFFF)), rng.randrange(4), rng.choice((0, 2, 3, 15)))


RULES: dict[tuple[str, str], Rule] = {
    **{
        (struct, member): rule
        for struct in ("kvm_userspace_memory_region", "kvm_userspace_memory_region2")
        for member, rule in (("slot", _SLOT), ("guest_phys_addr", _GPA), ("memory_size", _BYTES), ("userspace_addr", _HVA))
    },
    ("kvm_userspace_memory_region", "flags"): flags(1, 2, rare=(4, 8, 16, 1 << 31)),
    ("kvm_userspace_memory_region2", "flags"): flags(1, 2, 4, 8),
    ("kvm_userspace_memory_region2", "guest_memfd"): mostly(reference("memfd"), _DESCRIPTOR),
    ("kvm_userspace_memory_region2", "guest_memfd_offset"): mostly(of(0, 0, PAGE, 8 * PAGE), _U64),
    ("kvm_userspace_memory_region2", "userfault_bitmap"): mostly(_HVA, _U64),
    ("kvm_dirty_log", "slot"): _SLOT,
    ("kvm_dirty_log", "dirty_bitmap"): room(8, 8, 16, 7),
    ("kvm_clear_dirty_log", "slot"): _SLOT,
    ("kvm_clear_dirty_log", "num_pages"): mostly(of(0, 16, 64, 8), _U32),
    ("kvm_clear_dirty_log", "first_page"): mostly(of(0, 0, 64), _U64),
    ("kvm_clear_dirty_log", "dirty_bitmap"): value(0, (1 << 64) - 1),
    ("kvm_irq_level", "irq"): _IRQ,
    ("kvm_irq_level", "level"): of(0, 1, 0xFFFFFFFF),
    ("kvm_coalesced_mmio_zone", "addr"): _ADDRESS,
    ("kvm_coalesced_mmio_zone", "size"): mostly(of(0, 4, 8, PAGE), _U32),
    ("kvm_coalesced_mmio_zone", "pio"): mostly(of(0, 0, 1), _U32),
    ("kvm_irqfd", "fd"): _DESCRIPTOR,
    ("kvm_irqfd", "gsi"): _IRQ,
    ("kvm_irqfd", "flags"): flags(1, 2),
    ("kvm_irqfd", "resamplefd"): _DESCRIPTOR,
    ("kvm_ioeventfd", "addr"): _ADDRESS,
    ("kvm_ioeventfd", "len"): mostly(of(0, 1, 2, 4, 8), _U32),
    ("kvm_ioeventfd", "fd"): mostly(reference("eventfd"), of(-1, 0, 65536, -(1 << 31))),
    ("kvm_ioeventfd", "flags"): flags(1, 2, 4, rare=(8, 16, 32, 0x100, 1 << 31)),
    ("kvm_ioeventfd", "datamatch"): mostly(of(0, 1, 2), _U64),
    ("kvm_enable_cap", "cap"): mostly(
        of(Cap.MANUAL_DIRTY_LOG_PROTECT2, Cap.HALT_POLL, Cap.VM_GPA_BITS, Cap.DIRTY_LOG_RING_ACQ_REL,
           Cap.RISCV_MP_STATE_RESET, Cap.DIRTY_LOG_RING, Cap.DIRTY_LOG_RING_WITH_BITMAP), _U32),
    ("kvm_enable_cap", "flags"): mostly(of(0), _U32, 0.95),
    ("kvm_enable_cap", "args"): lambda rng: [_CAP_VALUE(rng), 0, 0, 0],
    ("kvm_irq_routing", "nr"): mostly(of(0, 1, 2, 3), of(4096, 4097, 5000, 0xFFFFFFFF)),
    ("kvm_irq_routing", "flags"): mostly(of(0), _U32, 0.9),
    ("kvm_irq_routing_entry", "gsi"): mostly(_IRQ, of(4095, 4096)),
    ("kvm_irq_routing_entry", "type"): mostly(of(1, 2), of(0, 3, 9)),
    ("kvm_irq_routing_entry", "flags"): mostly(of(0, 0, 1), _U32),
    ("kvm_one_reg", "id"): _register,
    ("kvm_one_reg", "addr"): mostly(_REG_VALUE, room(8, 4, 16), 0.5),
    ("kvm_reg_list", "n"): mostly(of(0, 1, 200, 256), _U64),
    ("kvm_msi", "address_lo"): mostly(of(0x28000000, 0x28001000, 0x28000004, 0), _U32),
    ("kvm_msi", "address_hi"): mostly(of(0), _U32),
    ("kvm_msi", "data"): mostly(of(0, 1, 5, 255, 256), _U32),
    ("kvm_msi", "flags"): mostly(of(0, 1), _U32),
    ("kvm_mp_state", "mp_state"): mostly(of(0, 2, 5), of(1, 3, 9, 0xFFFFFFFF)),
    ("kvm_interrupt", "irq"): mostly(of(0xFFFFFFFF, 0xFFFFFFFE), _U32),
    ("kvm_signal_mask", "len"): mostly(of(8), of(0, 4, 16, 0xFFFFFFFF)),
    ("kvm_create_device", "type"): mostly(of(11, 11, 11, 4), _U32),
    ("kvm_create_device", "flags"): mostly(of(0, 0, 0, 1), _U32),
    ("kvm_device_attr", "flags"): mostly(of(0), _U32),
    ("kvm_device_attr", "group"): mostly(of(*riscv.AiaGroup), _U32),
    ("kvm_device_attr", "attr"): mostly(
        of(*range(8), 0, 0x4, 0x1FC, 0x1CDC, 0x1DDC, 0x2000, 0x3000, 0x3FFC, 0x4000,
           0x70, 0x72, 0x80, 0x81, 0xC0, 0x1070, 0x1BC0, 0x1C00, 0x1CE0, 0x1D00, 0x1E00, 0x1EDC, 0x1F00, 0x1FDC,
           0x3004, 0x3008), _U64),
    ("kvm_device_attr", "addr"): mostly(_ATTR_VALUE, room(8, 4), 0.7),
    ("kvm_create_guest_memfd", "size"): mostly(of(PAGE, 16 * PAGE, 1 << 21), mostly(of(0, 1, PAGE // 2), _U64)),
    ("kvm_create_guest_memfd", "flags"): mostly(of(3, 3, 1, 2, 0), _U64),
}  # fmt: skip

INTEGERS: dict[str, Rule] = {
    "GET_API_VERSION": mostly(of(0), _U64),
    "GET_VCPU_MMAP_SIZE": mostly(of(0), _U64),
    "CREATE_VM": of(0),
    "CHECK_EXTENSION": mostly(of(*Cap), _U64),
    "CREATE_VCPU": mostly(of(0, 1, 2, 3), of(4, 1023, 1024, 1 << 31, 1 << 32)),
    "RUN": mostly(of(0), _U64, 0.97),
}
"""ioctls whose argument is no pointer."""

MAKES: dict[str, str] = {
    "CREATE_VCPU": "vcpu",
    "CREATE_DEVICE": "device",
    "CREATE_GUEST_MEMFD": "memfd",
    "GET_STATS_FD": "file",
}
"""The kind of resource that an ioctl's success leaves behind."""
