"""RISC-V instruction encodings, written down a second time for the tests.

Used by asm.py (to assemble) and random_programs.py (to choose operands). It must never import anything of
kvmcore: an encoding that is wrong in kvmcore/isa has to show as a difference, so the tables share nothing.
Sources: RISC-V unprivileged ISA 20240411 (instruction listings), privileged ISA 1.13, CMO 1.0.
"""

from __future__ import annotations

from typing import NamedTuple


class Encoding(NamedTuple):
    """One instruction: `form` names the operand layout (see FORMS), `match` holds its fixed bits."""

    name: str
    form: str
    match: int
    extension: str

    @property
    def length(self) -> int:
        """Bytes: 2 or 4."""
        return 2 if self.extension == "C" else 4


# Operands of each form, in assembly order. r = x register, f = f register; 3 bit ones carry a "'" (x8..x15).
FORMS: dict[str, str] = {
    "R": "rd rs1 rs2",
    "R1": "rd rs1",
    "I": "rd rs1 imm12",
    "SH6": "rd rs1 shamt6",
    "SH5": "rd rs1 shamt5",
    "LOAD": "rd mem",
    "STORE": "rs2 mem",
    "FLOAD": "frd mem",
    "FSTORE": "frs2 mem",
    "B": "rs1 rs2 branch",
    "U": "rd imm20",
    "J": "rd jump",
    "JALR": "rd mem",
    "FENCE": "pred succ",
    "NONE": "",
    "CSR": "rd csr rs1",
    "CSRI": "rd csr zimm",
    "LR": "rd atomic",
    "AMO": "rd rs2 atomic",
    "SFENCE": "rs1 rs2",
    "CBO": "atomic",
    "FR": "frd frs1 frs2",
    "FRM": "frd frs1 frs2 rm",
    "FR1M": "frd frs1 rm",
    "FR4": "frd frs1 frs2 frs3 rm",
    "FCMP": "rd frs1 frs2",
    "FTOX": "rd frs1",
    "FTOXM": "rd frs1 rm",
    "XTOF": "frd rs1",
    "XTOFM": "frd rs1 rm",
    "CNONE": "",
    "CIW": "rd' sp uimm10x4",
    "CL4": "rd' cmem4",
    "CL8": "rd' cmem8",
    "CFL8": "frd' cmem8",
    "CS4": "rs2' cmem4",
    "CS8": "rs2' cmem8",
    "CFS8": "frs2' cmem8",
    "CI": "rdn imm6",
    "CI0": "rd imm6",
    "CNOP": "imm6",
    "CI16": "sp imm10x16",
    "CLUI": "rdlui immlui",
    "CSH": "rdn shamt6n",
    "CSHB": "rd' shamt6n",
    "CANDI": "rd' imm6",
    "CA": "rd' rs2'",
    "CJ": "cjump",
    "CB": "rs1' cbranch",
    "CLSP4": "rdn spmem4",
    "CLSP8": "rdn spmem8",
    "CFLSP8": "frd spmem8",
    "CSSP4": "crs2 ssmem4",
    "CSSP8": "crs2 ssmem8",
    "CFSSP8": "cfrs2 ssmem8",
    "CJR": "rdn",
    "CR": "rdn rs2n",
}

ENCODINGS: dict[str, Encoding] = {}


def _add(extension: str, form: str, **rows: int) -> None:
    for name, match in rows.items():
        name = name.rstrip("_").replace("_", ".")
        ENCODINGS[name] = Encoding(name, form, match, extension)


def _f3(opcode: int, funct3: int, funct7: int = 0) -> int:
    return opcode | funct3 << 12 | funct7 << 25


_add("I", "U", lui=0x37, auipc=0x17)
_add("I", "J", jal=0x6F)
_add("I", "JALR", jalr=0x67)
for _name, _number in {"beq": 0, "bne": 1, "blt": 4, "bge": 5, "bltu": 6, "bgeu": 7}.items():
    _add("I", "B", **{_name: _f3(0x63, _number)})
for _name, _number in {"lb": 0, "lh": 1, "lw": 2, "ld": 3, "lbu": 4, "lhu": 5, "lwu": 6}.items():
    _add("I", "LOAD", **{_name: _f3(0x03, _number)})
