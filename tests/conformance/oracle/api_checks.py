"""The oracle's checks of system, VM and vCPU ioctls that run no guest code, in the order of the recording."""

from __future__ import annotations

import struct

from protocol.abi import structs
from protocol.abi.structs_riscv import (
    CONFIG,
    CORE,
    CSR,
    CSR_ID,
    EXT_MULTI_EN,
    ISA_EXT,
    SBI_EXT,
    SIZE_U32,
    TIMER,
    one_reg,
    one_reg_size,
)  # fmt: skip

from .port import IMAGE, RAM, Port, Vm

EVERY_CAP = range(256)
TCGETS = 0x5401


def io(nr: int, direction: int = 0, size: int = 0) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | nr


def caps(handle) -> str:
    found = ((cap, handle.call("CHECK_EXTENSION", cap)) for cap in EVERY_CAP)
    return " ".join(f"{cap}={value}" for cap, value in found if value)


def system(port: Port, say) -> None:
    say("open", port.opened())
    sizes = {layout.name.removeprefix("kvm_"): layout.size for layout in structs.LAYOUTS}
    say(
        f"sizeof kvm_run={port.kvm_run_size} one_reg={sizes['one_reg']} riscv_core={33 * 8} "
        f"guest_debug={sizes['guest_debug']} enable_cap={sizes['enable_cap']}",
        f"irq_routing_entry={sizes['irq_routing_entry']}",
    )
    kvm = port.system
    for name in ("GET_API_VERSION", "GET_VCPU_MMAP_SIZE"):
        for argument in (0, 1):
            say(f"{name}({argument})", kvm.result(name, argument))
    for argument in (99999, -1):
        say(f"CHECK_EXTENSION({argument})", kvm.result("CHECK_EXTENSION", argument))
    *most, last = caps(kvm).split()
    say(f"CAPS sys: {' '.join(most)}", last)
    for kind in (0, 1, 2, 0xFF, 1 << 31, 1 << 40):
        say(f"CREATE_VM(type={kind:x})", port.create_vm_result(kind))
    say("sys: unknown _IO(0x7f)", kvm.result(io(0x7F)))
    say("sys: CREATE_VCPU", kvm.result("CREATE_VCPU"))
    say("sys: TCGETS (other type)", kvm.result(TCGETS))
    vm = port.create_vm()
    known, on_vm = caps(kvm).split(), caps(vm).split()
    say("CAPS vm-diff:", " ".join(cap for cap in on_vm if cap not in known))
    say("vm: unknown _IO(0x7f)", vm.result(io(0x7F)))
    say("vm: KVM_RUN", vm.result("RUN"))
    say("vm: CREATE_VM", vm.result("CREATE_VM"))
    say("vm: TCGETS", vm.result(TCGETS))
    say("vm: CREATE_IRQCHIP", vm.result("CREATE_IRQCHIP"))
    say("vm: SET_DEVICE_ATTR", vm.result("SET_DEVICE_ATTR", structs.DEVICE_ATTR.build()))
    memory_slots(port, vm, say)
    vm.close()


