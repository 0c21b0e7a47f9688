"""Floating point on the host's SSE unit: exact flags and rounding, as kvmcore/isa/softfloat.py defines them.

While guest code runs, MXCSR holds the guest's rounding mode and accrues its flags. Operations are LLVM's
strict constrained intrinsics, which neither fold nor move. What SSE does otherwise than RISC-V is patched
here: saturating conversions, unsigned conversions. Round-to-nearest-ties-away has no host mode: the reference
does those. Host-specific: this file is the only one that knows MXCSR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmcore.engine import hart_state
from kvmcore.ir import value as value_module
from kvmcore.ir.value import Value, const, select

if TYPE_CHECKING:
    from kvmcore.engine.native_hart import Code, HandlerHart
    from kvmcore.engine.region_hart import RegionHart

_MASKED = 0x1F80  # all exceptions masked, nothing flushed
_FLAG_BITS = 0x3F
#: MXCSR.RC of frm, two bits each: RNE 0, RTZ 3, RDN 1, RUP 2, others 0.
_ROUNDING = 0b00_00_00_00_10_01_11_00
RTZ, RMM, DYNAMIC = 1, 4, 7
NV, DZ, OF, UF, NX = 16, 8, 4, 2, 1


def _effect(opcode: str, args: tuple[Value, ...], width: int = 0, attrs: tuple[object, ...] = ()) -> Value:
    active = value_module.active
    assert active is not None
    return active.effect(opcode, args, width, attrs)


class FloatingPoint:
    """The floating-point side of one piece of native code."""

    def __init__(self, code: Code) -> None:
        self._code = code

    # -- fcsr ------------------------------------------------------------------------------------------------
    def _read(self) -> Value:
        return _effect("mxcsr_read", (self._code.s + hart_state.offset("mxcsr"),), 32)

    def _write(self, mxcsr: Value) -> None:
        _effect("mxcsr_write", (self._code.s + hart_state.offset("mxcsr"), mxcsr))

    def read_flags(self) -> Value:
        """fflags, 8 bits: NV DZ OF UF NX from MXCSR's IE ZE OE UE PE."""
        m = self._read()
        nx, uf, of = (m >> 5) & NX, (m >> 3) & UF, (m >> 1) & OF
        return (nx | uf | of | ((m << 1) & DZ) | ((m << 4) & NV)).trunc(8)

    def write_flags(self, flags: Value) -> None:
        self._write((self._read() & ~_FLAG_BITS) | self._flag_bits(flags))

    def _flag_bits(self, flags: Value) -> Value:
        v = flags.zext(32)
        return ((v & NX) << 5) | ((v & UF) << 3) | ((v & OF) << 1) | ((v & DZ) >> 1) | ((v & NV) >> 4)

    def write_rounding(self, frm: Value) -> None:
        self._write((self._read() & ~0x6000) | self._rounding_bits(frm))

    def _rounding_bits(self, frm: Value) -> Value:
        return ((const(32, _ROUNDING) >> (frm.zext(32) << 1)) & 3) << 13

    def raise_flags(self, flags: int) -> None:
        """Accrue flags that the host's operation does not raise."""
        self._write(self._read() | self._flag_bits(const(8, flags)))

    def enter(self) -> None:
        """Guest code begins: MXCSR from the hart's fields."""
        h = self._code
        self._write(self._flag_bits(self._load8("fflags")) | self._rounding_bits(h.get("frm")) | _MASKED)

    def leave(self) -> None:
        """Guest code ends: the flags into the hart's field."""
        _effect("store", (self._code.address("fflags"), self.read_flags()), 0, ("plain", 1))

    def _load8(self, name: str) -> Value:
        return _effect("load", (self._code.address(name),), 8, ("plain", 1))

    # -- operations ------------------------------------------------------------------------------------------
    def operation(self, h: HandlerHart | RegionHart, name: str, args: tuple[Value, ...], rm: Value | int | None) -> Value:
        """One operation of softfloat.py ("f32.add"), rounded by rm, which is known, or by frm where rm is
        7.
        """
        kind, _, operation = name.partition(".")
        width = {"f32": 32, "f64": 64}[kind]
        truncates = operation.startswith("to_") and operation[3] in "iu" and rm is not None and int(rm) == RTZ
        if rm is not None and not truncates:
            if int(rm) == DYNAMIC:
                if h.get("frm") >= RMM:
                    h.exit("EMULATE")
            elif h.get("frm") != int(rm):
                h.exit("EMULATE")
        if operation.startswith("to_") and operation[3] in "iu":
            return self._to_integer(width, args[0], int(operation[4:]), operation[3] == "i", truncates)
        if operation.startswith("from_"):
            return self._from_integer(width, args[0], operation[5] == "i")
        if operation in ("min", "max"):
            return self._least(width, args[0], args[1], operation)
        if operation in _COMPARISONS:
            return self._host(_COMPARISONS[operation], width, args, 1)
        host, result = _ARITHMETIC[operation]
        value = self._host(host, width, args, result or width)
        if self._is_nan(value):  # 20.3: a NaN result is the canonical one; by a jump, which costs no latency
            _effect("rare", ())
            if operation == "fma":
                self._invalid_product(width, *args)
            return const(value.width, _NAN[value.width])
        return value

    def _is_nan(self, a: Value) -> Value:
        """Quiet, but a signaling NaN raises NV: for results, and for operands whose operation does so anyway."""
        return self._host("uno", a.width, (a, a), 1)

    def _host(self, operation: str, width: int, args: tuple[Value, ...], result: int, *rest: int) -> Value:
        return _effect("fp", args, result, (operation, width, *rest))

    def _invalid_product(self, width: int, a: Value, b: Value, c: Value) -> None:
        """20.6: infinity times zero raises NV even when a quiet NaN is added; SSE does not."""
        if self._is_nan(c):
            zero_a, zero_b = _magnitude(a) == 0, _magnitude(b) == 0
            inf_a, inf_b = _magnitude(a) == _INFINITY[width], _magnitude(b) == _INFINITY[width]
            if (inf_a & zero_b) | (zero_a & inf_b):
                self.raise_flags(NV)

    def _least(self, width: int, a: Value, b: Value, operation: str) -> Value:
        """20.6: minimumNumber and maximumNumber; the quiet comparison raises NV for signaling NaNs."""
        less = self._host("quiet_olt", width, (a, b), 1)
        equal = self._host("oeq", width, (a, b), 1)
        chosen = select(less, a, b) if operation == "min" else select(less, b, a)
        zeros = (a | b) if operation == "min" else (a & b)
        chosen = select(equal, zeros, chosen)
        nan_a, nan_b = _magnitude(a) > _INFINITY[width], _magnitude(b) > _INFINITY[width]
        chosen = select(nan_a, b, select(nan_b, a, chosen))
        return select(nan_a & nan_b, const(width, _NAN[width]), chosen)

    def _to_integer(self, width: int, a: Value, bits: int, signed: bool, truncates: bool) -> Value:
        """20.7: out of range saturates and raises NV alone; NaN is the largest number.

        A number in range is converted by one instruction of the host, which raises NX as RISC-V does.
        """
        whole = a if truncates else self._host("nearbyint", width, (a,), width)
        top = bits - 1 if signed else bits
        below = self._host("quiet_olt", width, (whole, const(width, _power(width, top))), 1)
        if below & self._above(width, whole, bits, signed, truncates):
            if not truncates:
                self._host("rint", width, (a,), width)
            if bits == 64 and not signed:
                half = const(width, _power(width, 63))
                if self._host("quiet_ole", width, (half, whole), 1):
                    rest = self._host("fsub", width, (whole, half), width)
                    return self._host("fptosi", width, (rest,), 64, 64) ^ (1 << 63)
            return self._host("fptosi", width, (whole,), 64, 64).trunc(bits)
        _effect("rare", ())
        self.raise_flags(NV)
        negative = a.bit(width - 1) & (_magnitude(a) <= _INFINITY[width])
        least = const(bits, 1 << (bits - 1) if signed else 0)
        return select(negative, least, const(bits, (1 << top) - 1))

    def _above(self, width: int, a: Value, bits: int, signed: bool, truncates: bool) -> Value:
        """Whether a number is not too small: above the least integer minus one where that is representable."""
        sign = 1 << (width - 1)
        if not signed:
            return self._host("quiet_olt", width, (const(width, _power(width, 0) | sign), a), 1)
        if truncates and bits == 32 and width == 64:
            return self._host("quiet_olt", width, (const(width, 0xC1E0000000200000), a), 1)  # -2**31 - 1
        return self._host("quiet_ole", width, (const(width, _power(width, bits - 1) | sign), a), 1)

    def _from_integer(self, width: int, a: Value, signed: bool) -> Value:
        if signed:
            return self._host("sitofp", width, (a,), width, a.width)
        if a.width == 32:
            return self._host("sitofp", width, (a.zext(64),), width, 64)
        if a.slt(0):  # half of it, the lost bit kept for rounding, then doubled exactly
            half = self._host("sitofp", width, ((a >> 1) | (a & 1),), width, 64)
            return self._host("fadd", width, (half, half), width)
        return self._host("sitofp", width, (a,), width, 64)


def _magnitude(a: Value) -> Value:
    return a & ((1 << (a.width - 1)) - 1)


def _power(width: int, exponent: int) -> int:
    """The bits of 2**exponent."""
    bias, fraction = (127, 23) if width == 32 else (1023, 52)
    return (bias + exponent) << fraction


_INFINITY = {32: 0x7F800000, 64: 0x7FF0000000000000}
_NAN = {32: 0x7FC00000, 64: 0x7FF8000000000000}
_COMPARISONS = {"eq": "oeq", "lt": "olt", "le": "ole"}
#: Operation -> LLVM's, and the result's width where it differs.
_ARITHMETIC: dict[str, tuple[str, int]] = {
    "add": ("fadd", 0), "sub": ("fsub", 0), "mul": ("fmul", 0), "div": ("fdiv", 0), "sqrt": ("sqrt", 0),
    "fma": ("fma", 0), "to_f32": ("fptrunc", 32), "to_f64": ("fpext", 64),
}  # fmt: skip
