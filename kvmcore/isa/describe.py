"""How an instruction is written down: `@insn(name, encoding)` above the function that is its meaning.

The encoding is the manual's row, highest bit first, as in "imm[11:0] rs1 000 rd 0010011". The function's
parameters name the fields it wants; everything else an engine needs (mask, match, how operands come out of
the bits, how small they are) is derived here. Used by the extension files of this folder; read by table.py,
by the decoder generator and by the reference. Never executes anything.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from kvmcore.ir.value import Value, const, select

Semantics = Callable[..., None]
F = TypeVar("F", bound=Semantics)

#: Where results for x0 go: a register slot behind x31 that nobody reads (kvmcore/engine/hart_state.py).
X0_SINK = 32

#: Widths of fields that are written without a bit list.
_FIELD_WIDTHS = {
    "rd": 5, "rs1": 5, "rs2": 5, "rs3": 5, "rd'": 3, "rs1'": 3, "rs2'": 3,
    "rm": 3, "csr": 12, "zimm": 5, "fm": 4, "pred": 4, "succ": 4, "aq": 1, "rl": 1,
}  # fmt: skip

#: Kind of a parameter: x source, xd destination (x0 -> X0_SINK), f register, s signed, u unsigned number.
_PARAMETER_KINDS = {
    "rd": "xd", "rs1": "x", "rs2": "x", "rs3": "x", "frd": "f", "frs1": "f", "frs2": "f", "frs3": "f",
    "imm": "s", "shamt": "u", "zimm": "u", "csr": "u", "rm": "u", "pred": "u", "succ": "u",
}  # fmt: skip

_TOKEN = re.compile(r"(?P<bits>[01]+)|(?P<name>[a-z][a-z0-9]*'?)(\[(?P<list>[0-9:|]+)\])?")


@dataclass(frozen=True, slots=True)
class Part:
    """`width` bits of a field: from bit `source` of the instruction to bit `target` of the operand."""

    source: int
    target: int
    width: int


@dataclass(frozen=True, slots=True)
class Operand:
    """One parameter of a semantics function and the way to it from the instruction's bits.

    kind: "x" integer register, "xd" the same as destination (x0 becomes X0_SINK), "f" floating-point
    register, "s" signed and "u" unsigned number. Numbers are multiples of `scale`; number / scale fits `bits`
    bits. `fixed` is the operand's value where the encoding has no field for it (sp in c.lwsp), else None.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]
    bits: int
    scale: int
    base: int = 0
    fixed: int | None = None

    @property
    def is_register(self) -> bool:
        return self.kind in ("x", "xd", "f")

    @property
    def signed(self) -> bool:
        return self.kind == "s"

    @property
    def width(self) -> int:
        """Width of the operand's Value: 8 for register numbers, rm, pred and succ, 64 for other numbers."""
        return 8 if self.is_register or self.name in ("rm", "pred", "succ") else 64

    def extract(self, raw: Value) -> Value:
        """The operand of the 32-bit instruction `raw`: `width` bits, scaled, sign-extended, mapped."""
        if self.fixed is not None:
            return const(self.width, self.fixed)
        value = const(32, 0)
        for part in self.parts:
            piece = (raw >> part.source) & ((1 << part.width) - 1)
            value = value | (piece << part.target)
        top = max(part.target + part.width for part in self.parts)
        if self.signed and top < 32:
            value = (value << (32 - top)).sar(32 - top)
        value = value + self.base
        if self.kind == "xd" and self.base == 0:
            value = select(value == 0, X0_SINK, value)
        if self.width < 32:
            return value.trunc(self.width)
        return value.sext(self.width) if self.signed else value.zext(self.width)

    def decode(self, raw: int) -> int:
        """As `extract`, on Python ints: the number, signed where the operand is."""
        value = self.extract(const(32, raw))
        return value.signed if self.signed else int(value)


@dataclass(frozen=True, slots=True)
class Insn:
    """One row of the instruction table.

    A 16- or 32-bit word is this instruction if word & mask == match and for no pair of `excluded`
    word & pair[0] == pair[1]. `operands` stand in the order of the function's parameters after `h`.
    """

    name: str
    encoding: str
    extension: str
    length: int
    mask: int
    match: int
    excluded: tuple[tuple[int, int], ...]
    operands: tuple[Operand, ...]
    function: Semantics

    def matches(self, raw: int) -> bool:
        return raw & self.mask == self.match and not any(raw & m == v for m, v in self.excluded)

    @property
    def handler(self) -> tuple[str, int, tuple[tuple[str, int], ...]]:
        """Instructions with equal handlers can share native code: function, length and fixed operands."""
        fixed = tuple((o.name, o.fixed) for o in self.operands if o.fixed is not None)
        function = f"{self.function.__module__}.{self.function.__qualname__}"
        return function, self.length, fixed


class DescriptionError(Exception):
    """An encoding row that cannot be right."""


#: The attribute under which `insn` leaves rows on a function.
ROWS = "instruction_rows"