def memory_slots(port: Port, vm: Vm, say) -> None:
    size = 0x10000
    vm.map(RAM, 0x200000)
    vm.map(IMAGE, 0x10000, writable=False)

    def region(name: str, slot=0, flags=0, gpa=0x80000000, size=size, hva=RAM) -> None:
        say(f"SUMR {name}", vm.region(slot, flags, gpa, size, hva))

    region("ok")
    region("same again")
    region("change size", size=2 * size)
    region("change hva", hva=RAM + 0x1000)
    region("move gpa", gpa=0x80100000)
    region("move back")
    region("overlap", slot=1, gpa=0x80008000)
    region("size unaligned", slot=1, gpa=0x90000000, size=0x1800)
    region("gpa unaligned", slot=1, gpa=0x90000800)
    region("hva unaligned", slot=1, gpa=0x90000000, hva=RAM + 0x800)
    region("size0 absent", slot=1, gpa=0x90000000, size=0)
    region("wrap", slot=1, gpa=(1 << 64) - 0x1000)
    region("slot 32767", slot=32767, gpa=0x90000000)
    region("slot 32766", slot=32766, gpa=0x90000000)
    region("slot 65536 (as 1)", slot=65536, gpa=0xA0000000)
    region("flags READONLY", slot=2, gpa=0xA0000000, flags=2)
    region("READONLY->RW", slot=2, gpa=0xA0000000)
    region("flags GUEST_MEMFD v1", slot=3, gpa=0xB0000000, flags=4)
    region("flags 8", slot=3, gpa=0xB0000000, flags=8)
    region("LOG_DIRTY|READONLY", slot=3, gpa=0xB0000000, flags=3)
    region("gpa 2^56 (beyond gstage)", slot=4, gpa=1 << 56)
    region("gpa 2^50", slot=5, gpa=1 << 50)
    region("gpa 2^41", slot=6, gpa=1 << 41)
    region("hva kernel", slot=7, gpa=0xC0000000, hva=0xFFFFFFC000000000)
    region("hva unmapped", slot=7, gpa=0xC0000000, hva=IMAGE)
    region("npages 2^31", slot=7, gpa=1 << 44, size=1 << 43)
    region("delete 7", slot=7, size=0)
    say("SUMR NULL", vm.result("SET_USER_MEMORY_REGION", 0))
    two = structs.USERSPACE_MEMORY_REGION2
    members = {"slot": 8, "guest_phys_addr": 0xD0000000, "memory_size": size, "userspace_addr": RAM}
    say("SUMR2 ok", vm.result("SET_USER_MEMORY_REGION2", two.build(**members)))
    members |= {"slot": 9, "guest_phys_addr": 0xE0000000, "flags": 4}
    say("SUMR2 GUEST_MEMFD", vm.result("SET_USER_MEMORY_REGION2", two.build(**members)))
    say("CREATE_GUEST_MEMFD", vm.result("CREATE_GUEST_MEMFD", structs.CREATE_GUEST_MEMFD.build(size=size)))
    attributes = structs.MEMORY_ATTRIBUTES.build(address=0x80000000, size=size)
    say("SET_MEMORY_ATTRIBUTES", vm.result("SET_MEMORY_ATTRIBUTES", attributes))
    dirty_log(vm, say, size)


def dirty_log(vm: Vm, say, size: int) -> None:
    say("DLOG no flag", vm.get_log(0))
    say("DLOG absent", vm.get_log(20))
    say("DLOG slot 65536", vm.get_log(65536))
    say("SUMR set LOG_DIRTY", vm.region(0, 1, 0x80000000, size, RAM))
    say("DLOG ok", vm.get_log(0))
    say("DLOG NULL", vm.result("GET_DIRTY_LOG", structs.DIRTY_LOG.build(slot=0)))
    say("CLOG before enabling", vm.clear_log(0, 0, 16))
    say("CAP_MANUAL(3)", vm.enable_cap(168, 3))
    say("CAP_MANUAL(4)", vm.enable_cap(168, 4))
    say("CAP_MANUAL(2)", vm.enable_cap(168, 2))
    say("CAP_MANUAL flags=1", vm.enable_cap(168, 1, flags=1))
    say("CLOG ok", vm.clear_log(0, 0, 16))
    say("CLOG first 1", vm.clear_log(0, 1, 15))
    say("CLOG n=8 not end", vm.clear_log(0, 0, 8))
    say("CLOG n too big", vm.clear_log(0, 0, 17))
    say("CLOG n=0", vm.clear_log(0, 0, 0))
    say("CLOG absent", vm.clear_log(20, 0, 16))
    say("cap unknown", vm.enable_cap(9999, 0))
    say("cap HALT_POLL", vm.enable_cap(182, 1000))
    say("cap HALT_POLL 2^33", vm.enable_cap(182, 1 << 33))
    say("cap RISCV_MP_STATE_RESET(242)", vm.enable_cap(242, 0))
    say("cap VM_GPA_BITS(207) 41 with slots", vm.enable_cap(207, 41))
    say("cap DIRTY_RING_ACQ_REL 65536 after slots", vm.enable_cap(223, 65536))
    say("again", vm.enable_cap(223, 65536))
    say("DIRTY_LOG_RING (192)", vm.enable_cap(192, 65536))
    say("WITH_BITMAP (225)", vm.enable_cap(225, 0))


