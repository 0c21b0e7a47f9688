"""RV64I, the base integer instructions (Unprivileged ISA, chapters 2 and 4) without SYSTEM and FENCE.I.

Results are written as 64-bit Values; "W" instructions compute in 32 bits and sign-extend. ecall, ebreak and
the other SYSTEM instructions live in privileged.py, fence.i in zifencei.py.
"""

from __future__ import annotations

from kvmcore.ir.value import Value
from kvmcore.isa.describe import insn
from kvmcore.isa.hart import Hart, Reg


@insn("lui", "imm[31:12] rd 0110111")
def lui(h: Hart, rd: Reg, imm: Value) -> None:
    """2.4.1: the immediate, sign-extended, with 12 zero bits below."""
    h.x[rd] = imm


@insn("auipc", "imm[31:12] rd 0010111")
def auipc(h: Hart, rd: Reg, imm: Value) -> None:
    h.x[rd] = h.pc + imm


@insn("jal", "imm[20|10:1|11|19:12] rd 1101111")
def jal(h: Hart, rd: Reg, imm: Value) -> None:
    """2.5.1. With C a target is never misaligned."""
    h.x[rd] = h.pc + h.length
    h.branch(imm)


@insn("jalr", "imm[11:0] rs1 000 rd 1100111")
def jalr(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    """2.5.1: the target is computed before rd is written, and its bit 0 is cleared."""
    target = (h.x[rs1] + imm) & ~1
    h.x[rd] = h.pc + h.length
    h.jump(target)


@insn("beq", "imm[12|10:5] rs2 rs1 000 imm[4:1|11] 1100011")
def beq(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1] == h.x[rs2]:
        h.branch(imm)


@insn("bne", "imm[12|10:5] rs2 rs1 001 imm[4:1|11] 1100011")
def bne(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1] != h.x[rs2]:
        h.branch(imm)


@insn("blt", "imm[12|10:5] rs2 rs1 100 imm[4:1|11] 1100011")
def blt(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1].slt(h.x[rs2]):
        h.branch(imm)


@insn("bge", "imm[12|10:5] rs2 rs1 101 imm[4:1|11] 1100011")
def bge(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1].sge(h.x[rs2]):
        h.branch(imm)


@insn("bltu", "imm[12|10:5] rs2 rs1 110 imm[4:1|11] 1100011")
def bltu(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1] < h.x[rs2]:
        h.branch(imm)


@insn("bgeu", "imm[12|10:5] rs2 rs1 111 imm[4:1|11] 1100011")
def bgeu(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    if h.x[rs1] >= h.x[rs2]:
        h.branch(imm)


# -- loads and stores (2.6, 4.3) -------------------------------------------------------------------


@insn("lb", "imm[11:0] rs1 000 rd 0000011")
def lb(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 1).sext(64)


@insn("lh", "imm[11:0] rs1 001 rd 0000011")
def lh(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 2).sext(64)


@insn("lw", "imm[11:0] rs1 010 rd 0000011")
def lw(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 4).sext(64)


@insn("ld", "imm[11:0] rs1 011 rd 0000011")
def ld(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 8)


@insn("lbu", "imm[11:0] rs1 100 rd 0000011")
def lbu(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 1).zext(64)


@insn("lhu", "imm[11:0] rs1 101 rd 0000011")
def lhu(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 2).zext(64)


@insn("lwu", "imm[11:0] rs1 110 rd 0000011")
def lwu(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.load(h.x[rs1] + imm, 4).zext(64)


@insn("sb", "imm[11:5] rs2 rs1 000 imm[4:0] 0100011")
def sb(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    h.store(h.x[rs1] + imm, h.x[rs2].trunc(8))


@insn("sh", "imm[11:5] rs2 rs1 001 imm[4:0] 0100011")
def sh(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    h.store(h.x[rs1] + imm, h.x[rs2].trunc(16))


@insn("sw", "imm[11:5] rs2 rs1 010 imm[4:0] 0100011")
def sw(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    h.store(h.x[rs1] + imm, h.x[rs2].trunc(32))


@insn("sd", "imm[11:5] rs2 rs1 011 imm[4:0] 0100011")
def sd(h: Hart, rs1: Reg, rs2: Reg, imm: Value) -> None:
    h.store(h.x[rs1] + imm, h.x[rs2])


# -- register and immediate (2.4.1, 4.2.1) ---------------------------------------------------------


@insn("addi", "imm[11:0] rs1 000 rd 0010011")
def addi(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.x[rs1] + imm


@insn("slti", "imm[11:0] rs1 010 rd 0010011")
def slti(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.x[rs1].slt(imm).zext(64)


@insn("sltiu", "imm[11:0] rs1 011 rd 0010011")
def sltiu(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    """The immediate is sign-extended, then compared as unsigned."""
    h.x[rd] = (h.x[rs1] < imm).zext(64)


@insn("xori", "imm[11:0] rs1 100 rd 0010011")
def xori(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.x[rs1] ^ imm


@insn("ori", "imm[11:0] rs1 110 rd 0010011")
def ori(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    """With rd = x0 also the prefetch hints of Zicbop: nothing happens."""
    h.x[rd] = h.x[rs1] | imm


@insn("andi", "imm[11:0] rs1 111 rd 0010011")
def andi(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = h.x[rs1] & imm


@insn("slli", "000000 shamt[5:0] rs1 001 rd 0010011")
def slli(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1] << shamt


@insn("srli", "000000 shamt[5:0] rs1 101 rd 0010011")
def srli(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1] >> shamt


@insn("srai", "010000 shamt[5:0] rs1 101 rd 0010011")
def srai(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1].sar(shamt)


@insn("addiw", "imm[11:0] rs1 000 rd 0011011")
def addiw(h: Hart, rd: Reg, rs1: Reg, imm: Value) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) + imm.trunc(32)).sext(64)


@insn("slliw", "0000000 shamt[4:0] rs1 001 rd 0011011")
def slliw(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) << shamt.trunc(32)).sext(64)


@insn("srliw", "0000000 shamt[4:0] rs1 101 rd 0011011")
def srliw(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) >> shamt.trunc(32)).sext(64)


@insn("sraiw", "0100000 shamt[4:0] rs1 101 rd 0011011")
def sraiw(h: Hart, rd: Reg, rs1: Reg, shamt: Value) -> None:
    h.x[rd] = h.x[rs1].trunc(32).sar(shamt.trunc(32)).sext(64)


# -- register and register (2.4.2, 4.2.2) ----------------------------------------------------------


@insn("add", "0000000 rs2 rs1 000 rd 0110011")
def add(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] + h.x[rs2]


@insn("sub", "0100000 rs2 rs1 000 rd 0110011")
def sub(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] - h.x[rs2]


@insn("sll", "0000000 rs2 rs1 001 rd 0110011")
def sll(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] << (h.x[rs2] & 63)


@insn("slt", "0000000 rs2 rs1 010 rd 0110011")
def slt(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1].slt(h.x[rs2]).zext(64)


@insn("sltu", "0000000 rs2 rs1 011 rd 0110011")
def sltu(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1] < h.x[rs2]).zext(64)


@insn("xor", "0000000 rs2 rs1 100 rd 0110011")
def xor(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] ^ h.x[rs2]


@insn("srl", "0000000 rs2 rs1 101 rd 0110011")
def srl(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] >> (h.x[rs2] & 63)


@insn("sra", "0100000 rs2 rs1 101 rd 0110011")
def sra(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1].sar(h.x[rs2] & 63)


@insn("or", "0000000 rs2 rs1 110 rd 0110011")
def or_(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] | h.x[rs2]


@insn("and", "0000000 rs2 rs1 111 rd 0110011")
def and_(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1] & h.x[rs2]


@insn("addw", "0000000 rs2 rs1 000 rd 0111011")
def addw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) + h.x[rs2].trunc(32)).sext(64)


@insn("subw", "0100000 rs2 rs1 000 rd 0111011")
def subw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) - h.x[rs2].trunc(32)).sext(64)


@insn("sllw", "0000000 rs2 rs1 001 rd 0111011")
def sllw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) << (h.x[rs2].trunc(32) & 31)).sext(64)


@insn("srlw", "0000000 rs2 rs1 101 rd 0111011")
def srlw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = (h.x[rs1].trunc(32) >> (h.x[rs2].trunc(32) & 31)).sext(64)


@insn("sraw", "0100000 rs2 rs1 101 rd 0111011")
def sraw(h: Hart, rd: Reg, rs1: Reg, rs2: Reg) -> None:
    h.x[rd] = h.x[rs1].trunc(32).sar(h.x[rs2].trunc(32) & 31).sext(64)


# -- memory ordering (2.7) -------------------------------------------------------------------------


@insn("fence", "fm pred succ rs1 000 rd 0001111", unless=("fm=0,pred=1,succ=0,rs1=0,rd=0",))
def fence(h: Hart, pred: Value, succ: Value) -> None:
    """Reserved fm, rs1 and rd are ignored, so fence.tso is a full fence of its sets."""
    h.fence(pred, succ)


@insn("pause", "0000 0001 0000 00000 000 00000 0001111")
def pause(h: Hart) -> None:
    """Zihintpause: the fence with pred = W and succ = 0. A hint: this hart waits for something in a loop."""
    h.pause()
