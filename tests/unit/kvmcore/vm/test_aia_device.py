"""The AIA device's attributes, GSI routing and irqfds on it (KVM_ABI 1.9, 1.10), in a VM without vCPUs."""

from __future__ import annotations

import os
from errno import EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOTTY, ENXIO, EOPNOTSUPP

import pytest

from kvmcore import ioctl
from kvmcore.vm.irqchip import aplic as regs
from kvmcore.vm.irqchip.routing import default_table, parse_table
from protocol.abi import structs
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs_riscv import AiaConfig, AiaGroup

POINTEE = 0x7001_0000  # where conftest puts pointees
APLIC = 0x0D00_0000


class Attributes:
    """The device handle of one VM."""

    def __init__(self, kernel):
        self.kernel = kernel
        assert kernel.ioctl(kernel.vm, "CREATE_DEVICE", type=11) == 0
        self.device = kernel.session.table.handle(structs.CREATE_DEVICE.parse(kernel.out).fd)

    def set(self, group, attr, value=0, size=8):
        data = value.to_bytes(size, "little")
        return self.kernel.errno(self.device, "SET_DEVICE_ATTR", data, group=group, attr=attr, addr=POINTEE)

    def get(self, group, attr, size=8):
        self.kernel.ioctl(self.device, "GET_DEVICE_ATTR", bytes(size), group=group, attr=attr, addr=POINTEE)
        return int.from_bytes(self.kernel.pointee, "little")

    def get_errno(self, group, attr, size=8):
        return self.kernel.errno(
            self.device, "GET_DEVICE_ATTR", bytes(size), group=group, attr=attr, addr=POINTEE
        )

    def has(self, group, attr):
        return self.kernel.errno(self.device, "HAS_DEVICE_ATTR", group=group, attr=attr)

    def initialized(self, sources=96):
        assert self.set(AiaGroup.CONFIG, AiaConfig.SRCS, sources, 4) == 0
        assert self.set(AiaGroup.ADDR, 0, APLIC) == 0
        assert self.set(AiaGroup.CTRL, 0) == 0
        return self


@pytest.fixture
def aia(kernel):
    return Attributes(kernel)


def test_there_is_one(kernel, aia):
    assert kernel.errno(kernel.vm, "CREATE_DEVICE", type=11) == EEXIST
    with pytest.raises(KvmError) as refused:
        ioctl.call(aia.device, BY_NAME["CHECK_EXTENSION"].number, 3)
    assert refused.value.errno == ENOTTY


def test_defaults(aia):
    assert [aia.get(AiaGroup.CONFIG, attr, 4) for attr in AiaConfig] == [2, 255, 0, 0, 24, 0, 0]
    assert aia.get(AiaGroup.ADDR, 0) == (1 << 64) - 1


@pytest.mark.parametrize(
    ("attr", "value", "errno"),
    [
        (AiaConfig.MODE, 0, 0), (AiaConfig.MODE, 7, EINVAL), (AiaConfig.IDS, 62, EINVAL),
        (AiaConfig.IDS, 64, EINVAL), (AiaConfig.IDS, 63, 0), (AiaConfig.IDS, 255, 0),
        (AiaConfig.IDS, 2047, EINVAL), (AiaConfig.SRCS, 1023, 0), (AiaConfig.SRCS, 1024, EINVAL),
        (AiaConfig.GROUP_BITS, 8, EINVAL), (AiaConfig.GROUP_SHIFT, 23, EINVAL),
        (AiaConfig.GROUP_SHIFT, 56, EINVAL), (AiaConfig.HART_BITS, 16, EINVAL),
        (AiaConfig.GUEST_BITS, 8, EINVAL), (7, 0, ENXIO),
    ],
)  # fmt: skip
def test_configuration(aia, attr, value, errno):
    assert aia.set(AiaGroup.CONFIG, attr, value, 4) == errno
    if not errno:
        assert aia.get(AiaGroup.CONFIG, attr, 4) == value