def capabilities(port: Port, say) -> None:
    vm = port.create_vm()
    say("ring size 100", vm.enable_cap(223, 100))
    say("ring size 0", vm.enable_cap(223, 0))
    say("ring 512", vm.enable_cap(223, 512))
    say("ring 2^30", vm.enable_cap(223, 1 << 30))
    for bits in (41, 50, 60):
        say(f"cap VM_GPA_BITS {bits}", vm.enable_cap(207, bits))
    say("vm CHECK GPA_BITS", vm.result("CHECK_EXTENSION", 207))
    say("vcpu", vm.result_handle("CREATE_VCPU", 0))
    say("ring after vcpu", vm.enable_cap(223, 4096))
    say("RESET_DIRTY_RINGS none", vm.result("RESET_DIRTY_RINGS"))
    say("GPA_BITS after vcpu", vm.enable_cap(207, 41))
    vm.close()


def eventfds(port: Port, say) -> None:
    vm = port.create_vm()
    event = vm.eventfd()
    say("IRQFD no irqchip", vm.irqfd(event, 5))
    say("IRQFD bad flags", vm.irqfd(event, 5, flags=4))
    say("IRQFD deassign none", vm.irqfd(vm.eventfd(), 5, flags=1))
    say("IRQ_LINE no irqchip", vm.result("IRQ_LINE", structs.IRQ_LEVEL.build(irq=5, level=1)))
    say("SIGNAL_MSI no irqchip", vm.msi(0x28000000, 1))
    say("SET_GSI_ROUTING no irqchip", vm.routing([]))
    at = 0x10000000
    say("IOEVENTFD len4", vm.ioeventfd(event, at, 4))
    say("IOEVENTFD dup", vm.ioeventfd(event, at, 4))
    say("IOEVENTFD other len", vm.ioeventfd(event, at, 2))
    say("IOEVENTFD len0 over", vm.ioeventfd(event, at, 0))
    say("IOEVENTFD len3", vm.ioeventfd(event, at, 3))
    say("IOEVENTFD len16", vm.ioeventfd(event, at, 16))
    say("IOEVENTFD datamatch", vm.ioeventfd(event, at + 8, 4, match=1))
    say("IOEVENTFD datamatch2", vm.ioeventfd(event, at + 8, 4, match=2))
    say("IOEVENTFD dm+len0", vm.ioeventfd(event, at + 16, 0, match=1))
    say("IOEVENTFD flags 0x100", vm.ioeventfd(event, at + 16, 4, flags=0x100))
    say("IOEVENTFD fd -1", vm.ioeventfd(-1, at + 16, 4))
    say("IOEVENTFD fd=kvm", vm.ioeventfd(vm.number, at + 16, 4))
    say("IOEVENTFD wrap", vm.ioeventfd(event, (1 << 64) - 2, 4))
    say("IOEVENTFD PIO", vm.ioeventfd(event, at, 4, flags=2))
    vm.map(RAM, 0x10000)
    vm.region(0, 0, 0x80000000, 0x10000, RAM)
    say("IOEVENTFD over RAM", vm.ioeventfd(event, 0x80000000, 4))
    say("IOEVENTFD deassign", vm.ioeventfd(event, at, 4, flags=4))
    say("IOEVENTFD deassign again", vm.ioeventfd(event, at, 4, flags=4))
    register, unregister = "REGISTER_COALESCED_MMIO", "UNREGISTER_COALESCED_MMIO"
    zone = structs.COALESCED_MMIO_ZONE.build
    say("COALESCED reg", vm.result(register, zone(addr=at, size=0x100)))
    say("COALESCED reg again", vm.result(register, zone(addr=at, size=0x100)))
    say("COALESCED pio2", vm.result(register, zone(addr=at, size=0x100, pio=2)))
    say("COALESCED unreg", vm.result(unregister, zone(addr=at, size=0x100)))
    say("COALESCED unreg again", vm.result(unregister, zone(addr=at, size=0x100)))
    say("COALESCED size0", vm.result(register, zone(addr=at, size=0)))
    answer, created = vm.create_device(11, flags=1)
    assert not created
    say(f"CREATE_DEVICE type 11 TEST -> {answer}")
    say("CREATE_DEVICE VFIO", vm.create_device(4)[0])
    say("CREATE_DEVICE VFIO again", vm.create_device(4)[0])
    vm.close()


