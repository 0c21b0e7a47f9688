"""IEEE 754 arithmetic on Python integers: the definition of every operation that semantics ask of `Hart.fp`.

Exact: a value is sign * m * 2**e with unbounded m, rounded once. All five rounding modes, exact flags,
tininess detected after rounding, canonical NaNs (Unprivileged ISA, 20.2 to 20.9). Used by the reference;
native code is tested against it. Slow and without tricks.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

RNE, RTZ, RDN, RUP, RMM = range(5)
DYNAMIC = 7
NX, UF, OF, DZ, NV = 1, 2, 4, 8, 16


class Format(NamedTuple):
    """width bits in all, `fraction` of them stored significand bits; bias of the exponent."""

    width: int
    fraction: int
    bias: int

    @property
    def infinity(self) -> int:
        return ((1 << (self.width - 1 - self.fraction)) - 1) << self.fraction

    @property
    def nan(self) -> int:
        return self.infinity | 1 << (self.fraction - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @property
    def least_exponent(self) -> int:
        """Exponent of the last place of subnormal numbers."""
        return 1 - self.bias - self.fraction


F32 = Format(32, 23, 127)
F64 = Format(64, 52, 1023)
FORMATS = {"f32": F32, "f64": F64}


class Number(NamedTuple):
    """(-1)**negative * m * 2**e, m >= 0; or an infinity."""

    negative: bool
    m: int
    e: int
    infinite: bool = False


def is_nan(fmt: Format, bits: int) -> bool:
    return bits & ~fmt.sign > fmt.infinity


def is_signaling(fmt: Format, bits: int) -> bool:
    return is_nan(fmt, bits) and not bits >> (fmt.fraction - 1) & 1


def unpack(fmt: Format, bits: int) -> Number:
    """The number that these bits, which are no NaN, stand for."""
    negative, rest = bool(bits & fmt.sign), bits & ~fmt.sign
    exponent, fraction = rest >> fmt.fraction, rest & ((1 << fmt.fraction) - 1)
    if rest == fmt.infinity:
        return Number(negative, 0, 0, True)
    if exponent == 0:
        return Number(negative, fraction, fmt.least_exponent)
    return Number(negative, fraction | 1 << fmt.fraction, exponent - 1 + fmt.least_exponent)


def _increments(negative: bool, odd: bool, rest: int, half: int, mode: int) -> bool:
    """Whether rounding away from zero is due: `rest` is what is cut off, `half` half a unit; rest > 0."""
    if mode == RNE:
        return rest > half or (rest == half and odd)
    if mode == RMM:
        return rest >= half
    return mode == (RDN if negative else RUP)


def _round_at(number: Number, exponent: int, mode: int) -> tuple[int, bool]:
    """m rounded to a multiple of 2**exponent, in such units; whether that was inexact."""
    shift = exponent - number.e
    if shift <= 0:
        return number.m << -shift, False
    kept, rest = number.m >> shift, number.m & ((1 << shift) - 1)
    if rest and _increments(number.negative, bool(kept & 1), rest, 1 << (shift - 1), mode):
        kept += 1
    return kept, rest != 0


def pack(fmt: Format, number: Number, mode: int) -> tuple[int, int]:
    """(bits, flags) of the number rounded to the format."""
    sign = fmt.sign if number.negative else 0
    if number.infinite:
        return sign | fmt.infinity, 0
    if number.m == 0:
        return sign, 0
    top = number.m.bit_length() + number.e - 1  # exponent of the leading bit
    unit = max(top - fmt.fraction, fmt.least_exponent)
    kept, inexact = _round_at(number, unit, mode)
    flags = NX if inexact else 0
    if kept >> (fmt.fraction + 1):
        kept, unit = kept >> 1, unit + 1
    if kept >> fmt.fraction == 0:
        biased = 0
    else:
        biased = unit - fmt.least_exponent + 1
    if biased >= (fmt.infinity >> fmt.fraction):
        to_infinity = mode in (RNE, RMM) or mode == (RDN if number.negative else RUP)
        return sign | (fmt.infinity if to_infinity else fmt.infinity - 1), OF | NX
    if inexact and top < 1 - fmt.bias:
        # Tiny unless rounding with unbounded exponent reaches the least normal number.
        rounded, _ = _round_at(number, top - fmt.fraction, mode)
        if top < -fmt.bias or rounded.bit_length() <= fmt.fraction + 1:
            flags |= UF
    fraction = kept & ((1 << fmt.fraction) - 1)
    return sign | biased << fmt.fraction | fraction, flags


def _nan_flags(fmt: Format, *operands: int) -> int:
    return NV if any(is_signaling(fmt, bits) for bits in operands) else 0


def _sum(a: Number, b: Number, mode: int) -> Number | None:
    """a + b exactly; None: infinity minus infinity."""
    if a.infinite or b.infinite:
        if a.infinite and b.infinite and a.negative != b.negative:
            return None
        return a if a.infinite else b
    e = min(a.e, b.e)
    total = sum((-n.m if n.negative else n.m) << (n.e - e) for n in (a, b))
    if total == 0:
        same = a.negative == b.negative
        return Number(a.negative if same else mode == RDN, 0, 0)
    return Number(total < 0, abs(total), e)


def _product(a: Number, b: Number) -> Number | None:
    """a * b exactly; None: zero times infinity."""
    negative = a.negative != b.negative
    if a.infinite or b.infinite:
        zero = (not a.infinite and a.m == 0) or (not b.infinite and b.m == 0)
        return None if zero else Number(negative, 0, 0, True)
    return Number(negative, a.m * b.m, a.e + b.e)


def _finish(fmt: Format, number: Number | None, mode: int) -> tuple[int, int]:
    return (fmt.nan, NV) if number is None else pack(fmt, number, mode)


def fma(fmt: Format, a: int, b: int, c: int, mode: int) -> tuple[int, int]:
    """a * b + c, rounded once. NV for zero times infinity even if c is a quiet NaN (20.6)."""
    nan = any(is_nan(fmt, bits) for bits in (a, b, c))
    product = None
    if not is_nan(fmt, a) and not is_nan(fmt, b):
        product = _product(unpack(fmt, a), unpack(fmt, b))
        if product is None:
            return fmt.nan, NV
    if nan or product is None:
        return fmt.nan, _nan_flags(fmt, a, b, c)
    return _finish(fmt, _sum(product, unpack(fmt, c), mode), mode)


def _div(fmt: Format, a: Number, b: Number, mode: int) -> tuple[int, int]:
    negative = a.negative != b.negative
    if a.infinite:
        return (fmt.nan, NV) if b.infinite else pack(fmt, Number(negative, 0, 0, True), mode)
    if b.infinite:
        return pack(fmt, Number(negative, 0, 0), mode)
    if b.m == 0:
        return (fmt.nan, NV) if a.m == 0 else (pack(fmt, Number(negative, 0, 0, True), mode)[0], DZ)
    extra = 2 * fmt.width + b.m.bit_length()
    quotient, remainder = divmod(a.m << extra, b.m)
    return pack(fmt, Number(negative, quotient << 1 | (remainder != 0), a.e - b.e - extra - 1), mode)


def _sqrt(fmt: Format, a: Number, mode: int) -> tuple[int, int]:
    if not a.infinite and a.m == 0:
        return pack(fmt, a, mode)
    if a.negative:
        return fmt.nan, NV
    if a.infinite:
        return fmt.infinity, 0
    extra = 2 * fmt.width + (a.e & 1)
    m = a.m << extra
    root = isqrt(m)
    return pack(fmt, Number(False, root << 1 | (root * root != m), (a.e - extra) // 2 - 1), mode)


def _least(fmt: Format, operation: str, a: int, b: int) -> tuple[int, int]:
    flags = _nan_flags(fmt, a, b)
    if is_nan(fmt, a) or is_nan(fmt, b):
        return (fmt.nan if is_nan(fmt, a) and is_nan(fmt, b) else b if is_nan(fmt, a) else a), flags
    low, high = sorted((a, b), key=lambda bits: _order(fmt, bits))
    return (low if operation == "min" else high), flags


def _order(fmt: Format, bits: int) -> int:
    """Orders numbers, -0 below +0."""
    return ~(bits & ~fmt.sign) if bits & fmt.sign else bits


def _compare(fmt: Format, operation: str, a: int, b: int) -> tuple[int, int]:
    if is_nan(fmt, a) or is_nan(fmt, b):
        return 0, _nan_flags(fmt, a, b) if operation == "eq" else NV
    zero = not (a | b) & ~fmt.sign
    x, y = (0, 0) if zero else (_order(fmt, a), _order(fmt, b))
    return int({"eq": x == y, "lt": x < y, "le": x <= y}[operation]), 0


def _to_integer(fmt: Format, a: int, signed: bool, bits: int, mode: int) -> tuple[int, int]:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    mask = (1 << bits) - 1
    if is_nan(fmt, a):
        return high & mask, NV
    number = unpack(fmt, a)
    if number.infinite:
        return (low if number.negative else high) & mask, NV
    whole, inexact = _round_at(number, 0, mode)
    value = -whole if number.negative else whole
    if not low <= value <= high:
        return (low if number.negative else high) & mask, NV
    return value & mask, NX if inexact else 0


def _from_integer(fmt: Format, value: int, signed: bool, bits: int, mode: int) -> tuple[int, int]:
    if signed and value >> (bits - 1):
        value -= 1 << bits
    return pack(fmt, Number(value < 0, abs(value), 0), mode)


def result_width(name: str) -> int:
    """Bits of an operation's result."""
    kind, _, operation = name.partition(".")
    if operation in ("eq", "lt", "le"):
        return 1
    return int(operation[4:]) if operation.startswith("to_") else int(kind[1:])


