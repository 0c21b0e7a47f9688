"""Ioctls of a VM handle: one function per row of protocol/abi/ioctls.py, same name in lower case.

Called by kvmcore.ioctl.call on the VM process's I/O thread, as fn(vm, argument); see kvmcore/vm/objects.py.
Structs come parsed; rows with a variable tail get the pointer. The work is done by kvmcore/vm; here are
only the arguments' checks.
"""

from __future__ import annotations

from errno import EINVAL, ENODEV, ENXIO
from typing import TYPE_CHECKING, Any

from kvmcore.vm import capabilities, statistics
from kvmcore.vm.guest_memfd import GuestMemfd
from kvmcore.vm.irqchip.aia import Aia
from protocol.abi import structs
from protocol.abi.capabilities import MAX_IRQ_ROUTES
from protocol.abi.errors import KvmError

if TYPE_CHECKING:
    from kvmcore.vm.objects import Handle
    from kvmcore.vm.vm import Vm


def check_extension(vm: Vm, capability: int) -> int:
    """As on the system handle, but for the guest-physical width, which may have been set."""
    return capabilities.check_extension(vm.session.compat, capability, vm.caps)


def enable_cap(vm: Vm, cap: Any) -> None:
    """Switch a capability on; args[0] is its value."""
    vm.caps.enable(cap.cap, cap.flags, cap.args[0])


def create_vcpu(vm: Vm, vcpu_id: int) -> Handle:
    """A new vCPU. The id is an unsigned long: nothing is truncated."""
    return vm.create_vcpu(vcpu_id)


def get_stats_fd(vm: Vm, argument: int) -> Handle:
    """The VM's statistics file. The argument is ignored."""
    return statistics.vm_stats_file(vm)


# -- memory ----------------------------------------------------------------------------------------


def set_user_memory_region(vm: Vm, region: Any) -> None:
    """Create, change, move or delete a memslot (section 1.7)."""
    vm.memory.set_region(
        region.slot, region.flags, region.guest_phys_addr, region.memory_size, region.userspace_addr
    )


def set_user_memory_region2(vm: Vm, region: Any) -> None:
    """The same, possibly on a guest_memfd, which is an extension on RISC-V."""
    allowed = structs.MEM_LOG_DIRTY_PAGES | structs.MEM_READONLY
    if vm.session.compat.extended:
        allowed |= structs.MEM_GUEST_MEMFD | structs.MEM_USERFAULT
    vm.memory.set_region(
        region.slot,
        region.flags,
        region.guest_phys_addr,
        region.memory_size,
        region.userspace_addr,
        allowed_flags=allowed,
        gmem_number=region.guest_memfd,
        gmem_offset=region.guest_memfd_offset,
        userfault=region.userfault_bitmap,
    )


def create_guest_memfd(vm: Vm, argument: Any) -> Handle:
    """Guest memory owned by kvmcore (section 1.13)."""
    return GuestMemfd(vm, argument.size, argument.flags)


def get_dirty_log(vm: Vm, argument: Any) -> None:
    """The dirty bitmap of a slot, written to the caller's buffer."""
    bits = vm.memory.dirty.get_log(argument.slot)
    try:
        vm.session.mm.copy_to_user(argument.dirty_bitmap, bits)
    except KvmError:
        vm.memory.dirty.restore_log(argument.slot, bits)
        raise


def clear_dirty_log(vm: Vm, argument: Any) -> None:
    """Clear the pages whose bit is set in the caller's bitmap."""
    dirty = vm.memory.dirty
    size = dirty.clear_range(argument.slot, argument.first_page, argument.num_pages)
    bits = vm.session.mm.copy_from_user(argument.dirty_bitmap, size)
    dirty.clear_log(argument.slot, argument.first_page, bits)


def reset_dirty_rings(vm: Vm, argument: int) -> int:
    """Watch the harvested pages of all rings again; how many they were. The argument is ignored."""
    return vm.memory.dirty.reset_rings()


# -- the buses -------------------------------------------------------------------------------------


def register_coalesced_mmio(vm: Vm, zone: Any) -> None:
    """Stores into the zone go to the coalesced ring."""
    vm.eventfds.register_zone(zone.addr, zone.size, zone.pio)


def unregister_coalesced_mmio(vm: Vm, zone: Any) -> None:
    """Drop every zone that contains this one."""
    vm.eventfds.unregister_zone(zone.addr, zone.size, zone.pio)


def ioeventfd(vm: Vm, argument: Any) -> None:
    """Stores to an address signal an eventfd."""
    vm.eventfds.ioeventfd(argument.fd, argument.addr, argument.len, argument.datamatch, argument.flags)


def irqfd(vm: Vm, argument: Any) -> None:
    """An eventfd signals an interrupt."""
    vm.eventfds.irqfds.assign(argument.fd, argument.gsi, argument.flags, argument.resamplefd)


# -- interrupts ------------------------------------------------------------------------------------


def irq_line(vm: Vm, argument: Any) -> None:
    """The level of an APLIC source. ENXIO without AIA."""
    if vm.irqchip is None:
        raise KvmError(ENXIO, reason="no in-kernel interrupt controller")
    vm.irqchip.set_line(argument.irq, bool(argument.level))


def irq_line_status(vm: Vm, argument: Any) -> bytes:
    """The same; the struct comes back unchanged (RISC-V reports no status)."""
    irq_line(vm, argument)
    return structs.IRQ_LEVEL.build(irq=argument.irq, level=argument.level)


def signal_msi(vm: Vm, msi: Any) -> None:
    """Deliver an MSI. EINVAL without AIA or with unknown flags; one that matches no IMSIC is dropped."""
    if vm.irqchip is None or msi.flags & ~structs.MSI_VALID_DEVID:
        raise KvmError(EINVAL, reason="no in-kernel interrupt controller, or unknown flags")
    vm.irqchip.signal_msi(msi.address_hi << 32 | msi.address_lo, msi.data)


def set_gsi_routing(vm: Vm, pointer: int) -> None:
    """Replace the GSI routing table. The argument points at kvm_irq_routing and its entries."""
    mm = vm.session.mm
    head = structs.IRQ_ROUTING.parse(mm.copy_from_user(pointer, structs.IRQ_ROUTING.size))
    if vm.irqchip is None or head.nr > MAX_IRQ_ROUTES or head.flags:
        raise KvmError(EINVAL, reason="no in-kernel interrupt controller, too many routes, or flags")
    size = structs.IRQ_ROUTING_ENTRY.size * head.nr
    vm.irqchip.set_routing(mm.copy_from_user(pointer + structs.IRQ_ROUTING.size, size))


def create_device(vm: Vm, argument: Any) -> bytes:
    """The AIA is the one device there is. ENODEV for other types; the TEST flag creates nothing."""
    if argument.type != structs.DEV_TYPE_RISCV_AIA:
        raise KvmError(ENODEV, reason=f"device type {argument.type}")
    fd = argument.fd
    if not argument.flags & structs.CREATE_DEVICE_TEST:
        fd = vm.session.install(Aia(vm))
    return structs.CREATE_DEVICE.build(type=argument.type, fd=fd, flags=argument.flags)