UNSUPPORTED = (
    ("GET_REGS", io(0x81, 2, 8)), ("SET_REGS", io(0x82, 1, 8)), ("GET_SREGS", io(0x83, 2, 8)),
    ("GET_FPU", io(0x8C, 2, 8)), ("TRANSLATE", io(0x85, 3, 24)),
    ("GET_VCPU_EVENTS (0x9f,64)", io(0x9F, 2, 64)), ("NMI", io(0x9A)), ("SMI", io(0xB7)),
    ("KVMCLOCK_CTRL", io(0xAD)),
)  # fmt: skip


def vcpus(port: Port, say) -> None:
    vm = port.create_vm()
    say("CREATE_VCPU 0", vm.result_handle("CREATE_VCPU", 0))
    say("CREATE_VCPU 0 again", vm.result_handle("CREATE_VCPU", 0))
    for number, name in ((5, "5"), (1023, "1023"), (1024, "1024"), (1 << 31, "2^31"), (1 << 32, "2^32")):
        say(f"CREATE_VCPU {name}", vm.result_handle("CREATE_VCPU", number))
    first, second = vm.vcpus[0], vm.vcpus[1]
    say("vcpu unknown", first.result(io(0x7F)))
    say("vcpu TCGETS", first.result(TCGETS))
    say("vcpu CREATE_VCPU", first.result("CREATE_VCPU", 9))
    say("vcpu CHECK_EXTENSION", first.result("CHECK_EXTENSION", 3))
    say("vcpu ENABLE_CAP", first.result("ENABLE_CAP", structs.ENABLE_CAP.build(cap=182)))
    say("RUN arg=1", first.result("RUN", 1))
    for name, request in UNSUPPORTED:
        say(name, first.result(request, bytes(64)))
    say("vcpu SET_DEVICE_ATTR", first.result("SET_DEVICE_ATTR", structs.DEVICE_ATTR.build()))
    say("PRE_FAULT_MEMORY", first.result("PRE_FAULT_MEMORY", structs.PRE_FAULT_MEMORY.build()))
    say("GET_MP_STATE vcpu idx0", f"0 |mp_state={first.mp_state()}")
    say("GET_MP_STATE vcpu idx1", f"0 |mp_state={second.mp_state()}")
    six_twelve = port.compat == "6.12"
    if not six_twelve:
        vm.enable_cap(242, 0)
    for state in range(12):
        say(f"SET_MP_STATE {state}", first.set_mp_state(state))
    first.set_mp_state(0)
    say("GET_MP_STATE NULL", first.result("GET_MP_STATE", 0))
    mp_reset(port, say)
    for value, name in ((0xFFFFFFFF, "0xffffffff"), (0xFFFFFFFE, "0xfffffffe"), (0, "0"), (9, "0x9"),
                        (12345, "0x3039")):  # fmt: skip
        answer = first.result("INTERRUPT", structs.INTERRUPT.build(irq=value))
        say(f"INTERRUPT {name}", f"{answer} |sip={first.get(CSR_ID['sip']):x}")
    say("INTERRUPT NULL", first.result("INTERRUPT", 0))
    say("SIGMASK NULL", first.result("SET_SIGNAL_MASK", 0))
    for length in (8, 16, 4):
        say(f"SIGMASK {length}", first.result("SET_SIGNAL_MASK", struct.pack("<I", length) + bytes(16)))
    debug = structs.GUEST_DEBUG.build
    say("GUEST_DEBUG 0", first.result("SET_GUEST_DEBUG", debug()))
    say("GUEST_DEBUG all", first.result("SET_GUEST_DEBUG", debug(control=0xFFFFFFFF)))
    say(f"GUEST_DEBUG ioctl nr {port.number_of('SET_GUEST_DEBUG'):#x}")
    first.result("SET_GUEST_DEBUG", debug())
    register_list(first, say)
    registers(first, say)
    statistics(vm, first, say)
    vm.close()


