"""What holds for every instruction: one meaning for each encoding, the name that capstone and the tests' own table
give it, operands that fit a record, and a bounded trace.
"""

from __future__ import annotations

import pkgutil
import random

import capstone
import pytest

import kvmcore.isa
from kvmcore.engine.interpreter import Handler, handlers, read_operand
from kvmcore.engine.native_hart import HandlerHart
from kvmcore.ir.trace import Block, Tracer
from kvmcore.isa import table
from kvmcore.isa.describe import DescriptionError, Insn, insn
from kvmcore.isa.table import INSTRUCTIONS, find
from kvmcore.isa.traps import Trap
from tests.framework.encodings import ENCODINGS

#: Extensions that capstone 5 does not know.
UNKNOWN_TO_CAPSTONE = {"zba", "zbb", "zbs", "zicbom", "zicboz"}
#: Capstone's names for particular operands -> the instruction.
PSEUDO = {
    "j": "jal", "beqz": "beq", "bnez": "bne", "bltz": "blt", "blez": "bge", "bgez": "bge", "bgtz": "blt",
    "neg": "sub", "negw": "subw", "sgtz": "slt", "sltz": "slt", "snez": "sltu", "seqz": "sltiu",
    "mv": "addi", "li": "addi", "nop": "addi", "sext.w": "addiw", "not": "xori", "jr": "jalr", "ret": "jalr",
    "fmv.s": "fsgnj.s", "fneg.s": "fsgnjn.s", "fabs.s": "fsgnjx.s",
    "fmv.d": "fsgnj.d", "fneg.d": "fsgnjn.d", "fabs.d": "fsgnjx.d",
    "csrr": "csrrs", "csrs": "csrrs", "csrc": "csrrc", "csrw": "csrrw",
    "csrsi": "csrrsi", "csrci": "csrrci", "csrwi": "csrrwi", "c.nop": "c.addi",
}  # fmt: skip
COUNTERS = ("rdcycle", "rdtime", "rdinstret", "frflags", "frrm", "frcsr", "fsflags", "fsrm", "fscsr")
#: Paths through one instruction: more make native code that nobody wants.
MAX_PATHS = 150


@pytest.fixture(scope="module")
def disassembler() -> capstone.Cs:
    return capstone.Cs(capstone.CS_ARCH_RISCV, capstone.CS_MODE_RISCV64 | capstone.CS_MODE_RISCVC)


def name_by_capstone(disassembler: capstone.Cs, raw: int, length: int) -> str | None:
    for _, _, mnemonic, _ in disassembler.disasm_lite(raw.to_bytes(length, "little"), 0x1000):
        plain = mnemonic.removesuffix(".aqrl").removesuffix(".aq").removesuffix(".rl")
        return PSEUDO.get(plain, plain)
    return None


def words(row: Insn, count: int) -> list[int]:
    """Random encodings of an instruction."""
    rng = random.Random(row.name)
    tried = [rng.getrandbits(8 * row.length) & ~row.mask | row.match for _ in range(count)]
    return [raw for raw in tried if row.matches(raw)]


@pytest.mark.parametrize(
    "row", [row for row in INSTRUCTIONS if row.extension not in UNKNOWN_TO_CAPSTONE], ids=lambda row: row.name
)
def test_capstone_gives_it_the_same_name(row: Insn, disassembler: capstone.Cs) -> None:
    used = row.mask
    for operand in row.operands:
        for part in operand.parts:
            used |= ((1 << part.width) - 1) << part.source
    # Words with something in ignored fields, reserved rounding modes and HINTs have no name there.
    tried = words(row, 300) + [raw & used for raw in words(row, 300)]
    names = {name_by_capstone(disassembler, raw, row.length) for raw in tried}
    names -= {None, *COUNTERS}
    assert names == ({"fence"} if row.name == "pause" else {row.name})


