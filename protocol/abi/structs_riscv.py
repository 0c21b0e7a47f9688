"""RISC-V's own numbers: ONE_REG ids, ISA and SBI extension ids, AIA device attributes (KVM_ABI 1.10, 1.11).

An id is 0x8<<60 | size_log2<<52 | type<<24 | subtype<<16 | index; kvmcore ignores the top nibble, as Linux
does. Used by kvmcore/vm/one_reg.py and irqchip, by the client and by qemu_user. Numbers only, no rules.
"""

from __future__ import annotations

from enum import IntEnum

ARCH_RISCV = 0x8 << 60
SIZE_U32, SIZE_U64 = 2, 3
"""log2 of the register's bytes, bits 55:52 of the id."""

CONFIG, CORE, CSR, TIMER, FP_F, FP_D, ISA_EXT, SBI_EXT, VECTOR, SBI_STATE = range(1, 11)
"""Register types, bits 31:24 of the id."""

CSR_GENERAL, CSR_AIA, CSR_SMSTATEEN, CSR_ZICFISS = 0, 1, 2, 3
EXT_SINGLE, EXT_MULTI_EN, EXT_MULTI_DIS = 0, 1, 2
SBI_STATE_STA, SBI_STATE_FWFT = 0, 1
MODE_U, MODE_S = 0, 1


def one_reg(kind: int, index: int, subtype: int = 0, size_log2: int = SIZE_U64) -> int:
    """The id of a register."""
    return ARCH_RISCV | size_log2 << 52 | kind << 24 | subtype << 16 | index


def one_reg_size(register: int) -> int:
    """Bytes of the register's value, as its id says."""
    return 1 << (register >> 52 & 0xF)


CONFIG_NAMES = (
    "isa", "zicbom_block_size", "mvendorid", "marchid", "mimpid", "zicboz_block_size", "satp_mode",
    "zicbop_block_size",
)  # fmt: skip
CORE_NAMES = (
    "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6",
    "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6", "mode",
)  # fmt: skip
CSR_NAMES = (
    "sstatus", "sie", "stvec", "sscratch", "sepc", "scause", "stval", "sip", "satp", "scounteren", "senvcfg",
)  # fmt: skip
CSR_AIA_NAMES = ("siselect", "iprio1", "iprio2", "sieh", "siph", "iprio1h", "iprio2h")
TIMER_NAMES = ("frequency", "time", "compare", "state")

CONFIG_ID = {name: one_reg(CONFIG, index) for index, name in enumerate(CONFIG_NAMES)}
CORE_ID = {name: one_reg(CORE, index) for index, name in enumerate(CORE_NAMES)}
CSR_ID = {name: one_reg(CSR, index) for index, name in enumerate(CSR_NAMES)}
CSR_AIA_ID = {name: one_reg(CSR, index, CSR_AIA) for index, name in enumerate(CSR_AIA_NAMES)}
TIMER_ID = {name: one_reg(TIMER, index) for index, name in enumerate(TIMER_NAMES)}
FP_D_ID = {**{f"f{i}": one_reg(FP_D, i) for i in range(32)}, "fcsr": one_reg(FP_D, 32, 0, SIZE_U32)}
"""Register name -> ONE_REG id. The integer registers are CORE_ID["a0"] and so on."""

PC, MODE, A0, A1 = CORE_ID["pc"], CORE_ID["mode"], CORE_ID["a0"], CORE_ID["a1"]