def test_attributes_that_are_not_there(aia):
    for group, attr in ((9, 0), (AiaGroup.CTRL, 1), (AiaGroup.CONFIG, 7), (AiaGroup.ADDR, 1)):
        assert aia.has(group, attr) == ENXIO
    assert aia.has(AiaGroup.CTRL, 0) == aia.has(AiaGroup.CONFIG, 6) == aia.has(AiaGroup.ADDR, 0) == 0
    assert aia.get_errno(AiaGroup.CTRL, 0) == ENXIO
    assert aia.has(AiaGroup.APLIC, 0) == aia.get_errno(AiaGroup.IMSIC, 0x70) == ENODEV
    assert aia.set(AiaGroup.ADDR, 0, APLIC + 0x800) == EINVAL
    bad = {"group": AiaGroup.CONFIG, "attr": 0, "addr": 0}
    assert aia.kernel.errno(aia.device, "GET_DEVICE_ATTR", **bad) == EFAULT


def test_initialization(aia):
    assert aia.set(AiaGroup.CONFIG, AiaConfig.SRCS, 96, 4) == 0
    assert aia.set(AiaGroup.CTRL, 0) == EINVAL  # sources, but no address
    assert aia.set(AiaGroup.CONFIG, AiaConfig.IDS, 63, 4) == 0
    assert aia.set(AiaGroup.ADDR, 0, APLIC) == 0
    assert aia.set(AiaGroup.CTRL, 0) == EINVAL  # more sources than identities
    assert aia.set(AiaGroup.CONFIG, AiaConfig.IDS, 127, 4) == 0
    assert aia.kernel.errno(aia.kernel.vm, "IRQ_LINE", irq=5, level=1) == EBUSY
    assert aia.kernel.errno(aia.kernel.vm, "SIGNAL_MSI", address_lo=0x28000000, data=5) == EBUSY
    assert aia.set(AiaGroup.CTRL, 1) == ENXIO
    assert aia.set(AiaGroup.CTRL, 0) == 0
    assert aia.set(AiaGroup.CTRL, 0) == EBUSY
    assert aia.set(AiaGroup.CONFIG, AiaConfig.SRCS, 96, 4) == EBUSY
    assert aia.set(AiaGroup.ADDR, 0, APLIC) == EBUSY


def test_hart_and_group_bits_may_not_overlap(aia):
    assert aia.set(AiaGroup.CONFIG, AiaConfig.GROUP_BITS, 1, 4) == 0
    assert aia.set(AiaGroup.CONFIG, AiaConfig.HART_BITS, 13, 4) == 0
    assert aia.set(AiaGroup.CTRL, 0) == EINVAL
    assert aia.set(AiaGroup.CONFIG, AiaConfig.HART_BITS, 12, 4) == 0
    assert aia.set(AiaGroup.CTRL, 0) == 0


def test_registers_and_lines(kernel, aia):
    aia.initialized()
    assert aia.get(AiaGroup.APLIC, 0, 4) == 0x80000004
    assert aia.get_errno(AiaGroup.APLIC, 2, 4) == EOPNOTSUPP
    assert aia.get_errno(AiaGroup.APLIC, 0x4000, 4) == ENODEV
    assert aia.get_errno(AiaGroup.IMSIC, 99 << 12 | 0x70) == ENODEV
    for irq, errno in ((5, 0), (0, ENODEV), (97, ENODEV), (5000, ENODEV)):
        assert kernel.errno(kernel.vm, "IRQ_LINE", irq=irq, level=1) == errno
    assert kernel.ioctl(kernel.vm, "IRQ_LINE_STATUS", irq=5, level=0) == 0
    assert kernel.out == structs.IRQ_LEVEL.build(irq=5, level=0)
    assert kernel.errno(kernel.vm, "SIGNAL_MSI", address_lo=0x28000000, data=5) == 0
    assert kernel.errno(kernel.vm, "SIGNAL_MSI", address_lo=0x28000000, data=5, flags=2) == EINVAL
    # The same registers by the guest's loads and stores.
    chip = kernel.vm.irqchip
    assert chip.load(APLIC, 4) == (0x80000004).to_bytes(4, "little")
    assert chip.load(APLIC, 8) is None
    assert chip.load(APLIC + 0x3FFC, 4) is None
    assert chip.store(APLIC + regs.SOURCECFG, (6).to_bytes(4, "little"))
    assert aia.get(AiaGroup.APLIC, regs.SOURCECFG, 4) == 6
    assert not chip.store(APLIC - 4, bytes(4))


