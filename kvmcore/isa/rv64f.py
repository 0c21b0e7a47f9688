"""F: single-precision floating point (Unprivileged ISA, chapter 20).

Operations are named "f32.add" and so on and defined in softfloat.py; here are operands, NaN boxing, results
and the checks of sstatus.FS and rounding modes. rv64d.py builds the same rows for doubles from `arithmetic`.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmcore.ir.value import Value, const, select
from kvmcore.isa.describe import Insn, Semantics, insn, make
from kvmcore.isa.hart import Hart, Reg
from kvmcore.isa.traps import illegal_instruction

DYNAMIC = 7


@dataclass(frozen=True, slots=True)
class Format:
    """A floating-point format: its letter, width, code in bits 26..25, exponent and fraction bits."""

    letter: str
    width: int
    code: str
    exponent: int
    fraction: int

    @property
    def nan(self) -> int:
        """The canonical NaN."""
        return ((1 << (self.exponent + 1)) - 1) << (self.fraction - 1)

    @property
    def prefix(self) -> str:
        return f"f{self.width}."


SINGLE = Format("s", 32, "00", 8, 23)
DOUBLE = Format("d", 64, "01", 11, 52)
_BOX = 0xFFFFFFFF << 32


def require_fp(h: Hart) -> None:
    """20.2: with sstatus.FS Off there are no floating-point instructions."""
    if h.get("fs") == 0:
        raise illegal_instruction()


def require_rounding(h: Hart, rm: Value) -> None:
    """20.2: rm 5 and 6 are reserved, 7 means frm, which may not hold 5 to 7 then."""
    if rm == DYNAMIC:
        if h.get("frm") > 4:
            raise illegal_instruction()
    elif rm > 4:
        raise illegal_instruction()


def read(h: Hart, fmt: Format, number: Reg) -> Value:
    """An operand; a single that is not NaN-boxed is the canonical NaN (21.2)."""
    value = h.f[number]
    if fmt.width == 64:
        return value
    return select((value >> 32) == 0xFFFFFFFF, value.trunc(32), const(32, fmt.nan))


def write(h: Hart, fmt: Format, number: Reg, value: Value) -> None:
    """A result; singles are boxed. The state becomes dirty."""
    h.f[number] = value if fmt.width == 64 else value.zext(64) | _BOX
    h.set("fs", 3)


def dirty(h: Hart) -> None:
    """fcsr may have changed, though no f register did."""
    h.set("fs", 3)


# -- rows that exist for both formats --------------------------------------------------------------


def _named(function: Semantics, name: str) -> Semantics:
    function.__name__ = function.__qualname__ = name.replace(".", "_")
    return function


def _binary(fmt: Format, operation: str) -> Semantics:
    def fp(h: Hart, frd: Reg, frs1: Reg, frs2: Reg, rm: Value) -> None:
        require_fp(h)
        require_rounding(h, rm)
        write(h, fmt, frd, h.fp(fmt.prefix + operation, (read(h, fmt, frs1), read(h, fmt, frs2)), rm))

    return fp


def _sqrt(fmt: Format) -> Semantics:
    def fp(h: Hart, frd: Reg, frs1: Reg, rm: Value) -> None:
        require_fp(h)
        require_rounding(h, rm)
        write(h, fmt, frd, h.fp(fmt.prefix + "sqrt", (read(h, fmt, frs1),), rm))

    return fp


def _fused(fmt: Format, negate_product: bool, negate_addend: bool) -> Semantics:
    sign = 1 << (fmt.width - 1)

    def fp(h: Hart, frd: Reg, frs1: Reg, frs2: Reg, frs3: Reg, rm: Value) -> None:
        require_fp(h)
        require_rounding(h, rm)
        a, b, c = read(h, fmt, frs1), read(h, fmt, frs2), read(h, fmt, frs3)
        a = a ^ sign if negate_product else a
        c = c ^ sign if negate_addend else c
        write(h, fmt, frd, h.fp(fmt.prefix + "fma", (a, b, c), rm))

    return fp


def _sign(fmt: Format, kind: str) -> Semantics:
    sign = 1 << (fmt.width - 1)

    def fp(h: Hart, frd: Reg, frs1: Reg, frs2: Reg) -> None:
        require_fp(h)
        a, b = read(h, fmt, frs1), read(h, fmt, frs2)
        b = {"fsgnj": b, "fsgnjn": ~b, "fsgnjx": a ^ b}[kind]
        write(h, fmt, frd, (a & ~sign) | (b & sign))

    return fp


def _least(fmt: Format, operation: str) -> Semantics:
    def fp(h: Hart, frd: Reg, frs1: Reg, frs2: Reg) -> None:
        require_fp(h)
        write(h, fmt, frd, h.fp(fmt.prefix + operation, (read(h, fmt, frs1), read(h, fmt, frs2))))

    return fp


def _compare(fmt: Format, operation: str) -> Semantics:
    def fp(h: Hart, rd: Reg, frs1: Reg, frs2: Reg) -> None:
        require_fp(h)
        h.x[rd] = h.fp(fmt.prefix + operation, (read(h, fmt, frs1), read(h, fmt, frs2))).zext(64)
        dirty(h)

    return fp


def _classify(fmt: Format) -> Semantics:
    def fp(h: Hart, rd: Reg, frs1: Reg) -> None:
        """20.9, table 24: one bit of ten."""
        require_fp(h)
        a = read(h, fmt, frs1)
        negative = a.bit(fmt.width - 1)
        exponent = a.bits(fmt.width - 2, fmt.fraction)
        fraction = a & ((1 << fmt.fraction) - 1)
        ones = (1 << fmt.exponent) - 1
        quiet = a.bit(fmt.fraction - 1)
        finite = select(
            exponent == 0,
            select(fraction == 0, select(negative, const(64, 3), 4), select(negative, const(64, 2), 5)),
            select(negative, const(64, 1), 6),
        )
        special = select(fraction == 0, select(negative, const(64, 0), 7), select(quiet, const(64, 9), 8))
        h.x[rd] = const(64, 1) << select(exponent == ones, special, finite)

    return fp


def _to_integer(fmt: Format, width: int, signed: bool) -> Semantics:
    name = f"{fmt.prefix}to_{'i' if signed else 'u'}{width}"

    def fp(h: Hart, rd: Reg, frs1: Reg, rm: Value) -> None:
        require_fp(h)
        require_rounding(h, rm)
        h.x[rd] = h.fp(name, (read(h, fmt, frs1),), rm).sext(64)
        dirty(h)

    return fp


def _from_integer(fmt: Format, width: int, signed: bool) -> Semantics:
    name = f"{fmt.prefix}from_{'i' if signed else 'u'}{width}"

    def fp(h: Hart, frd: Reg, rs1: Reg, rm: Value) -> None:
        require_fp(h)
        require_rounding(h, rm)
        write(h, fmt, frd, h.fp(name, (h.x[rs1].trunc(width),), rm))

    return fp


def _move_to_x(fmt: Format) -> Semantics:
    def fp(h: Hart, rd: Reg, frs1: Reg) -> None:
        """20.7: the bits as they are, boxed or not."""
        require_fp(h)
        h.x[rd] = h.f[frs1].trunc(fmt.width).sext(64)

    return fp


def _move_from_x(fmt: Format) -> Semantics:
    def fp(h: Hart, frd: Reg, rs1: Reg) -> None:
        require_fp(h)
        write(h, fmt, frd, h.x[rs1].trunc(fmt.width))

    return fp


def arithmetic(fmt: Format, module: str) -> list[Insn]:
    """The rows that both formats have, for the extension's module."""
    s, code = fmt.letter, fmt.code
    rows: list[Insn] = []

    def row(name: str, encoding: str, function: Semantics) -> None:
        function.__module__ = f"kvmcore.isa.{module}"
        rows.append(make(name, encoding, _named(function, name), module, (), {}))

    for number, name in enumerate(("add", "sub", "mul", "div")):
        row(f"f{name}.{s}", f"{number:05b}{code} rs2 rs1 rm rd 1010011", _binary(fmt, name))
    row(f"fsqrt.{s}", f"01011{code} 00000 rs1 rm rd 1010011", _sqrt(fmt))
    for opcode, name, product, addend in (
        ("1000011", "fmadd", False, False),
        ("1000111", "fmsub", False, True),
        ("1001011", "fnmsub", True, False),
        ("1001111", "fnmadd", True, True),
    ):
        row(f"{name}.{s}", f"rs3 {code} rs2 rs1 rm rd {opcode}", _fused(fmt, product, addend))
    for funct3, name in (("000", "fsgnj"), ("001", "fsgnjn"), ("010", "fsgnjx")):
        row(f"{name}.{s}", f"00100{code} rs2 rs1 {funct3} rd 1010011", _sign(fmt, name))
    for funct3, name in (("000", "min"), ("001", "max")):
        row(f"f{name}.{s}", f"00101{code} rs2 rs1 {funct3} rd 1010011", _least(fmt, name))
    for funct3, name in (("010", "eq"), ("001", "lt"), ("000", "le")):
        row(f"f{name}.{s}", f"10100{code} rs2 rs1 {funct3} rd 1010011", _compare(fmt, name))
    row(f"fclass.{s}", f"11100{code} 00000 rs1 001 rd 1010011", _classify(fmt))
    for number, (letter, width, signed) in enumerate(
        (("w", 32, True), ("wu", 32, False), ("l", 64, True), ("lu", 64, False))
    ):
        fields = f"{code} {number:05b} rs1 rm rd 1010011"
        row(f"fcvt.{letter}.{s}", "11000" + fields, _to_integer(fmt, width, signed))
        row(f"fcvt.{s}.{letter}", "11010" + fields, _from_integer(fmt, width, signed))
    x = "w" if fmt.width == 32 else "d"
    row(f"fmv.x.{x}", f"11100{code} 00000 rs1 000 rd 1010011", _move_to_x(fmt))
    row(f"fmv.{x}.x", f"11110{code} 00000 rs1 000 rd 1010011", _move_from_x(fmt))
    return rows


ALIASES = arithmetic(SINGLE, "rv64f")


# -- loads and stores (20.5) -----------------------------------------------------------------------


@insn("flw", "imm[11:0] rs1 010 rd 0000111")
def flw(h: Hart, frd: Reg, rs1: Reg, imm: Value) -> None:
    require_fp(h)
    write(h, SINGLE, frd, h.load(h.x[rs1] + imm, 4))


@insn("fsw", "imm[11:5] rs2 rs1 010 imm[4:0] 0100111")
def fsw(h: Hart, rs1: Reg, frs2: Reg, imm: Value) -> None:
    """The low word as it is, boxed or not."""
    require_fp(h)
    h.store(h.x[rs1] + imm, h.f[frs2].trunc(32))
