"""softfloat against the host: Python's own double arithmetic and the C library's fma, sqrt and float functions, in
the four rounding modes that hosts have, results and flags; and known cases that a host does otherwise.

tests/conformance/test_floating_point.py compares it with tier 1 and with QEMU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import operator
import platform
import random
import struct
from collections.abc import Callable

import pytest

from kvmcore.isa import softfloat as sf
from tests.framework.random_values import double, single

CASES = 1500
NX, UF, OF, DZ, NV = sf.NX, sf.UF, sf.OF, sf.DZ, sf.NV

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="fenv.h's constants of x86-64")
_ROUNDING = {sf.RNE: 0, sf.RDN: 0x400, sf.RUP: 0x800, sf.RTZ: 0xC00}
_FLAGS = ((0x01, NV), (0x04, DZ), (0x08, OF), (0x10, UF), (0x20, NX))
_libm = ctypes.CDLL(ctypes.util.find_library("m"))
_D, _F = ctypes.c_double, ctypes.c_float


def _function(name: str, kind: type, count: int) -> Callable[..., float]:
    function = getattr(_libm, name)
    function.argtypes, function.restype = [kind] * count, kind
    return function  # type: ignore[no-any-return]


DOUBLE: dict[str, tuple[Callable[..., float], int]] = {
    "add": (operator.add, 2), "sub": (operator.sub, 2), "mul": (operator.mul, 2), "div": (operator.truediv, 2),
    "sqrt": (_function("sqrt", _D, 1), 1), "fma": (_function("fma", _D, 3), 3),
}  # fmt: skip
SINGLE: dict[str, tuple[Callable[..., float], int]] = {
    "sqrt": (_function("sqrtf", _F, 1), 1), "fma": (_function("fmaf", _F, 3), 3),
}  # fmt: skip


def on_host(function: Callable[..., float], args: list[float], mode: int) -> tuple[float, int]:
    """The result and the flags, computed with the host's rounding mode set."""
    _libm.feclearexcept(0x3D)
    _libm.fesetround(_ROUNDING[mode])
    try:
        result = function(*args)
        raised = _libm.fetestexcept(0x3D)
    finally:
        _libm.fesetround(0)
    return result, sum(flag for bit, flag in _FLAGS if raised & bit)


def compare(fmt: sf.Format, code: str, name: str, function: Callable[..., float], count: int, mode: int) -> None:
    kind = "f64" if fmt is sf.F64 else "f32"
    integer = "<Q" if fmt is sf.F64 else "<I"
    rng = random.Random(f"{kind} {name} {mode}")
    for _ in range(CASES):
        bits = [double(rng) if fmt is sf.F64 else single(rng) for _ in range(count)]
        if any(sf.is_signaling(fmt, b) for b in bits):
            continue  # Python and C quiet them on the way
        args = [struct.unpack(code, struct.pack(integer, b))[0] for b in bits]
        if name == "div" and args[1] == 0:
            continue  # Python raises
        value, flags = on_host(function, args, mode)
        result = struct.unpack(integer, struct.pack(code, value))[0]
        if sf.is_nan(fmt, result):
            result = fmt.nan
            if name == "fma" and sf.is_nan(fmt, bits[2]):
                flags = sf.evaluate(f"{kind}.{name}", tuple(bits), mode)[1]  # x86 leaves NV out (20.6)
        assert sf.evaluate(f"{kind}.{name}", tuple(bits), mode) == (result, flags), [hex(b) for b in bits]


@x86
@pytest.mark.parametrize("mode", _ROUNDING)
@pytest.mark.parametrize("name", DOUBLE)
def test_doubles(name: str, mode: int) -> None:
    compare(sf.F64, "<d", name, *DOUBLE[name], mode)


@x86
@pytest.mark.parametrize("mode", _ROUNDING)
@pytest.mark.parametrize("name", SINGLE)
def test_singles(name: str, mode: int) -> None:
    compare(sf.F32, "<f", name, *SINGLE[name], mode)


ONE, TWO, HALF, INF, MAX = 0x3F800000, 0x40000000, 0x3F000000, 0x7F800000, 0x7F7FFFFF
LEAST, NORMAL, QUIET, SIGNALING = 0x00000001, 0x00800000, 0x7FC00000, 0x7F800001
MINUS = 0x80000000