for _name, _number in {"sb": 0, "sh": 1, "sw": 2, "sd": 3}.items():
    _add("I", "STORE", **{_name: _f3(0x23, _number)})
for _name, _number in {"addi": 0, "slti": 2, "sltiu": 3, "xori": 4, "ori": 6, "andi": 7}.items():
    _add("I", "I", **{_name: _f3(0x13, _number)})
_add("I", "I", addiw=0x1B)
_add("I", "SH6", slli=_f3(0x13, 1), srli=_f3(0x13, 5), srai=_f3(0x13, 5, 0x20))
_add("I", "SH5", slliw=_f3(0x1B, 1), srliw=_f3(0x1B, 5), sraiw=_f3(0x1B, 5, 0x20))
_add("I", "R", add=_f3(0x33, 0), sub=_f3(0x33, 0, 0x20), sll=_f3(0x33, 1), slt=_f3(0x33, 2), sltu=_f3(0x33, 3))
_add("I", "R", xor=_f3(0x33, 4), srl=_f3(0x33, 5), sra=_f3(0x33, 5, 0x20), or_=_f3(0x33, 6), and_=_f3(0x33, 7))
_add("I", "R", addw=_f3(0x3B, 0), subw=_f3(0x3B, 0, 0x20), sllw=_f3(0x3B, 1), srlw=_f3(0x3B, 5))
_add("I", "R", sraw=_f3(0x3B, 5, 0x20))
_add("I", "FENCE", fence=0x0F)
_add("I", "NONE", ecall=0x73, ebreak=0x00100073)
_add("Zifencei", "NONE", fence_i=0x100F)
_add("Zihintpause", "NONE", pause=0x0100000F)
_add("privileged", "NONE", sret=0x10200073, wfi=0x10500073, mret=0x30200073)
_add("privileged", "SFENCE", sfence_vma=0x12000073)
_add("Zicsr", "CSR", csrrw=_f3(0x73, 1), csrrs=_f3(0x73, 2), csrrc=_f3(0x73, 3))
_add("Zicsr", "CSRI", csrrwi=_f3(0x73, 5), csrrsi=_f3(0x73, 6), csrrci=_f3(0x73, 7))
_add("M", "R", mul=_f3(0x33, 0, 1), mulh=_f3(0x33, 1, 1), mulhsu=_f3(0x33, 2, 1), mulhu=_f3(0x33, 3, 1))
_add("M", "R", div=_f3(0x33, 4, 1), divu=_f3(0x33, 5, 1), rem=_f3(0x33, 6, 1), remu=_f3(0x33, 7, 1))
_add("M", "R", mulw=_f3(0x3B, 0, 1), divw=_f3(0x3B, 4, 1), divuw=_f3(0x3B, 5, 1), remw=_f3(0x3B, 6, 1))
_add("M", "R", remuw=_f3(0x3B, 7, 1))
_AMOS = {
    "amoswap": 0x01, "amoadd": 0x00, "amoxor": 0x04, "amoand": 0x0C, "amoor": 0x08,
    "amomin": 0x10, "amomax": 0x14, "amominu": 0x18, "amomaxu": 0x1C,
}  # fmt: skip
for _suffix, _width in {".w": 2, ".d": 3}.items():
    for _name, _number in _AMOS.items():
        _add("A", "AMO", **{_name + _suffix: _f3(0x2F, _width, _number << 2)})
    _add("A", "LR", **{"lr" + _suffix: _f3(0x2F, _width, 0x02 << 2)})
    _add("A", "AMO", **{"sc" + _suffix: _f3(0x2F, _width, 0x03 << 2)})
