"""The table of ioctls: one row per request, the single source for dispatch, client, documentation and tests.

kvmcore/ioctl joins each row to the function of the same name in lower case (`SET_USER_MEMORY_REGION` on a
vm -> kvmcore/ioctl/vm.py:set_user_memory_region); a row without a function answers the handle kind's
UNKNOWN_ERRNO, exactly as a request that has no row. Dispatch is on the full 32-bit request: two rows share
nr 0x67. Section numbers in the rows' remarks are KVM_ABI's. Nothing here may import anything but structs.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.abi import structs
from protocol.abi.structs import Layout

SYSTEM, VM, VCPU, DEVICE = "system", "vm", "vcpu", "device"
KINDS = (SYSTEM, VM, VCPU, DEVICE)

KVMIO = 0xAE
_NONE, _W, _R, _RW = 0, 1, 2, 3

UNKNOWN_ERRNO = {SYSTEM: "EINVAL", VM: "EINVAL", VCPU: "EINVAL", DEVICE: "ENOTTY"}
"""What a handle of each kind answers to a request it does not know (section 0.2)."""


def request(direction: int, nr: int, size: int, kind: int = KVMIO) -> int:
    """_IOC(): direction 0 none, 1 write (user to kernel), 2 read, 3 both; size in bytes."""
    return direction << 30 | size << 16 | kind << 8 | nr


class Ioctl(NamedTuple):
    """One request.

    name: as in <linux/kvm.h>, without KVM_. on: the handle kinds that know it. number: the full request.
    argument: None = the 64-bit argument is an integer; else it is a pointer to this struct.
    copies_in / copies_out: whether the struct is copied from the caller first, and back to it afterwards.
    tail: the struct is followed by a variable part; the handler gets the pointer and copies both itself.
    returns: "zero", "value", or the kind of handle that the result is ("vm", "vcpu", "file", ...).
    capability: the KVM_CAP_* (by name) that announces it, "" when it is always there.
    errnos: those that its handler may answer, besides the EIO and EBADF that every ioctl knows.
    extension: ours on RISC-V, hidden by every compat but the default.
    """

    name: str
    on: tuple[str, ...]
    number: int
    argument: Layout | None
    copies_in: bool
    copies_out: bool
    tail: bool
    returns: str
    capability: str
    errnos: tuple[str, ...]
    extension: bool
    section: str

    @property
    def function(self) -> str:
        """Name of the handler function."""
        return self.name.lower()

    @property
    def argument_size(self) -> int:
        """Bytes that are copied in or out; 0 when the argument is an integer."""
        return self.argument.size if self.argument is not None else 0


def _row(
    name: str,
    on: str,
    direction: int,
    nr: int,
    argument: Layout | None = None,
    *,
    copy: str = "",
    tail: bool = False,
    returns: str = "zero",
    cap: str = "",
    errnos: str = "",
    extension: bool = False,
    section: str = "1.2",
) -> Ioctl:
    size = argument.size if argument is not None else 0
    copied = "" if tail else copy or {_NONE: "", _W: "in", _R: "out", _RW: "in out"}[direction]
    return Ioctl(
        name=name,
        on=tuple(on.split()),
        number=request(direction, nr, size),
        argument=argument,
        copies_in="in" in copied.split(),
        copies_out="out" in copied.split(),
        tail=tail,
        returns=returns,
        capability=cap,
        errnos=tuple((("EFAULT " if argument is not None else "") + errnos).split()),
        extension=extension,
        section=section,
    )


_S = structs
IOCTLS: tuple[Ioctl, ...] = (
    # /dev/kvm
    _row("GET_API_VERSION", "system", _NONE, 0x00, returns="value", errnos="EINVAL"),
    _row("CREATE_VM", "system", _NONE, 0x01, returns="vm", errnos="EINTR EMFILE ENOMEM"),
    _row("CHECK_EXTENSION", "system vm", _NONE, 0x03, returns="value", section="1.4"),
    _row("GET_VCPU_MMAP_SIZE", "system", _NONE, 0x04, returns="value", errnos="EINVAL"),
    # VM
    _row("CREATE_VCPU", "vm", _NONE, 0x41, returns="vcpu", errnos="EINVAL EEXIST EMFILE"),
    _row("GET_DIRTY_LOG", "vm", _W, 0x42, _S.DIRTY_LOG, errnos="EINVAL ENOENT ENXIO", section="1.8"),
    _row(
        "SET_USER_MEMORY_REGION",
        "vm",
        _W,
        0x46,
        _S.USERSPACE_MEMORY_REGION,
        cap="USER_MEMORY",
        errnos="EINVAL EEXIST EPERM",
        section="1.7",
    ),
    _row(
        "SET_USER_MEMORY_REGION2",
        "vm",
        _W,
        0x49,
        _S.USERSPACE_MEMORY_REGION2,
        cap="USER_MEMORY2",
        errnos="EINVAL EEXIST EPERM EBADF",
        section="1.7",
    ),
    _row("CREATE_IRQCHIP", "vm", _NONE, 0x60),
    _row("IRQ_LINE", "vm", _W, 0x61, _S.IRQ_LEVEL, cap="IRQCHIP", errnos="ENXIO EBUSY ENODEV", section="1.9"),
    _row(
        "REGISTER_COALESCED_MMIO",
        "vm",
        _W,
        0x67,
        _S.COALESCED_MMIO_ZONE,
        cap="COALESCED_MMIO",
        errnos="EINVAL ENOSPC",
        section="1.9",
    ),
    _row(
        "IRQ_LINE_STATUS",
        "vm",
        _RW,
        0x67,
        _S.IRQ_LEVEL,
        cap="IRQCHIP",
        errnos="ENXIO EBUSY ENODEV",
        section="1.9",
    ),
    _row(
        "UNREGISTER_COALESCED_MMIO",
        "vm",
        _W,
        0x68,
        _S.COALESCED_MMIO_ZONE,
        cap="COALESCED_MMIO",
        errnos="EINVAL",
        section="1.9",
    ),
    _row(
        "SET_GSI_ROUTING",
        "vm",
        _W,
        0x6A,
        _S.IRQ_ROUTING,
        tail=True,
        cap="IRQ_ROUTING",
        errnos="EINVAL",
        section="1.9",
    ),
    _row("IRQFD", "vm", _W, 0x76, _S.IRQFD, cap="IRQFD", errnos="EINVAL EBADF EBUSY", section="1.9"),
    _row(
        "IOEVENTFD",
        "vm",
        _W,
        0x79,
        _S.IOEVENTFD,
        cap="IOEVENTFD",
        errnos="EINVAL EBADF EEXIST ENOENT ENOSPC",
        section="1.9",
    ),
    _row(
        "ENABLE_CAP",
        "vm",
        _W,
        0xA3,
        _S.ENABLE_CAP,
        cap="ENABLE_CAP_VM",
        errnos="EINVAL EBUSY E2BIG",
        section="1.4",
    ),
    _row("SIGNAL_MSI", "vm", _W, 0xA5, _S.MSI, cap="SIGNAL_MSI", errnos="EINVAL EBUSY ENODEV", section="1.9"),
    _row(
        "CLEAR_DIRTY_LOG",
        "vm",
        _RW,
        0xC0,
        _S.CLEAR_DIRTY_LOG,
        copy="in",
        cap="MANUAL_DIRTY_LOG_PROTECT2",
        errnos="EINVAL ENOENT ENXIO",
        section="1.8",
    ),
    _row(
        "RESET_DIRTY_RINGS",
        "vm",
        _NONE,
        0xC7,
        returns="value",
        cap="DIRTY_LOG_RING_ACQ_REL",
        errnos="EINVAL EINTR",
        section="1.8",
    ),
    _row("GET_STATS_FD", "vm vcpu", _NONE, 0xCE, returns="file", cap="BINARY_STATS_FD", section="1.12"),
    _row("SET_MEMORY_ATTRIBUTES", "vm", _W, 0xD2, _S.MEMORY_ATTRIBUTES),
    _row(
        "CREATE_GUEST_MEMFD",
        "vm",
        _RW,
        0xD4,
        _S.CREATE_GUEST_MEMFD,
        copy="in",
        returns="file",
        cap="GUEST_MEMFD",
        errnos="EINVAL ENOMEM",
        extension=True,
        section="1.13",
    ),
    _row(
        "CREATE_DEVICE",
        "vm",
        _RW,
        0xE0,
        _S.CREATE_DEVICE,
        cap="DEVICE_CTRL",
        errnos="ENODEV EEXIST EBUSY",
        section="1.10",
    ),
    # vCPU
    _row("RUN", "vcpu", _NONE, 0x80, errnos="EINVAL EINTR EIO EOPNOTSUPP EFAULT", section="1.5"),
    _row("INTERRUPT", "vcpu", _W, 0x86, _S.INTERRUPT),
    _row("SET_SIGNAL_MASK", "vcpu", _W, 0x8B, _S.SIGNAL_MASK, tail=True, errnos="EINVAL"),
    _row("GET_MP_STATE", "vcpu", _R, 0x98, _S.MP_STATE, cap="MP_STATE", section="1.12"),
    _row("SET_MP_STATE", "vcpu", _W, 0x99, _S.MP_STATE, cap="MP_STATE", errnos="EINVAL", section="1.12"),
    _row("SET_GUEST_DEBUG", "vcpu", _W, 0x9B, _S.GUEST_DEBUG, cap="SET_GUEST_DEBUG"),
    _row("GET_ONE_REG", "vcpu", _W, 0xAB, _S.ONE_REG, cap="ONE_REG", errnos="EINVAL ENOENT", section="1.11"),
    _row(
        "SET_ONE_REG",
        "vcpu",
        _W,
        0xAC,
        _S.ONE_REG,
        cap="ONE_REG",
        errnos="EINVAL ENOENT EBUSY",
        section="1.11",
    ),
    _row(
        "GET_REG_LIST", "vcpu", _RW, 0xB0, _S.REG_LIST, tail=True, errnos="E2BIG", section="1.11"
    ),
    _row("PRE_FAULT_MEMORY", "vcpu", _RW, 0xD5, _S.PRE_FAULT_MEMORY),
    # device
    _row(
        "SET_DEVICE_ATTR",
        "device",
        _W,
        0xE1,
        _S.DEVICE_ATTR,
        cap="DEVICE_CTRL",
        errnos="EINVAL ENXIO EBUSY ENODEV EOPNOTSUPP ENOENT",
        section="1.10",
    ),
    _row(
        "GET_DEVICE_ATTR",
        "device",
        _W,
        0xE2,
        _S.DEVICE_ATTR,
        cap="DEVICE_CTRL",
        errnos="EINVAL ENXIO ENODEV EOPNOTSUPP ENOENT",
        section="1.10",
    ),
    _row(
        "HAS_DEVICE_ATTR",
        "device",
        _W,
        0xE3,
        _S.DEVICE_ATTR,
        cap="DEVICE_CTRL",
        errnos="EINVAL ENXIO ENODEV EOPNOTSUPP ENOENT",
        section="1.10",
    ),
)
"""Every request known by name. CREATE_IRQCHIP, SET_MEMORY_ATTRIBUTES and PRE_FAULT_MEMORY have no function.
"""

BY_NAME: dict[str, Ioctl] = {row.name: row for row in IOCTLS}
BY_REQUEST: dict[tuple[str, int], Ioctl] = {(kind, row.number): row for row in IOCTLS for kind in row.on}
"""(handle kind, 32-bit request) -> row."""


def find(kind: str, number: int) -> Ioctl | None:
    """The row for a request on a handle of this kind; None when the kind does not know it."""
    return BY_REQUEST.get((kind, number & 0xFFFFFFFF))
