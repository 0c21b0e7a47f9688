"""Tier 1: a handler for every instruction, and the decoder that chooses it (DESIGN.md section 4).

A record is 8 bytes: the handler's offset in the image (32 bits), then 32 bits of operands: one byte for each
register and small number in order, the rest for the one large number. Instructions with the same function and
length share a handler. Branches have two: for targets in their page, where the next record is plain
arithmetic, and for others. Called by build.py only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd

from kvmcore.engine.code_pages import handler_offset
from kvmcore.engine.fusion import PAIRS
from kvmcore.engine.native_hart import FunctionHart, HandlerHart, call, load, param, returns
from kvmcore.engine.routines import FUNCTIONS, HANDLERS
from kvmcore.ir.llvm_text import Emitter
from kvmcore.ir.trace import PathEnd, Tracer
from kvmcore.ir.value import Value, const, select, u64
from kvmcore.isa.csrs import CSRS
from kvmcore.isa.describe import Insn, Operand
from kvmcore.isa.paging import Retry
from kvmcore.isa.table import INSTRUCTIONS
from kvmcore.isa.traps import Trap, illegal_instruction
from kvmcore.isa.zicsr import SEED


@dataclass(slots=True)
class Place:
    """Where an operand is in the record: byte offset, bits, and what its number is divided by."""

    byte: int
    bits: int
    shift: int
    signed: bool
    scale: int
    width: int


@dataclass(slots=True)
class Handler:
    """A native handler: one semantics function for one instruction length."""

    name: str
    rows: list[Insn] = field(default_factory=list)
    places: dict[str, Place] = field(default_factory=dict)
    constants: dict[str, Value] = field(default_factory=dict)
    branches: bool = False

    @property
    def length(self) -> int:
        return self.rows[0].length


def handlers() -> dict[tuple[str, int, int], Handler]:
    """All handlers, by (name of the function, length, value of the operand it is specialized for or -1)."""
    found: dict[tuple[str, int, int], Handler] = {}
    for row in INSTRUCTIONS:
        operand, values = _special(row)
        for value in values:
            key = (_function(row), row.length, value)
            if key not in found:
                found[key] = Handler(f"{_function(row)}.{row.length}" + (f".{operand}{value:x}" if operand else ""))
                if operand:
                    found[key].constants[operand] = const(64 if operand == "csr" else 8, value)
            found[key].rows.append(row)
    for handler in found.values():
        _place(handler)
        handler.branches = any(o.name == "imm" and o.scale == 2 for o in handler.rows[0].operands)
    return found


def _function(row: Insn) -> str:
    return f"{row.function.__module__.rpartition('.')[2]}.{row.function.__name__}"


#: Rounding modes with handlers of their own: dynamic, to nearest, towards zero. The reference does the
#: others.
ROUNDINGS = (7, 0, 1)


def _special(row: Insn) -> tuple[str, Sequence[int]]:
    """The operand whose every value has a handler of its own, and the values; ("", [-1]) if there is none."""
    names = [operand.name for operand in row.operands]
    if "rm" in names:
        return "rm", ROUNDINGS
    if "csr" not in names:
        return "", [-1]
    replaces = row.name.startswith("csrrw")
    return "csr", [*(csr.number for csr in CSRS if csr.writable or not replaces), SEED]


def _small(operand: Operand) -> bool:
    return operand.is_register or operand.width == 8 or (not operand.signed and operand.name in ("shamt", "zimm"))


def _place(handler: Handler) -> None:
    """Lay the operands out in the record's four bytes."""
    byte = 4
    names = [o.name for o in handler.rows[0].operands if o.name not in handler.constants]
    large = None
    for index, name in enumerate(names):
        variants = [next(o for o in row.operands if o.name == name) for row in handler.rows]
        if _small(variants[0]):
            if byte == 8:  # rs3 and rm of the R4 forms share a byte
                last = handler.places[names[index - 1]]
                last.bits = 5
                handler.places[name] = Place(7, 3, 5, False, 1, variants[0].width)
                continue
            handler.places[name] = Place(byte, 8, 0, False, 1, variants[0].width)
            byte += 1
        else:
            assert large is None, f"{handler.name}: two large operands"
            large = (name, variants)
    if large is not None:
        name, variants = large
        scale = 0
        for operand in variants:
            scale = gcd(scale, operand.scale if operand.fixed is None else operand.fixed)
        signed = any(operand.signed for operand in variants)
        bits = 8 * (8 - byte)
        assert bits >= 8, f"{handler.name}: no room for {name}"
        handler.places[name] = Place(byte, bits, 0, signed, scale or 1, variants[0].width)


