"""How each operand kind of encodings.FORMS goes into an instruction word.

Used by asm.py and by the random generator. Every packer refuses a value that does not fit (EncodingError):
a test program must never silently hold another instruction than its text says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.framework.encodings import ENCODINGS, FORMS


class EncodingError(ValueError):
    """An operand that the instruction cannot hold."""


def _unsigned(value: int, bits: int, scale: int = 1) -> int:
    if value % scale or not 0 <= value < scale << bits:
        raise EncodingError(f"{value:#x} is not a multiple of {scale} below {scale << bits:#x}")
    return value


def _signed(value: int, bits: int, scale: int = 1) -> int:
    if value % scale or not -(scale << bits - 1) <= value < scale << bits - 1:
        raise EncodingError(f"{value} is not a multiple of {scale} that fits {bits} signed bits")
    return value & (scale << bits) - 1


def _bits(value: int, *places: tuple[int, int, int]) -> int:
    """Scatter: each (high, low, to) moves value[high:low] to bit `to`."""
    return sum((value >> low & (1 << high - low + 1) - 1) << to for high, low, to in places)


def _nonzero(value: int, bits: int) -> int:
    if value == 0:
        raise EncodingError("zero is reserved here")
    return _unsigned(value, bits)


def _three(value: int) -> int:
    if not 8 <= value < 16:
        raise EncodingError(f"register {value} is not in x8..x15")
    return value - 8


def _branch(value: int) -> int:
    return _bits(_signed(value, 12, 2), (12, 12, 31), (10, 5, 25), (4, 1, 8), (11, 11, 7))


def _jump(value: int) -> int:
    return _bits(_signed(value, 20, 2), (20, 20, 31), (10, 1, 21), (11, 11, 20), (19, 12, 12))


def _cjump(value: int) -> int:
    value = _signed(value, 11, 2)
    places = ((11, 11, 12), (4, 4, 11), (9, 8, 9), (10, 10, 8), (6, 6, 7), (7, 7, 6), (3, 1, 3), (5, 5, 2))
    return _bits(value, *places)


def _cbranch(value: int) -> int:
    return _bits(_signed(value, 8, 2), (8, 8, 12), (4, 3, 10), (7, 6, 5), (2, 1, 3), (5, 5, 2))


def _imm6(value: int) -> int:
    return _bits(_signed(value, 6), (5, 5, 12), (4, 0, 2))


def _immlui(value: int) -> int:
    if value >= 0xFFFE0:  # the assembler's spelling of a negative upper immediate
        value -= 1 << 20
    if value == 0:
        raise EncodingError("c.lui needs a non-zero immediate")
    return _imm6(value)


def _imm16sp(value: int) -> int:
    if value == 0:
        raise EncodingError("c.addi16sp needs a non-zero immediate")
    return _bits(_signed(value, 6, 16), (9, 9, 12), (4, 4, 6), (6, 6, 5), (8, 7, 3), (5, 5, 2))


def _uimm10(value: int) -> int:
    if value == 0:
        raise EncodingError("c.addi4spn needs a non-zero immediate")
    return _bits(_unsigned(value, 8, 4), (5, 4, 11), (9, 6, 7), (2, 2, 6), (3, 3, 5))


def _sp(value: int) -> int:
    if value != 2:
        raise EncodingError("this form takes sp only")
    return 0


def _rdlui(value: int) -> int:
    if value in (0, 2):
        raise EncodingError("c.lui takes neither x0 nor x2")
    return value << 7


def _offset(function: Callable[[int], int]) -> Callable[[int, int], int]:
    """A memory operand: (offset, base)."""
    return lambda offset, base: function(offset) | base << 15


def _no_base(function: Callable[[int], int]) -> Callable[[int, int], int]:
    def pack(offset: int, base: int) -> int:
        _sp(base)
        return function(offset)

    return pack


def _three_base(function: Callable[[int], int]) -> Callable[[int, int], int]:
    return lambda offset, base: function(offset) | _three(base) << 7


def _s_offset(value: int) -> int:
    return _bits(_signed(value, 12), (11, 5, 25), (4, 0, 7))


# kind -> packer of one value
ONE: dict[str, Callable[[int], int]] = {
    **{name: (lambda v: _unsigned(v, 5) << 7) for name in ("rd", "frd")},
    **{name: (lambda v: _unsigned(v, 5) << 15) for name in ("rs1", "frs1", "zimm")},
    **{name: (lambda v: _unsigned(v, 5) << 20) for name in ("rs2", "frs2")},
    "frs3": lambda v: _unsigned(v, 5) << 27,
    "rm": lambda v: _unsigned(v, 3) << 12,
    "csr": lambda v: _unsigned(v, 12) << 20,
    "imm12": lambda v: _signed(v, 12) << 20,
    "imm20": lambda v: _unsigned(v & 0xFFFFF if v < 0 else v, 20) << 12,
    "shamt6": lambda v: _unsigned(v, 6) << 20,
    "shamt5": lambda v: _unsigned(v, 5) << 20,
    "pred": lambda v: _unsigned(v, 4) << 24,
    "succ": lambda v: _unsigned(v, 4) << 20,
    "branch": _branch,
    "jump": _jump,
    "rd'": lambda v: 0,  # place depends on the form: see encode()
    "rdn": lambda v: _nonzero(v, 5) << 7,
    "rs2n": lambda v: _nonzero(v, 5) << 2,
    "rs1'": lambda v: _three(v) << 7,
    "rs2'": lambda v: _three(v) << 2,
    "frs2'": lambda v: _three(v) << 2,
    "frd'": lambda v: _three(v) << 2,
    "crs2": lambda v: _unsigned(v, 5) << 2,
    "cfrs2": lambda v: _unsigned(v, 5) << 2,
    "sp": _sp,
    "rdlui": _rdlui,
    "uimm10x4": _uimm10,
    "imm6": _imm6,
    "immlui": _immlui,
    "imm10x16": _imm16sp,
    "shamt6n": lambda v: _bits(_nonzero(v, 6), (5, 5, 12), (4, 0, 2)),
    "cjump": _cjump,
    "cbranch": _cbranch,
}

# kind -> packer of (offset, base register)
MEMORY: dict[str, Callable[[int, int], int]] = {
    "mem": _offset(lambda v: _signed(v, 12) << 20),
    "smem": _offset(_s_offset),
    "atomic": _offset(lambda v: 0 if v == 0 else _unsigned(-1, 1)),
    "cmem4": _three_base(lambda v: _bits(_unsigned(v, 5, 4), (5, 3, 10), (2, 2, 6), (6, 6, 5))),
    "cmem8": _three_base(lambda v: _bits(_unsigned(v, 5, 8), (5, 3, 10), (7, 6, 5))),
    "spmem4": _no_base(lambda v: _bits(_unsigned(v, 6, 4), (5, 5, 12), (4, 2, 4), (7, 6, 2))),
    "spmem8": _no_base(lambda v: _bits(_unsigned(v, 6, 8), (5, 5, 12), (4, 3, 5), (8, 6, 2))),
    "ssmem4": _no_base(lambda v: _bits(_unsigned(v, 6, 4), (5, 2, 9), (7, 6, 7))),
    "ssmem8": _no_base(lambda v: _bits(_unsigned(v, 6, 8), (5, 3, 10), (8, 6, 7))),
}

_LOW_RD = {"CIW", "CL4", "CL8"}  # forms whose rd' sits in bits 4:2; elsewhere it is in bits 9:7


def kinds(name: str) -> list[str]:
    """The operand kinds of an instruction, in assembly order; a store's address is 'smem'."""
    encoding = ENCODINGS[name]
    names = FORMS[encoding.form].split()
    if encoding.form in ("STORE", "FSTORE"):
        return [names[0], "smem"]
    return names


def encode(name: str, operands: Sequence[int], ordering: int = 0) -> int:
    """The instruction word. Memory operands take two values (offset, base); `ordering` is aq<<1 | rl."""
    encoding = ENCODINGS[name]
    word = encoding.match | ordering << 25
    values = iter(operands)
    try:
        for kind in kinds(name):
            if kind in MEMORY:
                word |= MEMORY[kind](next(values), next(values))
            elif kind == "rd'":
                word |= _three(next(values)) << (2 if encoding.form in _LOW_RD else 7)
            else:
                word |= ONE[kind](next(values))
    except EncodingError as error:
        raise EncodingError(f"{name} {list(operands)}: {error}") from None
    except StopIteration:
        raise EncodingError(f"{name}: too few operands") from None
    if next(values, None) is not None:
        raise EncodingError(f"{name}: too many operands")
    return word