class IsaExt(IntEnum):
    """Index of an ISA extension in type ISA_EXT."""

    A = 0
    C = 1
    D = 2
    F = 3
    H = 4
    I = 5  # noqa: E741 - its name in the architecture
    M = 6
    SVPBMT = 7
    SSTC = 8
    SVINVAL = 9
    ZIHINTPAUSE = 10
    ZICBOM = 11
    ZICBOZ = 12
    ZBB = 13
    SSAIA = 14
    V = 15
    SVNAPOT = 16
    ZBA = 17
    ZBS = 18
    ZICNTR = 19
    ZICSR = 20
    ZIFENCEI = 21
    ZIHPM = 22
    SMSTATEEN = 23
    ZICOND = 24
    ZBC = 25
    ZBKB = 26
    ZBKC = 27
    ZBKX = 28
    ZKND = 29
    ZKNE = 30
    ZKNH = 31
    ZKR = 32
    ZKSED = 33
    ZKSH = 34
    ZKT = 35
    ZVBB = 36
    ZVBC = 37
    ZVKB = 38
    ZVKG = 39
    ZVKNED = 40
    ZVKNHA = 41
    ZVKNHB = 42
    ZVKSED = 43
    ZVKSH = 44
    ZVKT = 45
    ZFH = 46
    ZFHMIN = 47
    ZIHINTNTL = 48
    ZVFH = 49
    ZVFHMIN = 50
    ZFA = 51
    ZTSO = 52
    ZACAS = 53
    SSCOFPMF = 54
    ZIMOP = 55
    ZCA = 56
    ZCB = 57
    ZCD = 58
    ZCF = 59
    ZCMOP = 60
    ZAWRS = 61
    SMNPM = 62
    SSNPM = 63
    SVADE = 64
    SVADU = 65
    SVVPTC = 66
    ZABHA = 67
    ZICCRSE = 68
    ZAAMO = 69
    ZALRSC = 70
    ZICBOP = 71
    ZFBFMIN = 72
    ZVFBFMIN = 73
    ZVFBFWMA = 74
    ZCLSD = 75
    ZILSD = 76
    ZALASR = 77
    ZICFILP = 78
    ZICFISS = 79


class SbiExt(IntEnum):
    """Index of an SBI extension in type SBI_EXT (not its EID)."""

    V01 = 0
    TIME = 1
    IPI = 2
    RFENCE = 3
    SRST = 4
    HSM = 5
    PMU = 6
    EXPERIMENTAL = 7
    VENDOR = 8
    DBCN = 9
    STA = 10
    SUSP = 11
    FWFT = 12
    MPXY = 13


class AiaGroup(IntEnum):
    """kvm_device_attr.group of the AIA device."""

    CONFIG = 0
    ADDR = 1
    CTRL = 2
    APLIC = 3
    IMSIC = 4


class AiaConfig(IntEnum):
    """Attributes of AiaGroup.CONFIG, each a u32."""

    MODE = 0
    IDS = 1
    SRCS = 2
    GROUP_BITS = 3
    GROUP_SHIFT = 4
    HART_BITS = 5
    GUEST_BITS = 6


AIA_MODE_EMUL, AIA_MODE_HWACCEL, AIA_MODE_AUTO = 0, 1, 2
AIA_IDS_MIN, AIA_IDS_MAX = 63, 2048
AIA_SRCS_MAX = 1024
AIA_ADDR_APLIC = 0
"""Attribute of AiaGroup.ADDR; 1 + i is the IMSIC of vCPU index i. Each a u64."""
AIA_CTRL_INIT = 0
APLIC_SIZE = 0x4000
IMSIC_PAGE_SIZE = 0x1000


def aia_addr_imsic(index: int) -> int:
    """Attribute of AiaGroup.ADDR for the IMSIC of a vCPU index."""
    return 1 + index


def aia_imsic_attr(vcpu: int, iselect: int) -> int:
    """Attribute of AiaGroup.IMSIC for one register of a vCPU."""
    return vcpu << 12 | iselect


SBI_BASE, SBI_TIME, SBI_IPI, SBI_RFENCE = 0x10, 0x54494D45, 0x735049, 0x52464E43
SBI_HSM, SBI_SRST, SBI_DBCN = 0x48534D, 0x53525354, 0x4442434E
SBI_EXPERIMENTAL, SBI_VENDOR = (0x08000000, 0x08FFFFFF), (0x09000000, 0x09FFFFFF)
"""SBI extension ids (a7)."""
SBI_SUCCESS, SBI_FAILED, SBI_NOT_SUPPORTED, SBI_INVALID_PARAM, SBI_DENIED = 0, -1, -2, -3, -4
SBI_INVALID_ADDRESS, SBI_ALREADY_AVAILABLE, SBI_ALREADY_STARTED, SBI_ALREADY_STOPPED = -5, -6, -7, -8
"""SBI errors (a0)."""