def insn(name: str, encoding: str, unless: tuple[str, ...] = ()) -> Callable[[F], F]:
    """The function below is the instruction `name`.

    unless: reserved or otherwise used encodings, as "field=value" or "rd=0,rs2=0" (both at once).
    """

    def mark(function: F) -> F:
        extension = function.__module__.rpartition(".")[2]
        row = make(name, encoding, function, extension, unless, {})
        function.__dict__.setdefault(ROWS, []).append(row)
        return function

    return mark


def alias(
    name: str, encoding: str, function: Semantics, unless: tuple[str, ...] = (), **operands: str | int
) -> Insn:
    """Another encoding of an existing meaning, as compressed instructions are.

    operands: where a parameter of `function` comes from, if not from the field of its name: another field
    ("rd") or a constant (2).
    """
    caller = inspect.currentframe()
    assert caller is not None
    assert caller.f_back is not None
    extension = str(caller.f_back.f_globals["__name__"]).rpartition(".")[2]
    return make(name, encoding, function, extension, unless, operands)


def rows_of(namespace: dict[str, Any]) -> list[Insn]:
    """All rows of an extension's module: those on its functions and those in its list ALIASES."""
    rows: list[Insn] = []
    for item in namespace.values():
        if callable(item) and getattr(item, "__module__", None) == namespace["__name__"]:
            rows += getattr(item, ROWS, [])
    rows += namespace.get("ALIASES", [])
    return rows


def make(
    name: str,
    encoding: str,
    function: Semantics,
    extension: str,
    unless: tuple[str, ...],
    mapping: dict[str, str | int],
) -> Insn:
    """Build a row. DescriptionError if widths do not add up or a parameter has no field."""
    size, mask, match, fields = _parse(name, encoding)
    parameters = list(inspect.signature(function).parameters)[1:]
    operands = tuple(_operand(name, p, mapping.get(p, p), fields) for p in parameters)
    excluded = tuple(_exclusion(name, condition, fields) for condition in unless)
    return Insn(name, encoding, extension, size // 8, mask, match, excluded, operands, function)


def _parse(name: str, encoding: str) -> tuple[int, int, int, dict[str, tuple[Part, ...]]]:
    tokens = []
    for text in encoding.split():
        token = _TOKEN.fullmatch(text)
        if token is None:
            raise DescriptionError(f"{name}: cannot read {text!r}")
        tokens.append(token)
    size = sum(_token_width(token) for token in tokens)
    if size not in (16, 32):
        raise DescriptionError(f"{name}: the encoding has {size} bits")
    position, mask, match = size, 0, 0
    fields: dict[str, tuple[Part, ...]] = {}
    for token in tokens:
        width = _token_width(token)
        position -= width
        if token["bits"]:
            mask |= ((1 << width) - 1) << position
            match |= int(token["bits"], 2) << position
        else:
            ranges = _ranges(token["list"]) if token["list"] else [(width - 1, 0)]
            at = position + width
            parts = []
            for high, low in ranges:
                at -= high - low + 1
                parts.append(Part(at, low, high - low + 1))
            fields[token["name"]] = fields.get(token["name"], ()) + tuple(parts)
    if (match & 3 == 3) != (size == 32):
        raise DescriptionError(f"{name}: the low bits do not agree with the length")
    return size, mask, match, fields


def _token_width(token: re.Match[str]) -> int:
    if token["bits"]:
        return len(token["bits"])
    if token["list"]:
        return sum(high - low + 1 for high, low in _ranges(token["list"]))
    if token["name"] not in _FIELD_WIDTHS:
        raise DescriptionError(f"field {token['name']!r} needs a bit list")
    return _FIELD_WIDTHS[token["name"]]


def _ranges(bit_list: str) -> list[tuple[int, int]]:
    pairs = [part.split(":") for part in bit_list.split("|")]
    return [(int(pair[0]), int(pair[-1])) for pair in pairs]


def _operand(name: str, parameter: str, source: str | int, fields: dict[str, tuple[Part, ...]]) -> Operand:
    kind = _PARAMETER_KINDS.get(parameter)
    if kind is None:
        raise DescriptionError(f"{name}: parameter {parameter!r} is no operand")
    if isinstance(source, int):
        return Operand(parameter, kind, (), 0, 1, fixed=X0_SINK if kind == "xd" and source == 0 else source)
    register = source.removeprefix("f") if kind == "f" else source
    for field in (source, register, register + "'", "u" + source):
        if field in fields:
            break
    else:
        raise DescriptionError(f"{name}: no field for {parameter!r} in the encoding")
    parts = fields[field]
    if kind == "s" and field.startswith("u"):
        kind = "u"
    low = min(part.target for part in parts)
    top = max(part.target + part.width for part in parts)
    return Operand(parameter, kind, parts, top - low, 1 << low, base=8 if field.endswith("'") else 0)


def _exclusion(name: str, condition: str, fields: dict[str, tuple[Part, ...]]) -> tuple[int, int]:
    mask = value = 0
    for equation in condition.split(","):
        field, _, number = equation.partition("=")
        if field not in fields:
            raise DescriptionError(f"{name}: no field {field!r} to exclude")
        for part in fields[field]:
            mask |= ((1 << part.width) - 1) << part.source
            value |= ((int(number) >> part.target) & ((1 << part.width) - 1)) << part.source
    return mask, value