def test_irqfd_reaches_the_pin(kernel, aia):
    aia.initialized()
    number, fd = kernel.eventfd()
    aia.set(AiaGroup.APLIC, regs.SOURCECFG + 4 * 4, regs.EDGE_RISE, 4)
    os.eventfd_write(fd, 3)
    assert kernel.errno(kernel.vm, "IRQFD", fd=number, gsi=5) == 0
    kernel.turn()  # a counter that is not zero when the irqfd is made counts at once
    assert aia.get(AiaGroup.APLIC, regs.SETIP, 4) == 1 << 5


def test_a_resampled_irqfd(kernel, aia):
    aia.initialized()
    (number, fd), (resample_number, resample) = kernel.eventfd(), kernel.eventfd()
    aia.set(AiaGroup.APLIC, regs.SOURCECFG + 4 * 4, regs.LEVEL_HIGH, 4)
    assert kernel.errno(kernel.vm, "IRQFD", fd=number, gsi=5, flags=2, resamplefd=resample_number) == 0
    os.eventfd_write(fd, 1)
    kernel.turn()
    assert aia.get(AiaGroup.APLIC, regs.CLRIP, 4) == 1 << 5  # the line is up
    assert kernel.vm.irqchip.store(APLIC + regs.SETIPNUM_LE, (5).to_bytes(4, "little"))
    assert aia.get(AiaGroup.APLIC, regs.CLRIP, 4) == 0
    assert os.eventfd_read(resample) == 1


def routes(kernel, entries, number=None, flags=0):
    data = structs.IRQ_ROUTING.build(nr=len(entries) if number is None else number, flags=flags)
    from kvmcore.vm.address_space import InlineSegment

    segment = InlineSegment(POINTEE, bytearray(data + b"".join(entries)))
    with kernel.session.mm.overlay([segment]):
        try:
            return ioctl.call(kernel.vm, BY_NAME["SET_GSI_ROUTING"].number, POINTEE)
        except KvmError as error:
            return error.errno


def entry(gsi=1, kind=2, flags=0, **members):
    body = structs.IRQ_ROUTING_MSI if kind == 2 else structs.IRQ_ROUTING_IRQCHIP
    return structs.IRQ_ROUTING_ENTRY.build(
        gsi=gsi, type=kind, flags=flags, u=body.build(**members).ljust(32, b"\0")
    )


def test_routing(kernel, aia):
    assert routes(kernel, [entry()]) == 0
    assert routes(kernel, []) == 0
    assert routes(kernel, [entry(flags=1)]) == 0
    for refused in (
        [entry(), entry()], [entry(kind=1, pin=1024)], [entry(kind=1, irqchip=1)], [entry(gsi=4096)],
        [entry(kind=9)], [entry(flags=2)], [entry(kind=1, flags=1)],
    ):  # fmt: skip
        assert routes(kernel, refused) == EINVAL
    assert routes(kernel, [], number=5000) == EINVAL
    assert routes(kernel, [], flags=1) == EINVAL
    assert routes(kernel, [], number=3) == EFAULT


def test_a_refused_table_leaves_the_old_one(kernel, aia):
    aia.initialized()
    assert routes(kernel, [entry(gsi=9, kind=1, pin=4)]) == 0
    assert routes(kernel, [entry(), entry()]) == EINVAL
    aia.set(AiaGroup.APLIC, regs.SOURCECFG + 4 * 3, regs.EDGE_RISE, 4)
    kernel.vm.irqchip.pulse_gsi(9)
    kernel.vm.irqchip.pulse_gsi(5)
    assert aia.get(AiaGroup.APLIC, regs.SETIP, 4) == 1 << 4


def test_tables():
    assert parse_table(b"") == {}
    assert default_table(3)[3][0].pin == 3
    (route,) = parse_table(entry(gsi=7, address_lo=0x28001000, address_hi=1, data=9))[7]
    assert (route.pin, route.address, route.data) == (None, 0x1_2800_1000, 9)