_add("Zba", "R", add_uw=_f3(0x3B, 0, 4), sh1add=_f3(0x33, 2, 0x10), sh2add=_f3(0x33, 4, 0x10))
_add("Zba", "R", sh3add=_f3(0x33, 6, 0x10), sh1add_uw=_f3(0x3B, 2, 0x10), sh2add_uw=_f3(0x3B, 4, 0x10))
_add("Zba", "R", sh3add_uw=_f3(0x3B, 6, 0x10))
_add("Zba", "SH6", slli_uw=_f3(0x1B, 1, 4))
_add("Zbb", "R", andn=_f3(0x33, 7, 0x20), orn=_f3(0x33, 6, 0x20), xnor=_f3(0x33, 4, 0x20))
_add("Zbb", "R", max=_f3(0x33, 6, 5), maxu=_f3(0x33, 7, 5), min=_f3(0x33, 4, 5), minu=_f3(0x33, 5, 5))
_add(
    "Zbb",
    "R",
    rol=_f3(0x33, 1, 0x30),
    ror=_f3(0x33, 5, 0x30),
    rolw=_f3(0x3B, 1, 0x30),
    rorw=_f3(0x3B, 5, 0x30),
)
_add("Zbb", "SH6", rori=_f3(0x13, 5, 0x30))
_add("Zbb", "SH5", roriw=_f3(0x1B, 5, 0x30))
_add("Zbb", "R1", clz=0x60001013, ctz=0x60101013, cpop=0x60201013, sext_b=0x60401013, sext_h=0x60501013)
_add("Zbb", "R1", clzw=0x6000101B, ctzw=0x6010101B, cpopw=0x6020101B, zext_h=0x0800403B)
_add("Zbb", "R1", orc_b=0x28705013, rev8=0x6B805013)
_add(
    "Zbs",
    "R",
    bclr=_f3(0x33, 1, 0x24),
    bext=_f3(0x33, 5, 0x24),
    binv=_f3(0x33, 1, 0x34),
    bset=_f3(0x33, 1, 0x14),
)
_add("Zbs", "SH6", bclri=_f3(0x13, 1, 0x24), bexti=_f3(0x13, 5, 0x24), binvi=_f3(0x13, 1, 0x34))
_add("Zbs", "SH6", bseti=_f3(0x13, 1, 0x14))
_add("Zicbom", "CBO", cbo_inval=0x200F, cbo_clean=0x0010200F, cbo_flush=0x0020200F)
_add("Zicboz", "CBO", cbo_zero=0x0040200F)

for _ext, _suffix, _fmt, _width in (("F", ".s", 0, 2), ("D", ".d", 1, 3)):
    _add(_ext, "FLOAD", **{"fl" + "wd"[_fmt]: _f3(0x07, _width)})
    _add(_ext, "FSTORE", **{"fs" + "wd"[_fmt]: _f3(0x27, _width)})
    for _name, _opcode in {"fmadd": 0x43, "fmsub": 0x47, "fnmsub": 0x4B, "fnmadd": 0x4F}.items():
        _add(_ext, "FR4", **{_name + _suffix: _opcode | _fmt << 25})
    for _name, _number in {"fadd": 0x00, "fsub": 0x04, "fmul": 0x08, "fdiv": 0x0C}.items():
        _add(_ext, "FRM", **{_name + _suffix: _f3(0x53, 0, _number | _fmt)})
    _add(_ext, "FR1M", **{"fsqrt" + _suffix: _f3(0x53, 0, 0x2C | _fmt)})
    for _number, _name in enumerate(("fsgnj", "fsgnjn", "fsgnjx")):
        _add(_ext, "FR", **{_name + _suffix: _f3(0x53, _number, 0x10 | _fmt)})
    for _number, _name in enumerate(("fmin", "fmax")):
        _add(_ext, "FR", **{_name + _suffix: _f3(0x53, _number, 0x14 | _fmt)})
    for _number, _name in enumerate(("fle", "flt", "feq")):
        _add(_ext, "FCMP", **{_name + _suffix: _f3(0x53, _number, 0x50 | _fmt)})
    _add(_ext, "FTOX", **{"fclass" + _suffix: _f3(0x53, 1, 0x70 | _fmt)})
    _add(_ext, "FTOX", **{"fmv.x" + (".w", ".d")[_fmt]: _f3(0x53, 0, 0x70 | _fmt)})
    _add(_ext, "XTOF", **{"fmv" + (".w", ".d")[_fmt] + ".x": _f3(0x53, 0, 0x78 | _fmt)})
    for _number, _name in enumerate((".w", ".wu", ".l", ".lu")):
        _add(_ext, "FTOXM", **{"fcvt" + _name + _suffix: _f3(0x53, 0, 0x60 | _fmt) | _number << 20})
        _add(_ext, "XTOFM", **{"fcvt" + _suffix + _name: _f3(0x53, 0, 0x68 | _fmt) | _number << 20})
