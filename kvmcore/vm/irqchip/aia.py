"""The in-kernel AIA: the device of type KVM_DEV_TYPE_RISCV_AIA, its attributes, and its MMIO (KVM_ABI 1.10).

One per VM: an APLIC in MSI mode and an IMSIC per vCPU that existed at INIT. A vCPU created after INIT has
none: MSIs to it vanish. Called by kvmcore/ioctl, by irqfds (I/O thread) and by exits.py (vCPU threads).
Configuration is under vm.lock; delivery takes no lock but the APLIC's.
"""

from __future__ import annotations

from contextlib import suppress
from errno import EBUSY, EEXIST, EINVAL, ENODEV, ENXIO
from typing import TYPE_CHECKING

from kvmcore.vm.irqchip.aplic import Aplic
from kvmcore.vm.irqchip.imsic import Imsic
from kvmcore.vm.irqchip.routing import Table, default_table, parse_table
from kvmcore.vm.objects import Device
from protocol.abi import structs_riscv
from protocol.abi.errors import KvmError
from protocol.abi.structs_riscv import AiaConfig, AiaGroup

if TYPE_CHECKING:
    from kvmcore.vm.vcpu import Vcpu
    from kvmcore.vm.vm import Vm

UNDEFINED = (1 << 64) - 1
HOST_IDS = 256
"""Interrupt identities that an interrupt file of ours has, 0 included: IDS is at most 255."""
_PAGE_SHIFT = 12
_DEFAULTS = {
    AiaConfig.MODE: structs_riscv.AIA_MODE_AUTO,
    AiaConfig.IDS: HOST_IDS - 1,
    AiaConfig.SRCS: 0,
    AiaConfig.GROUP_BITS: 0,
    AiaConfig.GROUP_SHIFT: 24,
    AiaConfig.HART_BITS: 0,
    AiaConfig.GUEST_BITS: 0,
}


def _valid(attribute: AiaConfig, value: int) -> bool:
    match attribute:
        case AiaConfig.MODE:
            return value in (
                structs_riscv.AIA_MODE_EMUL,
                structs_riscv.AIA_MODE_HWACCEL,
                structs_riscv.AIA_MODE_AUTO,
            )
        case AiaConfig.IDS:
            low = structs_riscv.AIA_IDS_MIN
            return low <= value < HOST_IDS and value & low == low
        case AiaConfig.SRCS:
            return value < structs_riscv.AIA_SRCS_MAX
        case AiaConfig.GROUP_BITS | AiaConfig.GUEST_BITS:
            return value < 8
        case AiaConfig.GROUP_SHIFT:
            return 24 <= value < 56
        case AiaConfig.HART_BITS:
            return value < 16