def mp_reset(port: Port, say) -> None:
    """INIT_RECEIVED without and with its capability, on a VM of its own."""
    vm = port.create_vm()
    vm.result_handle("CREATE_VCPU", 0)
    vcpu = vm.vcpus[0]
    vcpu.set(port.core("pc"), 0x80001234)
    vcpu.set(port.core("a0"), 0x4D)
    say("SET_MP_STATE INIT_RECEIVED w/o cap 242", vcpu.set_mp_state(2))
    say("cap 242 after vcpu", vm.enable_cap(242, 0))
    say("cap 242 flags=1", vm.enable_cap(242, 0, flags=1))
    answer = vcpu.set_mp_state(2)
    pc, a0 = vcpu.get(port.core("pc")), vcpu.get(port.core("a0"))
    pc = pc - 0x80000000 if pc >= 0x80000000 else pc
    say("SET_MP_STATE INIT_RECEIVED w cap", f"{answer} |after INIT: mp={vcpu.mp_state()} pc={pc:x} a0={a0:x}")
    vm.close()


def register_list(vcpu, say) -> None:
    answer, ids = vcpu.reg_list(0)
    say("GET_REG_LIST n=0", f"{answer} |n={ids}")
    answer, ids = vcpu.reg_list(ids)
    good, failures = 0, []
    for register in ids:
        value = vcpu.get_bytes(register, one_reg_size(register))
        good += isinstance(value, bytes)
        written = vcpu.set_bytes(register, value)
        if written != "0":
            failures.append(f"{register:x} {written}")
    failed = "".join(f" |SET of read-back value fails: {failure}" for failure in failures)
    say("GET_REG_LIST", answer + failed)
    say(f"get ok {good} set-fail {len(failures)}")


