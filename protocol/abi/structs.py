"""The KVM structs that cross the protocol, in <linux/kvm.h> order (KVM_ABI section 1.3).

One line per struct says it all; `Layout.construct` is the same as a construct Struct, for tools that dissect or make
messages. parse() and build() do the work with the struct module, which costs a microsecond. Used by the client, by kvmcore's
dispatcher and handlers (each ioctl parses one), and by the tests that compare every size with the C header. The exit path
must not use it: see run_page.
"""

from __future__ import annotations

import re
import struct
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import construct

_WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "s32": 4, "u64": 8}
_CODES = {"u8": "B", "u16": "H", "u32": "I", "s32": "i", "u64": "Q"}
_FIELD = re.compile(r"(\w+):(u8|u16|u32|s32|u64|bytes)(?:\[(\d+)\])?\Z")


class Field:
    """One member of a struct: name, element type, element count (None: scalar), byte offset and byte size."""

    __slots__ = ("count", "name", "offset", "size", "type")

    def __init__(self, name: str, kind: str, count: int | None, offset: int) -> None:
        self.name, self.type, self.count, self.offset = name, kind, count, offset
        self.size = (count or 0) if kind == "bytes" else _WIDTHS[kind] * (1 if count is None else count)

    @property
    def code(self) -> str:
        """What the struct module calls it."""
        return f"{self.count}s" if self.type == "bytes" else _CODES[self.type] * (1 if self.count is None else self.count)

    @property
    def array(self) -> bool:
        """Whether it has several numbers."""
        return self.count is not None and self.type != "bytes"

    @property
    def zero(self) -> Any:
        """Its value when nobody gives one."""
        return [0] * (self.count or 0) if self.array else b"" if self.type == "bytes" else 0


class Layout:
    """A little-endian C struct without implicit padding, written as `name:type` or `name:type[count]` words.

    parse() gives the members as a named tuple (arrays as tuples); build() takes them by name, absent ones are zero.
    `name` is the C struct's name, `size` its sizeof.
    """

    def __init__(self, name: str, definition: str) -> None:
        self.name = name
        fields: list[Field] = []
        offset = 0
        for word in definition.split():
            match = _FIELD.match(word)
            if match is None:
                raise ValueError(f"{name}: {word!r} is not name:type")
            field = Field(match[1], match[2], int(match[3]) if match[3] else None, offset)
            fields.append(field)
            offset += field.size
        self.fields = tuple(fields)
        self.size = offset
        self._arrays = any(field.array for field in fields)

    @cached_property
    def construct(self) -> construct.Struct:
        """The definition in construct's terms; absent members build as zero. Imported on first use."""
        import construct as c

        scalars = {"u8": c.Int8ul, "u16": c.Int16ul, "u32": c.Int32ul, "s32": c.Int32sl, "u64": c.Int64ul}
        members = []
        for field in self.fields:
            if field.type == "bytes":
                member = c.Default(c.Bytes(field.size), bytes(field.size))
            elif field.count is not None:
                member = c.Default(c.Array(field.count, scalars[field.type]), [0] * field.count)
            else:
                member = c.Default(scalars[field.type], 0)
            members.append(field.name / member)
        return c.Struct(*members)

    @cached_property
    def _struct(self) -> struct.Struct:
        return struct.Struct("<" + "".join([field.code for field in self.fields]))

    @cached_property
    def _record(self) -> Any:
        return NamedTuple(self.name, [(field.name, Any) for field in self.fields])

    @cached_property
    def _zeros(self) -> dict[str, Any]:
        return {field.name: field.zero for field in self.fields}

    def parse(self, data: bytes | bytearray | memoryview) -> Any:
        """The members of the first `size` bytes of data, as a named tuple. struct.error: there are fewer."""
        values: Any = self._struct.unpack_from(data)
        if self._arrays:
            left = iter(values)
            values = [
                tuple(next(left) for _ in range(field.count or 0)) if field.array else next(left) for field in self.fields
            ]
        return tuple.__new__(self._record, values)

    def build(self, **members: Any) -> bytes:
        """`size` bytes; members not given are zero.

        TypeError: an unknown member. struct.error, ValueError: a value out of range, an array or bytes of another length.
        """
        values = self._zeros | members
        if len(values) != len(self.fields):
            raise TypeError(f"struct {self.name} has no member {', '.join(sorted(members.keys() - self._zeros.keys()))}")
        for field in self.fields:
            if field.count is not None and members.get(field.name) is not None and len(members[field.name]) != field.count:
                raise ValueError(f"struct {self.name}: {field.name} has {field.count} elements")
        if self._arrays:
            flat = [values[field.name] if field.array else (values[field.name],) for field in self.fields]
            return self._struct.pack(*chain.from_iterable(flat))
        return self._struct.pack(*values.values())

    def offset(self, member: str) -> int:
        """Byte offset of a member."""
        return next(field.offset for field in self.fields if field.name == member)