def read_operand(h: HandlerHart, place: Place) -> Value:
    """The operand from the record at ip."""
    if place.bits == 24:
        word = load(h.ip + 4, 32)
        value = word.sar(8) if place.signed else word >> 8
        value = value.sext(64) if place.signed else value.zext(64)
    else:
        size = max(place.bits, 8)
        value = load(h.ip + place.byte, size, "plain", 1)
        if place.bits < 8:
            value = (value >> place.shift) & ((1 << place.bits) - 1)
        if place.width == 64:
            value = value.sext(64) if place.signed else value.zext(64)
    return value * place.scale if place.scale != 1 else value


def pack_operands(row: Insn, handler: Handler, raw: Value) -> Value:
    """The record's upper 32 bits for this instruction word, as a 64-bit Value already in place."""
    word = u64(0)
    for operand in row.operands:
        if operand.name in handler.constants:
            continue
        place = handler.places[operand.name]
        value = operand.extract(raw)
        value = value.zext(64) if value.width < 64 else value
        if place.scale != 1:
            value = value.sar(place.scale.bit_length() - 1)
        bits = place.bits
        word = word | ((value & ((1 << bits) - 1)) << (8 * place.byte + place.shift))
    return word


# -- emission ------------------------------------------------------------------------------------------------


def emit(emitter: Emitter) -> list[str]:
    """All of the interpreter; "decode" first, for records name handlers relative to it.

    Returns the handlers' names.
    """
    names = []
    for name, (routine, at_a0) in HANDLERS.items():
        _emit_handler(emitter, name, routine, at="a0" if at_a0 else "")
        names.append(name)
    _emit_handler(emitter, "illegal", _illegal)
    _emit_handler(emitter, "emulate", _emulate)
    for handler in handlers().values():
        for variant, near in _variants(handler):
            for memory in _memories(handler):
                suffix = ".slow" if memory == "slow" else ""
                _emit_instruction(emitter, handler, variant, near, memory, suffix)
        names.append(handler.name)
    for name, (parameters, function) in FUNCTIONS.items():
        _emit_function(emitter, name, parameters, function)
    _emit_decoder(emitter)
    _emit_pairs(emitter)
    return names


def _emit_pairs(emitter: Emitter) -> None:
    """The handlers of fusion.py's pairs, and @fuse, which finds them."""
    by_name = {handler.name: handler for handler in handlers().values()}
    for first, second in PAIRS:
        tracer = Tracer()
        tracer.trace(partial(_run_pair, by_name[first], by_name[second]))
        emitter.handler(f"{first}-{second}", tracer.root)

    def fuse() -> None:
        """(offset of a handler, of the next one) -> offset of the handler for both, 1 if there is one."""
        a, b = param("p0"), param("p1")
        for first in dict.fromkeys(pair[0] for pair in PAIRS):
            if a == handler_offset(first):
                for other, second in PAIRS:
                    if other == first and b == handler_offset(second):
                        returns(handler_offset(f"{first}-{second}"), 1)
                returns(u64(0))
        returns(u64(0))

    tracer = Tracer()
    tracer.trace(fuse)
    emitter.function("fuse", 2, tracer.root)


def _run_pair(first: Handler, second: Handler) -> None:
    """Both of them, each at its own record: a miss or a trap of the second finds the first one done."""
    h = HandlerHart(first.name, first.length)
    try:
        first.rows[0].function(h, *_operands(h, first))
        h.name, h.length = second.name, second.length
        h.ip, h.ic = h.ip + 4 * first.length, h.ic + 1
        second.rows[0].function(h, *_operands(h, second))
        h.finish()
    except Trap as trap:
        h.trap(trap)


def _variants(handler: Handler) -> Iterator[tuple[str, bool]]:
    yield handler.name, True
    if handler.branches:
        yield handler.name + ".far", False


def _memories(handler: Handler) -> tuple[str, ...]:
    """A function whose trace touches memory gets a slow twin; found out by tracing it."""
    probe = Tracer()
    used = False

    class Probe(HandlerHart):
        def _host(self, address: Value, size: int, write: bool) -> Value:
            nonlocal used
            used = True
            return super()._host(address, size, write)

    probe.trace(lambda: _run(Probe(handler.name), handler))
    return ("fast", "slow") if used else ("fast",)


def _operands(h: HandlerHart, handler: Handler) -> list[Value]:
    return [
        handler.constants[o.name] if o.name in handler.constants else read_operand(h, handler.places[o.name])
        for o in handler.rows[0].operands
    ]


def _run(h: HandlerHart, handler: Handler) -> None:
    try:
        handler.rows[0].function(h, *_operands(h, handler))
        h.finish()
    except Trap as trap:
        h.trap(trap)


