"""The oracle's checks of the in-kernel AIA, in the order of the recording."""

from __future__ import annotations

import struct

from protocol.abi import structs
from protocol.abi.structs_riscv import AiaConfig as Config
from protocol.abi.structs_riscv import AiaGroup as Group
from protocol.abi.structs_riscv import aia_addr_imsic, aia_imsic_attr

from .port import Guest, Port

APLIC, IMSIC = 0x0D000000, 0x28000000
MSI, PIN = 2, 1


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def attributes(port: Port, say) -> None:
    with Guest(port, cpus=0) as g:
        vm = g.vm
        say("AIA type=11")
        answer, aia = vm.create_device(11)
        say("AIA create", answer)
        say("AIA create twice", vm.create_device(11)[0])
        for attribute in range(8):
            answer, value = aia.get(Group.CONFIG, attribute, 4)
            say(f"AIA get config {attribute}", f"{answer} |= {int.from_bytes(value, 'little')}")
        answer, value = aia.get(Group.ADDR, 0, 8)
        say("AIA get addr aplic", f"{answer} |= {int.from_bytes(value, 'little'):x}")
        say("AIA get addr imsic0 no vcpu", aia.get(Group.ADDR, aia_addr_imsic(0), 8)[0])
        say("AIA get grp 9", aia.get(9, 0, 8)[0])
        say("AIA get ctrl", aia.get(Group.CTRL, 0, 8)[0])
        say("AIA has ctrl", aia.has(Group.CTRL, 0))
        say("AIA has grp9", aia.has(9, 0))
        say("AIA has config 7", aia.has(Group.CONFIG, 7))
        say("AIA other ioctl", aia.result("CHECK_EXTENSION", 3))
        say("AIA aplic reg before init", aia.get(Group.APLIC, 0, 4)[0])
        say("AIA imsic reg before init", aia.get(Group.IMSIC, aia_imsic_attr(0, 0x70), 8)[0])
        for name, value in (("7", 7), ("EMUL", 0), ("HWACCEL", 1), ("AUTO", 2)):
            say(f"AIA mode {name}", aia.set(Group.CONFIG, Config.MODE, u32(value)))
        for value in (62, 64, 255, 2047):
            say(f"AIA ids {value}", aia.set(Group.CONFIG, Config.IDS, u32(value)))
        for value in (96, 1024):
            say(f"AIA srcs {value}", aia.set(Group.CONFIG, Config.SRCS, u32(value)))
        for name, attribute, value in (
            ("group bits 8", Config.GROUP_BITS, 8),
            ("group shift 23", Config.GROUP_SHIFT, 23),
            ("hart bits 16", Config.HART_BITS, 16),
            ("guest bits 8", Config.GUEST_BITS, 8),
            ("hart bits 1", Config.HART_BITS, 1),
        ):
            say(f"AIA {name}", aia.set(Group.CONFIG, attribute, u32(value)))
        say("AIA init no addr (srcs=96)", aia.set(Group.CTRL, 0))
        say("AIA aplic addr unaligned", aia.set(Group.ADDR, 0, u64(APLIC + 0x800)))
        say("AIA aplic addr", aia.set(Group.ADDR, 0, u64(APLIC)))
        say("AIA init no vcpu", aia.set(Group.CTRL, 0))


def configured(g: Guest):
    """An AIA with 96 sources at the usual places, before its IMSICs have addresses."""
    _, aia = g.vm.create_device(11)
    aia.set(Group.CONFIG, Config.SRCS, u32(96))
    aia.set(Group.CONFIG, Config.HART_BITS, u32(1))
    aia.set(Group.ADDR, 0, u64(APLIC))
    return aia


def line(vm, source: int, level: int = 1) -> str:
    return vm.result("IRQ_LINE", structs.IRQ_LEVEL.build(irq=source, level=level))