def test_every_short_word(disassembler: capstone.Cs) -> None:
    """All 49152 16-bit words: the same instruction as in capstone, or none, but for HINTs."""
    hints = {"c.slli", "c.addi", "c.li", "c.lui", "c.mv", "c.add"}
    for raw in range(0x10000):
        if raw & 3 == 3:
            continue
        row, other = find(raw), name_by_capstone(disassembler, raw, 2)
        name = row.name if row is not None else None
        if name == other or (other is None and name in hints):
            continue
        reserved = raw == 0 or (other == "c.lui" and raw & 0x107C == 0)  # c.unimp; c.lui with immediate 0
        assert reserved, f"{raw:#06x} is {name} here and {other} in capstone"
        assert name is None


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: row.name)
def test_the_tests_own_table_agrees(row: Insn) -> None:
    assert row.name in ENCODINGS
    match = ENCODINGS[row.name].match
    assert match & row.mask == row.match
    assert find(match) is not None or row.excluded


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: row.name)
def test_words_find_their_instruction(row: Insn) -> None:
    found = words(row, 200)
    assert found
    assert all(find(raw) is row for raw in found)


def test_random_words_are_at_most_one_instruction() -> None:
    rng = random.Random(5)
    for _ in range(3000):
        raw = rng.getrandbits(32)
        raw &= 0xFFFFFFFF if raw & 3 == 3 else 0xFFFF
        length = 4 if raw & 3 == 3 else 2
        matching = [row for row in INSTRUCTIONS if row.length == length and row.matches(raw)]
        assert len(matching) <= 1
        assert find(raw) is (matching[0] if matching else None)


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: row.name)
def test_operands(row: Insn) -> None:
    """Every operand is a whole number of its scale, within its bits; destinations are never x0."""
    for raw in words(row, 100):
        for operand in row.operands:
            number = operand.decode(raw)
            if operand.fixed is not None or operand.base:
                continue
            assert number % operand.scale == 0
            low = -(1 << (operand.bits - 1)) if operand.signed else 0
            if operand.kind != "xd":
                assert low <= number // operand.scale < low + (1 << operand.bits)
            else:
                assert number != 0


def test_every_file_is_in_the_table() -> None:
    """No extension is forgotten in table.EXTENSIONS."""
    support = {
        *("describe", "hart", "table", "traps", "paging", "csrs", "imsic", "softfloat"),
    }
    files = {module.name for module in pkgutil.iter_modules(kvmcore.isa.__path__)}
    assert files - support == {module.__name__.rpartition(".")[2] for module in table.EXTENSIONS}


def _paths(block: Block) -> int:
    """Number of leaves of a decision tree."""
    if block.if_true is None or block.if_false is None:
        return 1
    return _paths(block.if_true) + _paths(block.if_false)


@pytest.mark.parametrize("handler", handlers().values(), ids=lambda handler: handler.name)
def test_traces_within_bounds(handler: Handler) -> None:
    def body() -> None:
        hart = HandlerHart(handler.name, handler.length)
        row = handler.rows[0]
        operands = [
            handler.constants[o.name] if o.name in handler.constants else read_operand(hart, handler.places[o.name])
            for o in row.operands
        ]
        try:
            row.function(hart, *operands)
            hart.finish()
        except Trap as trap:
            hart.trap(trap)

    assert _paths(Tracer(MAX_PATHS).trace(body)) <= MAX_PATHS


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("imm[11:0] rs1 000 rd 001001", "31 bits"),
        ("imm[11:0] rs1 000 rd 0010010", "low bits"),
        ("imm[11:0] rs1 000 00000 0010011", "no field for 'rd'"),
        ("imm[11:0] rs1 0x0 rd 0010011", "cannot read"),
        ("imm rs1 000 rd 0010011", "needs a bit list"),
    ],
)
def test_wrong_descriptions_are_refused(encoding: str, message: str) -> None:
    def function(h: object, rd: object, rs1: object, imm: object) -> None:
        pass

    with pytest.raises(DescriptionError, match=message):
        insn("wrong", encoding)(function)