def _emit_instruction(emitter: Emitter, handler: Handler, name: str, near: bool, memory: str, suffix: str) -> None:
    tracer = Tracer()
    tracer.trace(lambda: _run(HandlerHart(name, handler.length, memory, near), handler))
    emitter.handler(name + suffix, tracer.root)


def _emit_handler(emitter: Emitter, name: str, function: Callable[[HandlerHart], None], at: str = "") -> None:
    tracer = Tracer()

    def body() -> None:
        h = HandlerHart(name, memory="slow", at=at)
        try:
            function(h)
        except Trap as trap:
            h.trap(trap)

    tracer.trace(body)
    emitter.handler(name, tracer.root)


def _emit_function(emitter: Emitter, name: str, parameters: int, function: Callable[[FunctionHart], None]) -> None:
    tracer = Tracer()
    access = name.removeprefix("walk_")
    fault = {"load": 5, "store": 7, "fetch": 1}.get(access, 0)

    def body() -> None:
        h = FunctionHart()
        h.access_fault = fault
        try:
            function(h)
        except Trap as trap:
            h.trap(trap)
        except Retry:
            returns(*call(name, *(param(f"p{index}") for index in range(parameters))))

    tracer.trace(body)
    emitter.function(name, parameters, tracer.root)


def _emulate(h: HandlerHart) -> None:
    h.exit("EMULATE")


def _illegal(h: HandlerHart) -> None:
    raise illegal_instruction()


# -- the decoder ---------------------------------------------------------------------------------------------


def _bucket(row: Insn) -> tuple[int, int]:
    """(mask, match) of the bits that choose a bucket: opcode, or quadrant and funct3 of short ones."""
    mask = 0x7F if row.length == 4 else 0xE003
    return mask, row.match & mask


def _emit_decoder(emitter: Emitter) -> None:
    """decode_word(raw, offset in page) -> record. One function per bucket, so that each stays small."""
    found = handlers()
    buckets: dict[tuple[int, int], list[Insn]] = defaultdict(list)
    for row in INSTRUCTIONS:
        buckets[_bucket(row)].append(row)
    for number, rows in enumerate(buckets.values()):
        groups: dict[int, list[Insn]] = defaultdict(list)
        for row in rows:
            groups[(row.match >> 12) & 7 if row.length == 4 and (row.mask >> 12) & 7 == 7 else 8].append(row)

        def body(groups: dict[int, list[Insn]] = groups) -> None:
            raw = param("p0").trunc(32)
            for funct3, members in groups.items():
                if funct3 == 8:
                    continue
                if raw & 0x7000 == funct3 << 12:
                    _choose(found, members + groups.get(8, []), raw)
            _choose(found, groups.get(8, []), raw)

        tracer = Tracer()
        tracer.trace(body)
        emitter.function(f"decode_{number}", 2, tracer.root)

    def top() -> None:
        raw = param("p0")
        for number, (mask, match) in enumerate(buckets):
            if mask == 0x7F and raw & 0x7F == match:
                returns(*call(f"decode_{number}", raw, param("p1")))
        for number, (mask, match) in enumerate(buckets):
            if mask != 0x7F and raw & 0xE003 == match:
                returns(*call(f"decode_{number}", raw & 0xFFFF, param("p1")))
        returns(handler_offset("illegal"))

    tracer = Tracer()
    tracer.trace(top)
    emitter.function("decode_word", 2, tracer.root)


def _choose(found: dict[tuple[str, int, int], Handler], rows: list[Insn], raw: Value) -> None:
    for row in rows:
        if raw & row.mask == row.match:
            excluded = const(1, 0)
            for mask, match in row.excluded:
                excluded = excluded | (raw & mask == match)
            if excluded:
                continue
            operand, values = _special(row)
            if operand:  # chosen without jumps: LLVM compiles that several times faster than a jump for each value
                field = next(o for o in row.operands if o.name == operand).extract(raw)
                chosen = handler_offset("emulate" if operand == "rm" else "illegal")
                for value in values:
                    handler = found[_function(row), row.length, value]
                    chosen = select(field == value, handler_offset(handler.name), chosen)
                returns(pack_operands(row, handler, raw) | chosen)
            handler = found[_function(row), row.length, -1]
            operands = pack_operands(row, handler, raw)
            if handler.branches:
                imm = next(o for o in row.operands if o.name == "imm").extract(raw)
                if param("p1") + imm >= 4096:
                    returns(operands | handler_offset(handler.name + ".far"))
            returns(operands | handler_offset(handler.name))
    returns(handler_offset("illegal"))


__all__ = ["PathEnd", "emit", "handlers"]
