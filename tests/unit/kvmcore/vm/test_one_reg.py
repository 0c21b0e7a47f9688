"""ONE_REG and GET_REG_LIST on a vCPU (KVM_ABI 1.11): ids, sizes, rules, and reading back what was read."""

from __future__ import annotations

import random
import struct
from errno import E2BIG, EBUSY, EFAULT, EINVAL, ENOENT

import pytest

from kvmcore import ioctl
from kvmcore.vm import csr_access
from kvmcore.vm.address_space import InlineSegment
from protocol.abi import structs_riscv as ids
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs_riscv import IsaExt, SbiExt, one_reg, one_reg_size

POINTEE = 0x7001_0000  # where conftest puts pointees
ALL_ONES = (1 << 64) - 1


class Cpu:
    """A vCPU and its registers by ioctl."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.vcpu = kernel.session.lookup(kernel.call(kernel.vm, "CREATE_VCPU", 0))

    def get(self, register):
        self.kernel.ioctl(self.vcpu, "GET_ONE_REG", bytes(one_reg_size(register)), id=register, addr=POINTEE)
        return int.from_bytes(self.kernel.pointee, "little")

    def get_errno(self, register):
        return self.kernel.errno(self.vcpu, "GET_ONE_REG", bytes(8), id=register, addr=POINTEE)

    def set(self, register, value):
        data = (value & ALL_ONES).to_bytes(8, "little")[: one_reg_size(register)]
        return self.kernel.errno(self.vcpu, "SET_ONE_REG", data, id=register, addr=POINTEE)

    def list(self, room):
        segment = InlineSegment(POINTEE, bytearray(struct.pack("<Q", room) + bytes(8 * room)))
        with self.kernel.session.mm.overlay([segment]):
            try:
                result = ioctl.call(self.vcpu, BY_NAME["GET_REG_LIST"].number, POINTEE)
            except KvmError as error:
                result = error.errno
        (count,) = struct.unpack_from("<Q", segment.data)
        return result, count, list(struct.unpack_from(f"<{min(count, room)}Q", segment.data, 8))


@pytest.fixture
def cpu(kernel):
    return Cpu(kernel)


def test_reset_state(cpu):
    assert [cpu.get(register) for register in ids.CORE_ID.values()] == [0] * 32 + [1]
    csrs = {name: cpu.get(register) for name, register in ids.CSR_ID.items()}
    assert csrs.pop("scounteren") == 7  # as kvm_arch_vcpu_create() leaves it
    assert not any(csrs.values()), csrs
    assert cpu.get(ids.TIMER_ID["compare"]) == ALL_ONES
    assert cpu.get(ids.TIMER_ID["state"]) == 0
    assert cpu.get(ids.TIMER_ID["frequency"]) == 10_000_000


def test_list_and_read_back(cpu):
    result, count, _ = cpu.list(0)
    assert result == E2BIG
    assert cpu.list(count - 1)[0] == E2BIG
    result, again, registers = cpu.list(count)
    assert (result, again, len(set(registers))) == (0, count, count)
    types = [register >> 24 & 0xFF for register in registers]
    assert types == sorted(types)
    assert [types.count(kind) for kind in (ids.CONFIG, ids.CORE, ids.CSR, ids.TIMER, ids.FP_F, ids.FP_D)] == [
        8, 33, 18, 4, 33, 33,
    ]  # fmt: skip
    refused = [register for register in registers if cpu.set(register, cpu.get(register))]
    assert refused == [ids.TIMER_ID["state"]]  # as on Linux: switching off what is off


@pytest.mark.parametrize(
    ("register", "errno"),
    [
        (0, ENOENT),
        (one_reg(ids.CORE, 0) & ~(0xF << 60) | 2 << 60, 0),
        (one_reg(ids.CORE, 0, 0, ids.SIZE_U32), EINVAL),
        (one_reg(ids.CORE, 33), ENOENT),
        (one_reg(ids.CORE, 0xFFFF), ENOENT),
        (one_reg(ids.CORE, 0) | 1 << 40, ENOENT),
        (one_reg(0, 0), ENOENT),
        (one_reg(11, 0), ENOENT),
        (one_reg(ids.CONFIG, 8), ENOENT),
        (one_reg(ids.CSR, 11), ENOENT),
        (one_reg(ids.CSR, 0, 7), ENOENT),
        (one_reg(ids.TIMER, 4), ENOENT),
        (one_reg(ids.FP_D, 32), EINVAL),
        (one_reg(ids.FP_D, 33), ENOENT),
        (one_reg(ids.FP_F, 0), EINVAL),
        (one_reg(ids.ISA_EXT, 200), ENOENT),
        (one_reg(ids.ISA_EXT, IsaExt.V), ENOENT),
        (one_reg(ids.ISA_EXT, IsaExt.H), 0),
        (one_reg(ids.ISA_EXT, 0, ids.EXT_MULTI_EN), 0),
        (one_reg(ids.ISA_EXT, 2, ids.EXT_MULTI_EN), ENOENT),
        (one_reg(ids.ISA_EXT, 0, 3), ENOENT),
        (one_reg(ids.SBI_EXT, 99), ENOENT),
        (one_reg(ids.SBI_EXT, SbiExt.STA), ENOENT),
        (one_reg(ids.SBI_EXT, 1, ids.EXT_MULTI_EN), ENOENT),
        (one_reg(ids.VECTOR, 0), ENOENT),
        (one_reg(ids.SBI_STATE, 0), ENOENT),
    ],
)
def test_ids(cpu, register, errno):
    assert cpu.get_errno(register) == errno


def test_null_pointers(cpu):
    for name in ("GET_ONE_REG", "SET_ONE_REG"):
        assert cpu.kernel.errno(cpu.vcpu, name, id=ids.PC) == EFAULT


def test_core_and_floating_point(cpu):
    assert cpu.set(ids.MODE, 7) == 0
    assert cpu.get(ids.MODE) == 0
    for register in (ids.PC, ids.A0, ids.FP_D_ID["f31"]):
        assert cpu.set(register, 0x1122334455667788) == 0
        assert cpu.get(register) == 0x1122334455667788
    single = one_reg(ids.FP_F, 31, 0, ids.SIZE_U32)
    assert cpu.get(single) == 0x55667788
    assert cpu.set(single, 1) == 0
    assert cpu.get(ids.FP_D_ID["f31"]) == 0x1122334400000001
    assert cpu.set(ids.FP_D_ID["fcsr"], 0xFF) == 0
    assert cpu.vcpu.hart.state.frm == 7
    assert cpu.get(one_reg(ids.FP_F, 32, 0, ids.SIZE_U32)) == 0xFF


def test_csrs_are_raw_until_the_vcpu_runs(cpu):
    for name in ("satp", "sstatus", "stvec"):
        assert cpu.set(ids.CSR_ID[name], -1) == 0
        assert cpu.get(ids.CSR_ID[name]) == ALL_ONES
    assert cpu.set(ids.CSR_ID["sip"], 0xFFFF) == 0
    assert cpu.get(ids.CSR_ID["sip"]) == 0x2222
    cpu.vcpu.registers.entering()
    assert cpu.get(ids.CSR_ID["satp"]) == 0
    assert cpu.get(ids.CSR_ID["stvec"]) == ALL_ONES & ~2
    assert cpu.get(ids.CSR_ID["sstatus"]) == 0x80000002000C6122
    assert cpu.get(ids.CSR_ID["sip"]) & 0x202 == 0x202


def test_timer(cpu):
    time, compare, state = (ids.TIMER_ID[name] for name in ("time", "compare", "state"))
    assert cpu.set(ids.TIMER_ID["frequency"], 5) == EINVAL
    assert cpu.set(time, 1 << 40) == 0
    assert 0 <= cpu.get(time) - (1 << 40) < 10_000_000
    assert cpu.set(state, 9) == EINVAL
    assert cpu.set(compare, 1 << 41) == 0
    assert cpu.set(state, 1) == 0
    assert (cpu.get(compare), cpu.get(state)) == (1 << 41, 1)
    assert cpu.set(state, 0) == 0
    assert cpu.get(state) == 0


def test_isa(cpu):
    isa = ids.CONFIG_ID["isa"]
    assert cpu.get(isa) == 0x112D
    assert cpu.set(isa, 1 << 30) == EINVAL
    assert cpu.set(isa, 0) == 0
    assert cpu.get(isa) == 0x1105
    assert cpu.get_errno(ids.FP_D_ID["f0"]) == ENOENT
    assert cpu.set(isa, 0x112D) == 0
    for extension, value, errno in (
        (IsaExt.H, 1, EINVAL), (IsaExt.H, 0, 0), (IsaExt.I, 0, EINVAL), (IsaExt.SSTC, 0, EINVAL),
        (IsaExt.SSTC, 5, EINVAL), (IsaExt.ZICBOZ, 0, 0), (IsaExt.V, 0, ENOENT),
    ):  # fmt: skip
        assert cpu.set(one_reg(ids.ISA_EXT, extension), value) == errno
    assert cpu.get_errno(ids.CONFIG_ID["zicboz_block_size"]) == ENOENT
    enabled = one_reg(ids.ISA_EXT, 0, ids.EXT_MULTI_EN)
    assert cpu.set(enabled, 1 << IsaExt.ZICBOZ | 1 << IsaExt.H | 1 << IsaExt.V) == 0
    assert cpu.get(enabled) & (1 << IsaExt.ZICBOZ | 1 << IsaExt.H) == 1 << IsaExt.ZICBOZ
    assert cpu.set(one_reg(ids.ISA_EXT, 0, ids.EXT_MULTI_DIS), 1 << IsaExt.F) == 0
    assert cpu.get(one_reg(ids.ISA_EXT, IsaExt.F)) == 0
    assert cpu.get(one_reg(ids.ISA_EXT, 0, ids.EXT_MULTI_DIS)) == cpu.get(enabled) ^ ALL_ONES


def test_configuration(cpu):
    assert cpu.set(ids.CONFIG_ID["zicbom_block_size"], 32) == EINVAL
    assert cpu.set(ids.CONFIG_ID["zicbom_block_size"], 64) == 0
    assert cpu.set(ids.CONFIG_ID["satp_mode"], 99) == EINVAL
    assert cpu.set(ids.CONFIG_ID["mvendorid"], 5) == 0
    assert cpu.vcpu.registers.machine_id("mvendorid") == 5
    dbcn = one_reg(ids.SBI_EXT, SbiExt.DBCN)
    assert cpu.get(dbcn) == 0
    assert cpu.set(dbcn, 2) == EINVAL
    assert cpu.set(dbcn, 1) == 0
    assert cpu.vcpu.registers.sbi_enabled(SbiExt.DBCN)


def test_what_is_frozen_after_the_first_run(cpu):
    cpu.vcpu.page[1] = 1  # immediate_exit
    with pytest.raises(KvmError), cpu.vcpu.mutex:
        cpu.vcpu.run()
    assert cpu.set(ids.CONFIG_ID["isa"], 0x112D) == 0
    assert cpu.set(ids.CONFIG_ID["isa"], 0) == EBUSY
    assert cpu.set(ids.CONFIG_ID["mvendorid"], 1) == EBUSY
    assert cpu.set(one_reg(ids.ISA_EXT, IsaExt.ZICBOZ), 0) == EBUSY
    assert cpu.set(one_reg(ids.ISA_EXT, IsaExt.ZICBOZ), 1) == 0
    assert cpu.set(one_reg(ids.SBI_EXT, SbiExt.TIME), 1) == EBUSY
    assert cpu.set(ids.PC, 0x80000000) == 0


def test_interrupt_shows_in_sip(cpu):
    for value, sip in ((0xFFFFFFFF, 0x200), (0xFFFFFFFE, 0), (0xFFFFFFFF, 0x200), (9, 0)):
        assert cpu.kernel.errno(cpu.vcpu, "INTERRUPT", irq=value) == 0
        assert cpu.get(ids.CSR_ID["sip"]) == sip


@pytest.mark.parametrize("name", ["sstatus", "sie", "stvec", "sscratch", "sepc", "scause", "stval", "satp",
                                  "scounteren", "senvcfg", "siselect", "fcsr"])  # fmt: skip
def test_outside_and_guest_agree_on_csrs(cpu, name):
    """csr_access and the CSR instructions' own definition give and take the same values."""
    hart = cpu.vcpu.hart
    hart.enable_imsic(255)
    hart.state.fs = 3
    generator = random.Random(name)
    for value in [0, ALL_ONES, *(generator.getrandbits(64) for _ in range(50))]:
        csr_access.write(hart, name, value)
        outside = csr_access.read(hart, name)
        assert hart.read_csr(name) == outside
        csr_access.write(hart, name, 0)
        hart.state.fs = 3
        hart.write_csr(name, value)
        if name != "satp" or csr_access.read(hart, name):
            assert csr_access.read(hart, name) == outside