@pytest.mark.parametrize(
    ("name", "args", "mode", "result", "flags"),
    [
        ("f32.div", (ONE, 0), 0, INF, DZ),
        ("f32.div", (0, 0), 0, QUIET, NV),
        ("f32.sub", (INF, INF), 0, QUIET, NV),
        ("f32.mul", (INF, 0), 0, QUIET, NV),
        ("f32.sqrt", (MINUS | ONE,), 0, QUIET, NV),
        ("f32.sqrt", (MINUS,), 0, MINUS, 0),
        ("f32.add", (SIGNALING, ONE), 0, QUIET, NV),
        ("f32.add", (0xFFC12345, ONE), 0, QUIET, 0),
        ("f32.sub", (ONE, ONE), sf.RNE, 0, 0),
        ("f32.sub", (ONE, ONE), sf.RDN, MINUS, 0),
        ("f32.fma", (INF, 0, QUIET), 0, QUIET, NV),
        ("f32.mul", (MAX, TWO), sf.RNE, INF, OF | NX),
        ("f32.mul", (MAX, TWO), sf.RTZ, MAX, OF | NX),
        ("f32.mul", (MAX, TWO), sf.RDN, MAX, OF | NX),
        ("f32.mul", (MAX | MINUS, TWO), sf.RDN, INF | MINUS, OF | NX),
        ("f32.mul", (LEAST, HALF), sf.RNE, 0, UF | NX),
        ("f32.mul", (LEAST, HALF), sf.RMM, LEAST, UF | NX),
        ("f32.mul", (LEAST, HALF), sf.RUP, LEAST, UF | NX),
        ("f32.mul", (NORMAL, HALF), sf.RNE, 0x00400000, 0),
        # Rounds to the least normal number with unbounded exponent too: not tiny after rounding.
        ("f32.mul", (0x3F7FFFFF, NORMAL), sf.RUP, NORMAL, UF | NX),
        ("f32.fma", (0x3F7FFFFF, NORMAL, LEAST >> 1), sf.RNE, NORMAL, UF | NX),
        ("f64.to_f32", (0x380FFFFFFFFFFFFF,), sf.RNE, NORMAL, NX),
        ("f64.to_f32", (0x380FFFFFE0000001,), sf.RNE, NORMAL, UF | NX),
        ("f32.min", (0, MINUS), 0, MINUS, 0),
        ("f32.max", (MINUS, 0), 0, 0, 0),
        ("f32.min", (QUIET, ONE), 0, ONE, 0),
        ("f32.max", (ONE, SIGNALING), 0, ONE, NV),
        ("f32.max", (0xFFC00000, QUIET), 0, QUIET, 0),
        ("f32.eq", (QUIET, QUIET), 0, 0, 0),
        ("f32.eq", (SIGNALING, ONE), 0, 0, NV),
        ("f32.lt", (QUIET, ONE), 0, 0, NV),
        ("f32.le", (0, MINUS), 0, 1, 0),
        ("f32.lt", (MINUS, 0), 0, 0, 0),
        ("f32.to_i32", (QUIET,), 0, 0x7FFFFFFF, NV),
        ("f32.to_i32", (0xCF000000,), 0, 0x80000000, 0),
        ("f32.to_i32", (0x4F000000,), 0, 0x7FFFFFFF, NV),
        ("f32.to_u32", (MINUS | HALF,), sf.RNE, 0, NX),
        ("f32.to_u32", (MINUS | ONE,), sf.RNE, 0, NV),
        ("f32.to_u64", (INF,), 0, (1 << 64) - 1, NV),
        ("f32.to_i64", (INF | MINUS,), 0, 1 << 63, NV),
        ("f32.to_i32", (0x3FC00000,), sf.RNE, 2, NX),
        ("f32.to_i32", (0x40200000,), sf.RNE, 2, NX),
        ("f32.to_i32", (0x40200000,), sf.RMM, 3, NX),
        ("f32.to_i32", (0xC0200000,), sf.RUP, (1 << 32) - 2, NX),
        ("f32.from_u64", ((1 << 64) - 1,), sf.RTZ, 0x5F7FFFFF, NX),
        ("f32.from_i32", (0xFFFFFFFF,), 0, 0xBF800000, 0),
        ("f64.from_i64", (1 << 63,), 0, 0xC3E0000000000000, 0),
    ],
)
def test_known_cases(name: str, args: tuple[int, ...], mode: int, result: int, flags: int) -> None:
    got = sf.evaluate(name, args, mode)
    assert (hex(got[0]), got[1]) == (hex(result), flags)


def test_ties_away_is_one_ulp_from_even_at_most() -> None:
    """RMM, which no host has: equal to RNE except at ties, where it is the one farther from zero."""
    rng = random.Random(7)
    for _ in range(2000):
        bits = (single(rng), single(rng))
        if any(sf.is_nan(sf.F32, b) for b in bits):
            continue
        even, away = (sf.evaluate("f32.mul", bits, mode) for mode in (sf.RNE, sf.RMM))
        assert even[1] == away[1] or {even[1], away[1]} <= {NX, UF | NX, OF | NX}
        if even[0] != away[0]:
            exact = math.prod(struct.unpack("<f", struct.pack("<I", b))[0] for b in bits)
            magnitudes = [struct.unpack("<f", struct.pack("<I", got[0] & ~MINUS))[0] for got in (even, away)]
            assert magnitudes[1] > magnitudes[0]
            assert abs(exact) == (magnitudes[0] + magnitudes[1]) / 2 or math.isinf(magnitudes[1])


def test_unknown_operation() -> None:
    with pytest.raises(ValueError, match="no such operation"):
        sf.evaluate("f32.tan", (0,), 0)