_add("D", "FR1M", fcvt_s_d=_f3(0x53, 0, 0x20) | 1 << 20, fcvt_d_s=_f3(0x53, 0, 0x21))

_add("C", "CIW", c_addi4spn=0x0000)
_add("C", "CFL8", c_fld=0x2000)
_add("C", "CL4", c_lw=0x4000)
_add("C", "CL8", c_ld=0x6000)
_add("C", "CFS8", c_fsd=0xA000)
_add("C", "CS4", c_sw=0xC000)
_add("C", "CS8", c_sd=0xE000)
_add("C", "CNOP", c_nop=0x0001)
_add("C", "CI", c_addi=0x0001, c_addiw=0x2001)
_add("C", "CI0", c_li=0x4001)
_add("C", "CI16", c_addi16sp=0x6101)
_add("C", "CLUI", c_lui=0x6001)
_add("C", "CSHB", c_srli=0x8001, c_srai=0x8401)
_add("C", "CANDI", c_andi=0x8801)
_add("C", "CA", c_sub=0x8C01, c_xor=0x8C21, c_or=0x8C41, c_and=0x8C61, c_subw=0x9C01, c_addw=0x9C21)
_add("C", "CJ", c_j=0xA001)
_add("C", "CB", c_beqz=0xC001, c_bnez=0xE001)
_add("C", "CSH", c_slli=0x0002)
_add("C", "CFLSP8", c_fldsp=0x2002)
_add("C", "CLSP4", c_lwsp=0x4002)
_add("C", "CLSP8", c_ldsp=0x6002)
_add("C", "CJR", c_jr=0x8002, c_jalr=0x9002)
_add("C", "CR", c_mv=0x8002, c_add=0x9002)
_add("C", "CNONE", c_ebreak=0x9002)
_add("C", "CFSSP8", c_fsdsp=0xA002)
_add("C", "CSSP4", c_swsp=0xC002)
_add("C", "CSSP8", c_sdsp=0xE002)

ROUNDING = {"rne": 0, "rtz": 1, "rdn": 2, "rup": 3, "rmm": 4, "dyn": 7}


def _numbered(names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names.split())}


X_REGISTERS: dict[str, int] = {f"x{i}": i for i in range(32)} | {"fp": 8}
X_REGISTERS |= _numbered("zero ra sp gp tp t0 t1 t2 s0 s1 a0 a1 a2 a3 a4 a5 a6 a7 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11 t3 t4 t5 t6")
F_REGISTERS: dict[str, int] = {f"f{i}": i for i in range(32)}
F_REGISTERS |= _numbered(
    "ft0 ft1 ft2 ft3 ft4 ft5 ft6 ft7 fs0 fs1 fa0 fa1 fa2 fa3 fa4 fa5 fa6 fa7 "
    "fs2 fs3 fs4 fs5 fs6 fs7 fs8 fs9 fs10 fs11 ft8 ft9 ft10 ft11"
)

CSRS: dict[str, int] = {
    "fflags": 0x001, "frm": 0x002, "fcsr": 0x003, "cycle": 0xC00, "time": 0xC01, "instret": 0xC02,
    "seed": 0x015, "sstatus": 0x100, "sie": 0x104, "stvec": 0x105, "scounteren": 0x106, "senvcfg":
    0x10A, "sscratch": 0x140, "sepc": 0x141, "scause": 0x142, "stval": 0x143, "sip": 0x144,
    "stimecmp": 0x14D, "siselect": 0x150, "sireg": 0x151, "stopei": 0x15C, "satp": 0x180, "stopi":
    0xDB0, "mstatus": 0x300, "misa": 0x301, "medeleg": 0x302, "mideleg": 0x303, "mie": 0x304,
    "mtvec": 0x305, "mcounteren": 0x306, "menvcfg": 0x30A, "mcountinhibit": 0x320, "mscratch":
    0x340, "mepc": 0x341, "mcause": 0x342, "mtval": 0x343, "mip": 0x344, "pmpcfg0": 0x3A0,
    "pmpaddr0": 0x3B0, "mhartid": 0xF14,
}  # fmt: skip
CSRS |= {f"hpmcounter{i}": 0xC00 + i for i in range(3, 32)}
