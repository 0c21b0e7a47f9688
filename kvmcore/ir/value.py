"""Values: the integers that instruction semantics are written over.

A `Value` is a bit vector of 1 to 128 bits. Its content is either known (`const`) or an operation of the
active trace. Semantics are ordinary Python functions over Values: with known operands they simply compute
(the reference engine), under a `Tracer` (trace.py) the same code records what native code has to do.
`if` on an unknown condition forks the trace; loops over unknown conditions are not expressible.
Never imported here: anything of LLVM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from kvmcore.ir.trace import Tracer

Operand = Union["Value", int]

#: The tracer that records operations on unknown Values; None while the reference runs.
active: Tracer | None = None


class Value:
    """A bit vector: `width` bits, `const` its unsigned content or None, `name` its place in the trace."""

    __slots__ = ("const", "name", "width")

    def __init__(self, width: int, const: int | None, name: str = "") -> None:
        self.width = width
        self.const = None if const is None else const & ((1 << width) - 1)
        self.name = name

    def __repr__(self) -> str:
        return (
            f"{self.name or self.const:#x}:i{self.width}"
            if self.const is not None
            else f"{self.name}:i{self.width}"
        )

    __hash__ = None  # type: ignore[assignment]  # == builds a comparison, so a Value can be no dict key

    @property
    def key(self) -> tuple[int, int | str]:
        """What tells this Value from others of the same trace."""
        return (self.width, self.name if self.const is None else self.const)

    @property
    def signed(self) -> int:
        """The content as a two's complement Python int; only for known Values."""
        if self.const is None:
            raise TypeError("the content of a traced Value is not known")
        return self.const - (1 << self.width) if self.const >> (self.width - 1) else self.const

    def __int__(self) -> int:
        if self.const is None:
            raise TypeError("the content of a traced Value is not known")
        return self.const

    __index__ = __int__

    def __bool__(self) -> bool:
        if self.const is not None:
            return self.const != 0
        if active is None:
            raise TypeError("a decision on a traced Value outside a trace")
        return active.decide(self if self.width == 1 else self != 0)

    # -- arithmetic, wrapping at the width ------------------------------------------------------------
    def __add__(self, other: Operand) -> Value:
        return binary("add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return binary("sub", self, other)

    def __rsub__(self, other: int) -> Value:
        return binary("sub", Value(self.width, other), self)

    def __mul__(self, other: Operand) -> Value:
        return binary("mul", self, other)

    def __and__(self, other: Operand) -> Value:
        return binary("and", self, other)

    def __or__(self, other: Operand) -> Value:
        return binary("or", self, other)

    def __xor__(self, other: Operand) -> Value:
        return binary("xor", self, other)

    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __invert__(self) -> Value:
        return binary("xor", self, -1)

    def __neg__(self) -> Value:
        return binary("sub", Value(self.width, 0), self)

    def __lshift__(self, amount: Operand) -> Value:
        """Shift left; the amount must be below the width (mask it, as the instruction does)."""
        return binary("shl", self, amount)

    def __rshift__(self, amount: Operand) -> Value:
        """Logical shift right; the amount must be below the width."""
        return binary("lshr", self, amount)

    def sar(self, amount: Operand) -> Value:
        """Arithmetic shift right; the amount must be below the width."""
        return binary("ashr", self, amount)

    def udiv(self, other: Operand) -> Value:
        """Unsigned quotient; the divisor must be known not to be 0 on this path (test it with `if`)."""
        return binary("udiv", self, other)

    def urem(self, other: Operand) -> Value:
        """Unsigned remainder; as `udiv`."""
        return binary("urem", self, other)

    def sdiv(self, other: Operand) -> Value:
        """Signed quotient, towards zero; neither division by 0 nor overflow may happen on this path."""
        return binary("sdiv", self, other)

    def srem(self, other: Operand) -> Value:
        """Signed remainder, sign of the dividend; as `sdiv`."""
        return binary("srem", self, other)

    # -- comparisons: 1-bit Values ---------------------------------------------------------------------
    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return binary("eq", self, other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return binary("ne", self, other)  # type: ignore[arg-type]

    def __lt__(self, other: Operand) -> Value:
        """Unsigned less than."""
        return binary("ult", self, other)

    def __le__(self, other: Operand) -> Value:
        return binary("ule", self, other)

    def __gt__(self, other: Operand) -> Value:
        return binary("ult", as_value(other, self.width), self)

    def __ge__(self, other: Operand) -> Value:
        return binary("ule", as_value(other, self.width), self)

    def slt(self, other: Operand) -> Value:
        """Signed less than."""
        return binary("slt", self, other)

    def sge(self, other: Operand) -> Value:
        """Signed greater or equal."""
        return binary("sle", as_value(other, self.width), self)

    # -- widths --------------------------------------------------------------------------------------------
    def zext(self, width: int) -> Value:
        """Zero-extend to `width` bits (same width: itself)."""
        return self if width == self.width else operation("zext", (self,), width)

    def sext(self, width: int) -> Value:
        """Sign-extend to `width` bits (same width: itself)."""
        return self if width == self.width else operation("sext", (self,), width)

    def trunc(self, width: int) -> Value:
        """The low `width` bits (same width: itself)."""
        return self if width == self.width else operation("trunc", (self,), width)

    def bit(self, index: int) -> Value:
        """Bit `index` as a 1-bit Value."""
        return (self >> index).trunc(1)

    def bits(self, high: int, low: int) -> Value:
        """Bits high..low, inclusive, as in the manuals, in a Value of the same width."""
        return (self >> low) & ((1 << (high - low + 1)) - 1)

    # -- bit counting --------------------------------------------------------------------------------------
    def clz(self) -> Value:
        """Leading zero bits; the width when the Value is 0."""
        return operation("ctlz", (self,), self.width)

    def ctz(self) -> Value:
        """Trailing zero bits; the width when the Value is 0."""
        return operation("cttz", (self,), self.width)

    def popcount(self) -> Value:
        """Number of 1 bits."""
        return operation("ctpop", (self,), self.width)

    def bswap(self) -> Value:
        """The bytes in reverse order; the width is a multiple of 16."""
        return operation("bswap", (self,), self.width)


def const(width: int, value: int) -> Value:
    """A known Value."""
    return Value(width, value)


def u64(value: int) -> Value:
    """A known 64-bit Value."""
    return Value(64, value)


def as_value(value: Operand, width: int) -> Value:
    """`value` as a Value of `width` bits; Python ints are taken modulo 2**width."""
    if isinstance(value, Value):
        if value.width != width:
            raise TypeError(f"operands of {value.width} and {width} bits: extend or truncate one")
        return value
    return Value(width, int(value))


def select(condition: Value, if_true: Operand, if_false: Operand) -> Value:
    """`if_true` where the 1-bit condition holds, else `if_false`; both are computed, nothing forks."""
    if isinstance(if_true, Value):
        if_false = as_value(if_false, if_true.width)
    elif isinstance(if_false, Value):
        if_true = as_value(if_true, if_false.width)
    else:
        raise TypeError("select needs at least one Value to know its width")
    if condition.const is not None:
        return if_true if condition.const else if_false
    return operation("select", (condition, if_true, if_false), if_true.width)


def binary(opcode: str, left: Value, right: Operand) -> Value:
    """An operation of two operands of one width; comparisons give 1 bit."""
    other = as_value(right, left.width)
    return operation(opcode, (left, other), 1 if opcode in _COMPARISONS else left.width)


def operation(opcode: str, args: tuple[Value, ...], width: int) -> Value:
    """A pure operation: computed at once when all operands are known, else recorded in the trace."""
    if all(arg.const is not None for arg in args):
        return Value(width, _fold(opcode, args, width))
    if len(args) == 2:
        simple = _identity(opcode, args[0], args[1])
        if simple is not None:
            return simple
    if active is None:
        raise TypeError(f"{opcode} on a traced Value outside a trace")
    return active.pure(opcode, args, width)


_COMPARISONS = frozenset({"eq", "ne", "ult", "ule", "slt", "sle"})


def _identity(opcode: str, left: Value, right: Value) -> Value | None:
    """x+0, x<<0, x&~0 and the like; keeps traces of folded operands small."""
    if right.const == 0:
        if opcode in ("add", "sub", "or", "xor", "shl", "lshr", "ashr"):
            return left
        if opcode in ("and", "mul"):
            return right
    if left.const == 0:
        if opcode in ("add", "or", "xor"):
            return right
        if opcode in ("and", "mul"):
            return left
    if opcode == "and" and right.const == (1 << right.width) - 1:
        return left
    return None


def _fold(opcode: str, args: tuple[Value, ...], width: int) -> int:
    a, w = args[0], args[0].width
    x = int(a)
    match opcode:
        case "zext" | "trunc":
            return x
        case "sext":
            return a.signed
        case "ctlz":
            return w - x.bit_length()
        case "cttz":
            return (x & -x).bit_length() - 1 if x else w
        case "ctpop":
            return x.bit_count()
        case "bswap":
            return int.from_bytes(x.to_bytes(w // 8, "little"), "big")
    b = args[1]
    y = int(b)
    if opcode in ("shl", "lshr", "ashr") and y >= w:
        raise ValueError(f"{opcode} of i{w} by {y}: mask the amount")
    match opcode:
        case "add":
            return x + y
        case "sub":
            return x - y
        case "mul":
            return x * y
        case "and":
            return x & y
        case "or":
            return x | y
        case "xor":
            return x ^ y
        case "shl":
            return x << y
        case "lshr":
            return x >> y
        case "ashr":
            return a.signed >> y
        case "udiv":
            return x // y
        case "urem":
            return x % y
        case "sdiv":
            quotient = abs(a.signed) // abs(b.signed)
            return quotient if (a.signed < 0) == (b.signed < 0) else -quotient
        case "srem":
            remainder = abs(a.signed) % abs(b.signed)
            return -remainder if a.signed < 0 else remainder
        case "eq":
            return x == y
        case "ne":
            return x != y
        case "ult":
            return x < y
        case "ule":
            return x <= y
        case "slt":
            return a.signed < b.signed
        case "sle":
            return a.signed <= b.signed
    raise ValueError(f"no such operation: {opcode}")
