"""Values that find bugs: integers and floating-point patterns at edges, mixed with plain random ones."""

from __future__ import annotations

import random

U64 = (1 << 64) - 1
_INTEGERS = [
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    63,
    64,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
]
_INTEGERS += [0xFFFFFFFF, 0x100000000, (1 << 63) - 1, 1 << 63, 0x5555555555555555, 0x00FF00FF00FF00FF]
_SINGLES = [
    0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000,
    0x7F800001, 0x7FBFFFFF, 0xFF800001, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000,
    0x7F7FFFFF, 0xFF7FFFFF, 0x4F000000, 0xCF000000, 0x4EFFFFFF, 0x4F7FFFFF, 0x4F800000, 0x5F000000,
    0xDF000000, 0x5EFFFFFF, 0x5F7FFFFF, 0x5F800000, 0x3F000000, 0xBF000000, 0x3EFFFFFF, 0x3F000001,
    0x3F7FFFFF, 0x3F800001, 0x40200000, 0x3FC00000, 0x34000000, 0x33800000, 0x0C800000, 0x1F800000,
    0x20000000, 0x5F7FFFFE, 0x00FFFFFF, 0x01000000,
]  # fmt: skip
_DOUBLES = [
    0x0000000000000000, 0x8000000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FF0000000000000,
    0xFFF0000000000000, 0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001, 0x7FF7FFFFFFFFFFFF,
    0x0000000000000001, 0x8000000000000001, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x8010000000000000,
    0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x41E0000000000000, 0xC1E0000000000000, 0x41DFFFFFFFC00000,
    0x41DFFFFFFFE00000, 0x41EFFFFFFFE00000, 0x41EFFFFFFFF00000, 0x41F0000000000000, 0x43E0000000000000,
    0xC3E0000000000000, 0x43DFFFFFFFFFFFFF, 0x43EFFFFFFFFFFFFF, 0x43F0000000000000, 0x3FE0000000000000,
    0xBFE0000000000000, 0x3FDFFFFFFFFFFFFF, 0x3FE0000000000001, 0x3FEFFFFFFFFFFFFF, 0x3FF0000000000001,
    0x4004000000000000, 0x3FF8000000000000, 0x3CB0000000000000, 0x1FF0000000000000, 0x380FFFFFE0000000,
    0x380FFFFFF0000000, 0x36A0000000000000, 0x3690000000000000, 0x47EFFFFFE0000000, 0x47EFFFFFF0000000,
    0x47EFFFFFEFFFFFFF, 0x3810000000000000, 0x369FFFFFFFFFFFFF, 0x36A8000000000000,
]  # fmt: skip


def integer(rng: random.Random) -> int:
    """64 bits, often an edge or near one."""
    kind = rng.random()
    if kind < 0.35:
        value = rng.choice(_INTEGERS)
        if rng.random() < 0.4:
            value += rng.randint(-2, 2)
        if rng.random() < 0.3:
            value = -value
    elif kind < 0.5:
        value = 1 << rng.randrange(64)
        value += rng.choice((-1, 0, 0, 1))
    elif kind < 0.65:
        value = rng.getrandbits(32)
        value -= (value >> 31) << 32
    elif kind < 0.75:
        value = rng.getrandbits(64) & rng.getrandbits(64) & rng.getrandbits(64)
    else:
        value = rng.getrandbits(64)
    return value & U64


def single(rng: random.Random) -> int:
    """The 32 bits of a single."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(_SINGLES)
    if kind < 0.6:
        return (rng.choice(_SINGLES) + rng.randint(-3, 3)) & 0xFFFFFFFF
    if kind < 0.8:  # exponents near each other, so that sums and products round
        return rng.getrandbits(1) << 31 | rng.randint(110, 144) << 23 | rng.getrandbits(23)
    return rng.getrandbits(32)


def double(rng: random.Random) -> int:
    """The 64 bits of a double."""
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(_DOUBLES)
    if kind < 0.6:
        return (rng.choice(_DOUBLES) + rng.randint(-3, 3)) & U64
    if kind < 0.8:
        return rng.getrandbits(1) << 63 | rng.randint(1000, 1050) << 52 | rng.getrandbits(52)
    return rng.getrandbits(64)


def floating(rng: random.Random) -> int:
    """A 64-bit f register: a NaN-boxed single, a double, or neither."""
    kind = rng.random()
    if kind < 0.48:
        return 0xFFFFFFFF << 32 | single(rng)
    if kind < 0.96:
        return double(rng)
    return integer(rng)
