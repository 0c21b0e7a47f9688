"""C: the 16-bit encodings of RV64GC (Unprivileged ISA, chapter 27), other spellings of 32-bit instructions.

Reserved code points and those of other instructions are excluded by `unless`; HINTs run as what they spell.
"""

from __future__ import annotations

from kvmcore.isa import privileged, rv64d, rv64i
from kvmcore.isa.describe import alias

_CI = "imm[5] rd imm[4:0]"
_CB = "imm[8|4:3] rs1' imm[7:6|2:1|5]"
_LW = "uimm[5:3] rs1' uimm[2|6] rd' 00"
_LD = "uimm[5:3] rs1' uimm[7:6] rd' 00"
_SW = "uimm[5:3] rs1' uimm[2|6] rs2' 00"
_SD = "uimm[5:3] rs1' uimm[7:6] rs2' 00"

ALIASES = [
    # quadrant 0
    alias("c.addi4spn", "000 uimm[5:4|9:6|2|3] rd' 00", rv64i.addi, ("uimm=0",), rs1=2),
    alias("c.fld", f"001 {_LD}", rv64d.fld, frd="rd'"),
    alias("c.lw", f"010 {_LW}", rv64i.lw),
    alias("c.ld", f"011 {_LD}", rv64i.ld),
    alias("c.fsd", f"101 {_SD}", rv64d.fsd, frs2="rs2'"),
    alias("c.sw", f"110 {_SW}", rv64i.sw),
    alias("c.sd", f"111 {_SD}", rv64i.sd),
    # quadrant 1
    alias("c.addi", f"000 {_CI} 01", rv64i.addi, rs1="rd"),  # rd=0: c.nop and HINTs
    alias("c.addiw", f"001 {_CI} 01", rv64i.addiw, ("rd=0",), rs1="rd"),
    alias("c.li", f"010 {_CI} 01", rv64i.addi, rs1=0),
    alias("c.addi16sp", "011 imm[9] 00010 imm[4|6|8:7|5] 01", rv64i.addi, ("imm=0",), rd=2, rs1=2),
    alias("c.lui", "011 imm[17] rd imm[16:12] 01", rv64i.lui, ("imm=0", "rd=2")),
    alias("c.srli", "100 shamt[5] 00 rd' shamt[4:0] 01", rv64i.srli, rs1="rd'"),
    alias("c.srai", "100 shamt[5] 01 rd' shamt[4:0] 01", rv64i.srai, rs1="rd'"),
    alias("c.andi", "100 imm[5] 10 rd' imm[4:0] 01", rv64i.andi, rs1="rd'"),
    alias("c.sub", "100011 rd' 00 rs2' 01", rv64i.sub, rs1="rd'"),
    alias("c.xor", "100011 rd' 01 rs2' 01", rv64i.xor, rs1="rd'"),
    alias("c.or", "100011 rd' 10 rs2' 01", rv64i.or_, rs1="rd'"),
    alias("c.and", "100011 rd' 11 rs2' 01", rv64i.and_, rs1="rd'"),
    alias("c.subw", "100111 rd' 00 rs2' 01", rv64i.subw, rs1="rd'"),
    alias("c.addw", "100111 rd' 01 rs2' 01", rv64i.addw, rs1="rd'"),
    alias("c.j", "101 imm[11|4|9:8|10|6|7|3:1|5] 01", rv64i.jal, rd=0),
    alias("c.beqz", f"110 {_CB} 01", rv64i.beq, rs2=0),
    alias("c.bnez", f"111 {_CB} 01", rv64i.bne, rs2=0),
    # quadrant 2
    alias("c.slli", "000 shamt[5] rd shamt[4:0] 10", rv64i.slli, rs1="rd"),
    alias("c.fldsp", "001 uimm[5] rd uimm[4:3|8:6] 10", rv64d.fld, frd="rd", rs1=2),
    alias("c.lwsp", "010 uimm[5] rd uimm[4:2|7:6] 10", rv64i.lw, ("rd=0",), rs1=2),
    alias("c.ldsp", "011 uimm[5] rd uimm[4:3|8:6] 10", rv64i.ld, ("rd=0",), rs1=2),
    alias("c.jr", "1000 rs1 00000 10", rv64i.jalr, ("rs1=0",), rd=0, imm=0),
    alias("c.mv", "1000 rd rs2 10", rv64i.add, ("rs2=0",), rs1=0),
    alias("c.ebreak", "1001 00000 00000 10", privileged.ebreak),
    alias("c.jalr", "1001 rs1 00000 10", rv64i.jalr, ("rs1=0",), rd=1, imm=0),
    alias("c.add", "1001 rd rs2 10", rv64i.add, ("rs2=0",), rs1="rd"),
    alias("c.fsdsp", "101 uimm[5:3|8:6] rs2 10", rv64d.fsd, frs2="rs2", rs1=2),
    alias("c.swsp", "110 uimm[5:2|7:6] rs2 10", rv64i.sw, rs1=2),
    alias("c.sdsp", "111 uimm[5:3|8:6] rs2 10", rv64i.sd, rs1=2),
]