USERSPACE_MEMORY_REGION = Layout(
    "kvm_userspace_memory_region", "slot:u32 flags:u32 guest_phys_addr:u64 memory_size:u64 userspace_addr:u64"
)
USERSPACE_MEMORY_REGION2 = Layout(
    "kvm_userspace_memory_region2",
    "slot:u32 flags:u32 guest_phys_addr:u64 memory_size:u64 userspace_addr:u64 "
    "guest_memfd_offset:u64 guest_memfd:u32 pad1:u32 userfault_bitmap:u64 pad2:u64[13]",
)
IRQ_LEVEL = Layout("kvm_irq_level", "irq:u32 level:u32")
COALESCED_MMIO_ZONE = Layout("kvm_coalesced_mmio_zone", "addr:u64 size:u32 pio:u32")
COALESCED_MMIO = Layout("kvm_coalesced_mmio", "phys_addr:u64 len:u32 pio:u32 data:bytes[8]")
INTERRUPT = Layout("kvm_interrupt", "irq:u32")
DIRTY_LOG = Layout("kvm_dirty_log", "slot:u32 padding1:u32 dirty_bitmap:u64")
CLEAR_DIRTY_LOG = Layout("kvm_clear_dirty_log", "slot:u32 num_pages:u32 first_page:u64 dirty_bitmap:u64")
SIGNAL_MASK = Layout("kvm_signal_mask", "len:u32")
MP_STATE = Layout("kvm_mp_state", "mp_state:u32")
GUEST_DEBUG = Layout("kvm_guest_debug", "control:u32 pad:u32")
IOEVENTFD = Layout("kvm_ioeventfd", "datamatch:u64 addr:u64 len:u32 fd:s32 flags:u32 pad:bytes[36]")
ENABLE_CAP = Layout("kvm_enable_cap", "cap:u32 flags:u32 args:u64[4] pad:bytes[64]")
IRQ_ROUTING = Layout("kvm_irq_routing", "nr:u32 flags:u32")
IRQ_ROUTING_ENTRY = Layout("kvm_irq_routing_entry", "gsi:u32 type:u32 flags:u32 pad:u32 u:bytes[32]")
IRQ_ROUTING_IRQCHIP = Layout("kvm_irq_routing_irqchip", "irqchip:u32 pin:u32")
IRQ_ROUTING_MSI = Layout("kvm_irq_routing_msi", "address_lo:u32 address_hi:u32 data:u32 devid:u32")
IRQFD = Layout("kvm_irqfd", "fd:u32 gsi:u32 flags:u32 resamplefd:u32 pad:bytes[16]")
REG_LIST = Layout("kvm_reg_list", "n:u64")
ONE_REG = Layout("kvm_one_reg", "id:u64 addr:u64")
MSI = Layout("kvm_msi", "address_lo:u32 address_hi:u32 data:u32 flags:u32 devid:u32 pad:bytes[12]")
CREATE_DEVICE = Layout("kvm_create_device", "type:u32 fd:u32 flags:u32")
DEVICE_ATTR = Layout("kvm_device_attr", "flags:u32 group:u32 attr:u64 addr:u64")
DIRTY_GFN = Layout("kvm_dirty_gfn", "flags:u32 slot:u32 offset:u64")
STATS_HEADER = Layout(
    "kvm_stats_header", "flags:u32 name_size:u32 num_desc:u32 id_offset:u32 desc_offset:u32 data_offset:u32"
)
STATS_DESC = Layout("kvm_stats_desc", "flags:u32 exponent:u16 size:u16 offset:u32 bucket_size:u32")
MEMORY_ATTRIBUTES = Layout("kvm_memory_attributes", "address:u64 size:u64 attributes:u64 flags:u64")
CREATE_GUEST_MEMFD = Layout("kvm_create_guest_memfd", "size:u64 flags:u64 reserved:u64[6]")
PRE_FAULT_MEMORY = Layout("kvm_pre_fault_memory", "gpa:u64 size:u64 flags:u64 padding:u64[5]")

LAYOUTS: tuple[Layout, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Layout))
"""Every struct above, in order."""

# Flags of the structs above.
MEM_LOG_DIRTY_PAGES, MEM_READONLY, MEM_GUEST_MEMFD, MEM_USERFAULT = 1, 2, 4, 8
MEMORY_EXIT_FLAG_USERFAULT = 1 << 4
"""MEM_USERFAULT, its bitmap and its exit are those of "KVM Userfault", proposed for Linux in 2024 and 2025."""
GUEST_MEMFD_FLAG_MMAP, GUEST_MEMFD_FLAG_INIT_SHARED = 1, 2
IRQFD_FLAG_DEASSIGN, IRQFD_FLAG_RESAMPLE = 1, 2
IOEVENTFD_FLAG_DATAMATCH, IOEVENTFD_FLAG_PIO, IOEVENTFD_FLAG_DEASSIGN = 1, 2, 4
IOEVENTFD_FLAG_CCW_NOTIFY, IOEVENTFD_FLAG_FAST_MMIO = 8, 16
IRQ_ROUTING_TYPE_IRQCHIP, IRQ_ROUTING_TYPE_MSI = 1, 2
MSI_VALID_DEVID = 1
CREATE_DEVICE_TEST = 1
GUESTDBG_ENABLE, GUESTDBG_SINGLESTEP, GUESTDBG_USE_SW_BP = 1, 2, 0x10000
MP_STATE_RUNNABLE, MP_STATE_INIT_RECEIVED, MP_STATE_STOPPED = 0, 2, 5
INTERRUPT_SET, INTERRUPT_UNSET = 0xFFFFFFFF, 0xFFFFFFFE
DIRTY_GFN_DIRTY, DIRTY_GFN_RESET = 1, 2
DEV_TYPE_VFIO, DEV_TYPE_RISCV_AIA = 4, 11
API_VERSION = 12