def interrupts(port: Port, say) -> None:
    with Guest(port, cpus=2) as g:
        vm = g.vm
        aia = configured(g)
        say("AIA init w/o imsic addr", aia.set(Group.CTRL, 0))
        for index, name in ((0, "imsic0"), (1, "imsic1"), (2, "imsic2 absent")):
            address = u64(IMSIC + 0x1000 * index)
            say(f"AIA {name}", aia.set(Group.ADDR, aia_addr_imsic(index), address))
        say("IRQ_LINE before init", line(vm, 5))
        event, other, third = vm.eventfd(), vm.eventfd(), vm.eventfd()
        say("IRQFD before init", vm.irqfd(event, 5))
        say("MSI before init", vm.msi(IMSIC, 5))
        say("AIA init ctrl 1", aia.set(Group.CTRL, 1))
        say("AIA init", aia.set(Group.CTRL, 0))
        say("AIA init twice", aia.set(Group.CTRL, 0))
        say("AIA set srcs after init", aia.set(Group.CONFIG, Config.SRCS, u32(96)))
        say("AIA set addr after init", aia.set(Group.ADDR, 0, u64(APLIC)))
        say("IRQ_LINE 5 1", line(vm, 5))
        for source in (0, 97, 5000):
            say(f"IRQ_LINE {source}", line(vm, source))
        say("IRQFD gsi5", vm.irqfd(event, 5))
        say("IRQFD gsi5 again", vm.irqfd(event, 5))
        say("IRQFD same ev gsi6", vm.irqfd(event, 6))
        say("IRQFD fd -1", vm.irqfd(-1, 6))
        say("IRQFD fd kvm", vm.irqfd(vm.number, 6))
        say("IRQFD gsi 5000", vm.irqfd(other, 5000))
        say("IRQFD resample", vm.irqfd(third, 7, flags=2, resample=other))
        say("IRQFD resample bad", vm.irqfd(vm.eventfd(), 8, flags=2, resample=-1))
        say("IRQFD deassign", vm.irqfd(event, 5, flags=1))
        say("MSI ok", vm.msi(IMSIC, 5))
        say("MSI no target", vm.msi(IMSIC + 0x100000, 5))
        say("MSI bad id", vm.msi(IMSIC, 256))
        say("MSI guest index", vm.msi(IMSIC + 8, 5))
        say("MSI flags 0x80", vm.msi(IMSIC, 5, flags=0x80))
        say("MSI flags DEVID", vm.msi(IMSIC, 5, flags=1))
        say("CREATE_VCPU after init", vm.result_handle("CREATE_VCPU", 2))
        say("KVM_INTERRUPT with irqchip", g.cpu.result("INTERRUPT", structs.INTERRUPT.build(irq=0xFFFFFFFF)))
        registers(aia, say)
        routing(vm, say)
        g.cpu.set_pc("loop")
        say("RUN run", g.loop())
    with Guest(port) as g:
        g.cpu.set_pc("loop")
        g.loop()
        say("AIA create after ran_once", g.vm.create_device(11)[0])


def registers(aia, say) -> None:
    answer, value = aia.get(Group.APLIC, 0, 4)
    say("APLIC get domaincfg", f"{answer} |={int.from_bytes(value, 'little'):x}")
    say("APLIC unaligned", aia.get(Group.APLIC, 2, 4)[0])
    say("APLIC 0x4000", aia.get(Group.APLIC, 0x4000, 4)[0])
    say("APLIC 0x3ffc", aia.get(Group.APLIC, 0x3FFC, 4)[0])
    say("IMSIC eidelivery", aia.get(Group.IMSIC, aia_imsic_attr(0, 0x70), 8)[0])
    say("IMSIC isel 0x71", aia.get(Group.IMSIC, aia_imsic_attr(0, 0x71), 8)[0])
    answer, value = aia.get(Group.IMSIC, aia_imsic_attr(0, 0x80), 8)
    say("IMSIC isel 0x80", f"{answer} |eip0={int.from_bytes(value, 'little'):x}")
    say("IMSIC isel 0x81 (odd)", aia.get(Group.IMSIC, aia_imsic_attr(0, 0x81), 8)[0])
    say("IMSIC vcpu 99", aia.get(Group.IMSIC, aia_imsic_attr(99, 0x70), 8)[0])


def routing(vm, say) -> None:
    msi = structs.IRQ_ROUTING_MSI.build(address_lo=IMSIC, data=5)
    chip = structs.IRQ_ROUTING_IRQCHIP.build

    def entry(gsi: int, kind: int, body: bytes, flags: int = 0) -> bytes:
        return structs.IRQ_ROUTING_ENTRY.build(gsi=gsi, type=kind, flags=flags, u=body.ljust(32, b"\0"))

    say("GSI 1 msi", vm.routing([entry(1, MSI, msi)]))
    say("GSI dup msi", vm.routing([entry(1, MSI, msi)] * 2))
    say("GSI irqchip pin5", vm.routing([entry(1, PIN, chip(pin=5))]))
    say("GSI irqchip pin1024", vm.routing([entry(1, PIN, chip(pin=1024))]))
    say("GSI irqchip 1", vm.routing([entry(1, PIN, chip(irqchip=1, pin=5))]))
    say("GSI gsi 4096", vm.routing([entry(4096, MSI, msi)]))
    say("GSI type 9", vm.routing([entry(1, 9, msi)]))
    say("GSI flags", vm.routing([], flags=1))
    say("GSI nr 5000", vm.routing([], number=5000))