def evaluate(name: str, args: tuple[int, ...], mode: int) -> tuple[int, int]:
    """(result bits, flags) of an operation: "f32.add", "f64.to_i32", ...; integers as bit patterns."""
    kind, _, operation = name.partition(".")
    fmt = FORMATS[kind]
    if operation.startswith("from_"):
        return _from_integer(fmt, args[0], operation[5] == "i", int(operation[6:]), mode)
    if operation in ("to_f32", "to_f64"):
        target = FORMATS[operation[3:]]
        if is_nan(fmt, args[0]):
            return target.nan, _nan_flags(fmt, args[0])
        return pack(target, unpack(fmt, args[0]), mode)
    if operation.startswith("to_"):
        return _to_integer(fmt, args[0], operation[3] == "i", int(operation[4:]), mode)
    if operation in ("min", "max"):
        return _least(fmt, operation, args[0], args[1])
    if operation in ("eq", "lt", "le"):
        return _compare(fmt, operation, args[0], args[1])
    if operation == "fma":
        return fma(fmt, args[0], args[1], args[2], mode)
    if any(is_nan(fmt, bits) for bits in args):
        return fmt.nan, _nan_flags(fmt, *args)
    numbers = [unpack(fmt, bits) for bits in args]
    match operation:
        case "add":
            return _finish(fmt, _sum(numbers[0], numbers[1], mode), mode)
        case "sub":
            other = numbers[1]._replace(negative=not numbers[1].negative)
            return _finish(fmt, _sum(numbers[0], other, mode), mode)
        case "mul":
            return _finish(fmt, _product(numbers[0], numbers[1]), mode)
        case "div":
            return _div(fmt, numbers[0], numbers[1], mode)
        case "sqrt":
            return _sqrt(fmt, numbers[0], mode)
    raise ValueError(f"no such operation: {name}")