def registers(vcpu, say) -> None:
    pc = one_reg(CORE, 0)
    say("ONE_REG id 0", vcpu.get_result(0))
    say("ONE_REG arch x86 core.pc", vcpu.get_result(pc & ~(0xF << 60) | 0x2 << 60))
    say("ONE_REG core u32", vcpu.get_result(one_reg(CORE, 0, 0, SIZE_U32)))
    say("ONE_REG core 33", vcpu.get_result(one_reg(CORE, 33)))
    say("ONE_REG core 0xffff", vcpu.get_result(one_reg(CORE, 0xFFFF)))
    say("ONE_REG type 0", vcpu.get_result(one_reg(0, 0)))
    say("ONE_REG type 0xb", vcpu.get_result(one_reg(11, 0)))
    say("ONE_REG config 8", vcpu.get_result(one_reg(CONFIG, 8)))
    say("ONE_REG csr 11", vcpu.get_result(one_reg(CSR, 11)))
    say("ONE_REG csr subtype 7", vcpu.get_result(one_reg(CSR, 0, 7)))
    say("ONE_REG timer 4", vcpu.get_result(one_reg(TIMER, 4)))
    null = structs.ONE_REG.build(id=pc)
    say("ONE_REG addr NULL get", vcpu.result("GET_ONE_REG", null))
    say("ONE_REG addr NULL set", vcpu.result("SET_ONE_REG", null))
    say("ONE_REG isa_ext 200", vcpu.get_result(one_reg(ISA_EXT, 200)))
    say("ONE_REG isa_ext V(15)", vcpu.get_result(one_reg(ISA_EXT, 15)))
    say("ONE_REG sbi_ext 99", vcpu.get_result(one_reg(SBI_EXT, 99)))
    value = 0
    for word in (0, 1):
        # As the recording program did, the buffer of the last answer is shown again when this one failed.
        answer = vcpu.get_result(one_reg(ISA_EXT, word, EXT_MULTI_EN))
        value = vcpu.get(one_reg(ISA_EXT, word, EXT_MULTI_EN)) if answer == "0" else value
        say(f"ONE_REG isa multi_en {word}", f"{answer} |{value:x}")
    say("ONE_REG isa multi_en 2", vcpu.get_result(one_reg(ISA_EXT, 2, EXT_MULTI_EN)))
    enabled = one_reg(SBI_EXT, 0, EXT_MULTI_EN)
    say("ONE_REG sbi multi_en 0", f"{vcpu.get_result(enabled)} |{vcpu.get(enabled):x}")
    mode = one_reg(CORE, 32)
    say("SET core mode 7", f"{vcpu.set(mode, 7)} |mode={vcpu.get(mode)}")
    say("SET core mode S", vcpu.set(mode, 1))
    say("SET timer freq wrong", vcpu.set(one_reg(TIMER, 0), 12345))
    say("SET timer time", vcpu.set(one_reg(TIMER, 1), 0x1000))
    say("SET timer state 9", vcpu.set(one_reg(TIMER, 3), 9))
    say("SET isa_ext H(4)=1", vcpu.set(one_reg(ISA_EXT, 4), 1))
    say("SET isa_ext I(5)=0", vcpu.set(one_reg(ISA_EXT, 5), 0))
    say("SET isa_ext SSTC(8)=0", vcpu.set(one_reg(ISA_EXT, 8), 0))
    say("SET isa_ext SSTC(8)=5", vcpu.set(one_reg(ISA_EXT, 8), 5))
    isa = one_reg(CONFIG, 0)
    say("SET config isa 0", vcpu.set(isa, 0))
    say("get", f"{vcpu.get_result(isa)} |isa={vcpu.get(isa):x}")
    say("SET config isa 1<<30", vcpu.set(isa, 1 << 30))
    say("SET config satp_mode 99", vcpu.set(one_reg(CONFIG, 6), 99))
    say("SET sbi_ext DBCN(9)=1", vcpu.set(one_reg(SBI_EXT, 9), 1))
    say("SET sbi_ext DBCN(9)=2", vcpu.set(one_reg(SBI_EXT, 9), 2))
    for name, value in (("sip", 0xFFFF), ("satp", -1), ("sstatus", -1)):
        register = CSR_ID[name]
        written = vcpu.set(register, value & (1 << 64) - 1)
        shown = "garbage" if value < 0 else f"{value:#x}"
        say(f"SET {name} {shown}", f"{written} |{name}={vcpu.get(register):x}")


def statistics(vm: Vm, vcpu, say) -> None:
    for handle, name in ((vm, "vm"), (vcpu, "vcpu")):
        answer, data = handle.stats()
        say(f"GET_STATS_FD {name}", answer)
        header = structs.STATS_HEADER.parse(data)
        say(
            f"hdr n={structs.STATS_HEADER.size} name={header.name_size} num={header.num_desc} "
            f"id={header.id_offset} desc={header.desc_offset} data={header.data_offset}"
        )
    label = data[header.id_offset : header.id_offset + header.name_size].rstrip(b"\0").decode()
    say(f"id={label}")