class Aia(Device):
    """The device. `initialized` from CTRL/INIT on."""

    def __init__(self, vm: Vm) -> None:
        """EEXIST: the VM has one; EBUSY: a vCPU has run. Takes its place as vm.irqchip."""
        super().__init__(vm)
        with vm.lock:
            if vm.irqchip is not None:
                raise KvmError(EEXIST, reason="the VM has an AIA")
            if vm.ran_once:
                raise KvmError(EBUSY, reason="a vCPU has run")
            self.initialized = False
            self._config = dict(_DEFAULTS)
            self._aplic_address = UNDEFINED
            self._imsic_addresses: dict[int, int] = {}
            self._aplic: Aplic | None = None
            self._by_page: dict[int, Imsic] = {}
            self._by_hart: dict[int, Imsic] = {}
            self._by_vcpu: dict[int, Imsic] = {}
            self._routes: Table = {}
            vm.irqchip = self

    # -- attributes --------------------------------------------------------------------------------

    def set_attr(self, group: int, attr: int, pointer: int) -> None:
        """KVM_SET_DEVICE_ATTR."""
        mm = self.session.mm
        if group == AiaGroup.CONFIG:
            value = int.from_bytes(mm.copy_from_user(pointer, 4), "little")
            with self.vm.lock:
                self._set_config(attr, value)
        elif group == AiaGroup.ADDR:
            value = int.from_bytes(mm.copy_from_user(pointer, 8), "little")
            with self.vm.lock:
                self._set_address(attr, value)
        elif group == AiaGroup.CTRL:
            if attr != structs_riscv.AIA_CTRL_INIT:
                raise KvmError(ENXIO, reason=f"control {attr}")
            with self.vm.lock:
                self._initialize()
        elif group == AiaGroup.APLIC:
            value = int.from_bytes(mm.copy_from_user(pointer, 4), "little")
            with self.vm.lock:
                self._the_aplic().write(attr, value)
        elif group == AiaGroup.IMSIC:
            value = int.from_bytes(mm.copy_from_user(pointer, 8), "little")
            with self.vm.lock:
                self._imsic_of(attr).write(attr & 0xFFF, value)
        else:
            raise KvmError(ENXIO, reason=f"group {group}")

    def get_attr(self, group: int, attr: int, pointer: int) -> None:
        """KVM_GET_DEVICE_ATTR."""
        mm = self.session.mm
        with self.vm.lock:
            if group == AiaGroup.CONFIG:
                mm.copy_from_user(pointer, 4)
                mm.copy_to_user(pointer, self._config[self._config_of(attr)].to_bytes(4, "little"))
            elif group == AiaGroup.ADDR:
                mm.copy_from_user(pointer, 8)
                mm.copy_to_user(pointer, self._address(attr).to_bytes(8, "little"))
            elif group == AiaGroup.APLIC:
                mm.copy_from_user(pointer, 4)
                mm.copy_to_user(pointer, self._the_aplic().read(attr).to_bytes(4, "little"))
            elif group == AiaGroup.IMSIC:
                mm.copy_from_user(pointer, 8)
                mm.copy_to_user(pointer, self._imsic_of(attr).read(attr & 0xFFF).to_bytes(8, "little"))
            else:
                raise KvmError(ENXIO, reason=f"group {group}")

    def read_register(self, key: int) -> int:
        """A register by group << 32 | attribute, as get_attr() reads it: for many in one message."""
        with self.vm.lock:
            self.vm.check_alive()
            group, attr = key >> 32, key & 0xFFFFFFFF
            if group == AiaGroup.APLIC:
                return self._the_aplic().read(attr)
            if group == AiaGroup.IMSIC:
                return self._imsic_of(attr).read(attr & 0xFFF)
        raise KvmError(ENXIO, reason=f"group {group}")

    def write_register(self, key: int, value: int) -> None:
        """The same for set_attr()."""
        with self.vm.lock:
            self.vm.check_alive()
            group, attr = key >> 32, key & 0xFFFFFFFF
            if group == AiaGroup.APLIC:
                self._the_aplic().write(attr, value & 0xFFFFFFFF)
            elif group == AiaGroup.IMSIC:
                self._imsic_of(attr).write(attr & 0xFFF, value)
            else:
                raise KvmError(ENXIO, reason=f"group {group}")

    def has_attr(self, group: int, attr: int) -> None:
        """KVM_HAS_DEVICE_ATTR: returns when the attribute exists. Takes the lock that set_attr takes."""
        with self.vm.lock:
            if group == AiaGroup.CONFIG:
                self._config_of(attr)
            elif group == AiaGroup.ADDR:
                self._address(attr)
            elif group == AiaGroup.CTRL and attr == structs_riscv.AIA_CTRL_INIT:
                pass
            elif group == AiaGroup.APLIC:
                self._the_aplic().read(attr)
            elif group == AiaGroup.IMSIC:
                self._imsic_of(attr).check(attr & 0xFFF)
            else:
                raise KvmError(ENXIO, reason=f"group {group} attribute {attr}")

    @staticmethod
    def _config_of(attr: int) -> AiaConfig:
        try:
            return AiaConfig(attr)
        except ValueError:
            raise KvmError(ENXIO, reason=f"configuration {attr}") from None

    def _set_config(self, attr: int, value: int) -> None:
        if self.initialized:
            raise KvmError(EBUSY, reason="initialized")
        attribute = self._config_of(attr)
        if not _valid(attribute, value):
            raise KvmError(EINVAL, reason=f"{attribute.name} {value}")
        self._config[attribute] = value

    def _imsic_index(self, attr: int) -> int:
        if not 0 < attr <= len(self.vm.vcpus):
            raise KvmError(ENXIO, reason=f"address {attr}: there are {len(self.vm.vcpus)} vCPUs")
        return attr - 1

    def _address(self, attr: int) -> int:
        if attr == structs_riscv.AIA_ADDR_APLIC:
            return self._aplic_address
        return self._imsic_addresses.get(self._imsic_index(attr), UNDEFINED)

    def _set_address(self, attr: int, value: int) -> None:
        index = None if attr == structs_riscv.AIA_ADDR_APLIC else self._imsic_index(attr)
        if self.initialized:
            raise KvmError(EBUSY, reason="initialized")
        if value % structs_riscv.IMSIC_PAGE_SIZE:
            raise KvmError(EINVAL, reason=f"address {value:#x} is not page aligned")
        if index is None:
            self._aplic_address = value
        else:
            self._imsic_addresses[index] = value

    def _the_aplic(self) -> Aplic:
        if not self.initialized or self._aplic is None:
            raise KvmError(ENODEV, reason="no APLIC (yet)")
        return self._aplic

    def _imsic_of(self, attr: int) -> Imsic:
        imsic = self._by_vcpu.get(attr >> 12)
        if not self.initialized or imsic is None:
            raise KvmError(ENODEV, reason=f"no IMSIC at vCPU {attr >> 12} (yet)")
        return imsic

    # -- INIT --------------------------------------------------------------------------------------

    def _initialize(self) -> None:
        if self.initialized:
            raise KvmError(EBUSY, reason="initialized")
        config = self._config
        sources, ids = config[AiaConfig.SRCS], config[AiaConfig.IDS]
        if sources > ids or (sources and self._aplic_address == UNDEFINED):
            raise KvmError(EINVAL, reason="more sources than identities, or an APLIC without an address")
        file_bits = config[AiaConfig.HART_BITS] + config[AiaConfig.GUEST_BITS] + _PAGE_SHIFT
        if config[AiaConfig.GROUP_BITS] and config[AiaConfig.GROUP_SHIFT] < file_bits:
            raise KvmError(EINVAL, reason="group and hart bits overlap")
        addresses = [self._imsic_addresses.get(vcpu.index, UNDEFINED) for vcpu in self.vm.vcpus]
        if UNDEFINED in addresses or len({self._base(address) for address in addresses}) > 1:
            raise KvmError(EINVAL, reason="an IMSIC without an address, or IMSICs with different bases")
        self.vm.eventfds.reserve(len(addresses) + bool(sources))
        if sources:
            self._aplic = Aplic(sources, self._send, self._retriggered)
            self.vm.machine.set_aplic(self._aplic_address)
        for vcpu, address in zip(self.vm.vcpus, addresses, strict=True):
            self._add_imsic(vcpu, address, ids)
        harts = [vcpu.hart for vcpu in self.vm.vcpus]
        self.vm.machine.set_imsics(dict(zip(addresses, harts, strict=True)))
        self._routes = default_table(sources)
        self.initialized = True

    def _add_imsic(self, vcpu: Vcpu, address: int, ids: int) -> None:
        imsic = Imsic(vcpu, ids, self._hart_index(address))
        self._by_page[address >> _PAGE_SHIFT] = imsic
        self._by_hart.setdefault(imsic.hart_index, imsic)
        self._by_vcpu[vcpu.id] = imsic

    def _base(self, address: int) -> int:
        config = self._config
        mask = (1 << config[AiaConfig.HART_BITS] + config[AiaConfig.GUEST_BITS] + _PAGE_SHIFT) - 1
        mask |= ((1 << config[AiaConfig.GROUP_BITS]) - 1) << config[AiaConfig.GROUP_SHIFT]
        return address & ~mask

    def _hart_index(self, address: int) -> int:
        config = self._config
        hart = address >> _PAGE_SHIFT + config[AiaConfig.GUEST_BITS] & (1 << config[AiaConfig.HART_BITS]) - 1
        group = address >> config[AiaConfig.GROUP_SHIFT] & (1 << config[AiaConfig.GROUP_BITS]) - 1
        return group << config[AiaConfig.HART_BITS] | hart

    # -- interrupts --------------------------------------------------------------------------------

    def _send(self, hart_index: int, guest_index: int, identity: int) -> None:
        """The APLIC's MSI. One that matches no interrupt file, or no identity, vanishes."""
        imsic = self._by_hart.get(hart_index)
        if imsic is not None and guest_index == 0 and 0 < identity <= imsic.identities:
            imsic.inject(0, 0, identity)

    def _retriggered(self, source: int) -> bool:
        gsis = [gsi for gsi, routes in self._routes.items() if any(route.pin == source for route in routes)]
        ended = [self.vm.eventfds.irqfds.end_of_interrupt(gsi) for gsi in gsis]
        return any(ended)

    def set_line(self, source: int, level: bool) -> None:
        """KVM_IRQ_LINE. EBUSY before INIT; ENODEV: no such source."""
        if not self.initialized:
            raise KvmError(EBUSY, reason="not initialized")
        self._the_aplic().set_line(source, level)

    def signal_msi(self, address: int, data: int) -> None:
        """KVM_SIGNAL_MSI. EBUSY before INIT; ENODEV, EINVAL as Imsic.inject(); no interrupt file there:
        nothing.
        """
        if not self.initialized:
            raise KvmError(EBUSY, reason="not initialized")
        guests = (1 << self._config[AiaConfig.GUEST_BITS]) - 1
        page = address >> _PAGE_SHIFT
        imsic = self._by_page.get(page & ~guests)
        if imsic is not None:
            imsic.inject(page & guests, address & 0xFFF, data)

    def set_gsi(self, gsi: int, level: bool) -> None:
        """An irqfd with resampling: the line of its GSI. Leads nowhere: dropped."""
        for route in self._routes.get(gsi, ()):
            with suppress(KvmError):
                if route.pin is not None:
                    self.set_line(route.pin, level)
                elif level:
                    self.signal_msi(route.address, route.data)

    def pulse_gsi(self, gsi: int) -> None:
        """An irqfd's signal: an MSI, or an edge on its pin. Leads nowhere: dropped."""
        for route in self._routes.get(gsi, ()):
            with suppress(KvmError):
                if route.pin is None:
                    self.signal_msi(route.address, route.data)
                else:
                    self.set_line(route.pin, True)
                    self.set_line(route.pin, False)

    def set_routing(self, entries: bytes) -> None:
        """KVM_SET_GSI_ROUTING: replace the table, or raise EINVAL and leave it."""
        self._routes = parse_table(entries)
        self.vm.eventfds.irqfds.rerouted()

    def native_target(self, gsi: int) -> int:
        """Address of the hart's block | identity << 48 if `gsi` is an MSI to an interrupt file of ours, else 0."""
        routes = self._routes.get(gsi, ())
        if len(routes) != 1 or routes[0].pin is not None:
            return 0
        address, identity = routes[0].address, routes[0].data
        imsic = self._by_page.get(address >> _PAGE_SHIFT)
        if imsic is None or address & 0xFFF or not 0 < identity <= imsic.identities:
            return 0
        return imsic.vcpu.hart.address | identity << 48

    # -- MMIO --------------------------------------------------------------------------------------

    def load(self, gpa: int, size: int) -> bytes | None:
        """A guest's load. None when nothing of ours answers there."""
        if gpa >> _PAGE_SHIFT in self._by_page:
            return bytes(size) if size == 4 else None
        offset = gpa - self._aplic_address
        if self._aplic is None or not 0 <= offset < structs_riscv.APLIC_SIZE or size != 4:
            return None
        try:
            return self._aplic.read(offset).to_bytes(4, "little")
        except KvmError:
            return None

    def store(self, gpa: int, data: bytes) -> bool:
        """A guest's store. False when nothing of ours answers there."""
        value = int.from_bytes(data, "little")
        imsic = self._by_page.get(gpa >> _PAGE_SHIFT)
        if imsic is not None:
            if len(data) != 4:
                return False
            with suppress(KvmError):  # an identity that does not exist: the store has no effect
                imsic.inject(0, gpa & 0xFFF, value)
            return True
        offset = gpa - self._aplic_address
        if self._aplic is None or not 0 <= offset < structs_riscv.APLIC_SIZE or len(data) != 4:
            return False
        try:
            self._aplic.write(offset, value)
        except KvmError:
            return False
        return True
