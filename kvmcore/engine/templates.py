"""Templates: machine code of one instruction each, whose operands are yet to be put in (template_assembler.py does that).

Made from the semantics when the image is built: the traces are those of the interpreter's handlers, but an operand is the
address of a symbol that nobody defines, so LLVM's relocations say where it has to go. A template falls through to the next
instruction. It has the handlers' parameters in the handlers' registers (`HANDLER_PARAMETERS`), with two differences: `ip`
stays at the page's first record, and `ic` counts only up to the last leader; how far the instruction is from there is a
constant. `a0` is the result of the instruction before; `gd` what an access by the same pointer has found in the TLB, for all
that share its look. Whatever is not the plain case (a trap, an odd rounding mode) leaves before anything has happened, by
`exit`, and the interpreter does that instruction from its beginning; after a TLB miss the template may run again instead
(code_pages.refill_function). What would need a call has no template. Called by build.py only.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NoReturn

from kvmcore.engine import hart_state
from kvmcore.engine import template_assembler as assembler
from kvmcore.engine.interpreter import Handler, handlers
from kvmcore.engine.link import R_8, R_32, R_32S, R_64, R_PC32, R_PLT32, Piece, Relocation
from kvmcore.engine.native_hart import PAGE_MASK, HandlerHart, load, param, store, tracer
from kvmcore.engine.template_bytes import shorter
from kvmcore.ir.llvm_text import HANDLER_PARAMETERS, Emitter
from kvmcore.ir.trace import Block, PathEnd, Tracer
from kvmcore.ir.value import Value, as_value, u64
from kvmcore.isa.traps import Trap

#: Where jumps go: the next instruction; the interpreter; a near branch's target; the code that Work.target is the place of;
#: what fills the TLB for a load, for a store (a1: the address).
_NEXT, _EXIT, _TAKEN, _TARGET = "t_next", "t_exit", "t_taken", "t_target"
_LOAD_MISS, _STORE_MISS = "t_load_miss", "t_store_miss"
_JUMPS = (_NEXT, _EXIT, _TAKEN, _TARGET, _LOAD_MISS, _STORE_MISS)
#: Those that are put in when the page's code is there, by what stands there then.
_LATER = {
    _EXIT: assembler.LATER_EXIT,
    _TAKEN: assembler.LATER_TAKEN,
    _LOAD_MISS: assembler.LATER_LOAD_MISS,
    _STORE_MISS: assembler.LATER_STORE_MISS,
}
_LEAVING = (_EXIT, _LOAD_MISS, _STORE_MISS)
#: Handlers of the image that templates go to.
_HANDLERS = ("resume", "refill_load", "refill_store", "poll", "fetch_miss")
#: What code that is copied cannot do, for it has no stack and no neighbours.
_IMPOSSIBLE = frozenset({"call", "return", "leave", "syscall", "ticks", "pause"})
_EFFECTS = frozenset({"store", "atomicrmw", "cmpxchg", "mxcsr_write"})
#: Functions that are worth a template for each way to come by their operands.
_FREQUENT = ("rv64i.", "rv64m.mul", "rv64f.flw", "rv64f.fsw", "rv64d.fld", "rv64d.fsd")


_JUMPING = ("rv64i.jal.", "rv64i.jalr.")
_WAYS = (assembler.MEM, assembler.ZERO, assembler.LAST)
_SHARES = (assembler.ALONE, assembler.LEAD, assembler.FOLLOW)


class NoTemplate(Exception):
    """This instruction is the interpreter's."""


def _symbol(name: str) -> Value:
    """A number that is put in later: "w_", "n_" (signed) or "l_" (of 64 bits) and a word of Work; "s_" or "u_" (not negative)
    and an operand.
    """
    return tracer().pure("address", (), 64, (name,))


@dataclass(frozen=True, slots=True)
class _Register:
    """A register operand: `way` is how the instruction comes by it (template_assembler.MEM and so on)."""

    name: str
    way: int


class _Registers:
    """x or f."""

    def __init__(self, h: TemplateHart, name: str) -> None:
        self._h, self._name = h, name

    def _at(self, number: object) -> Value:
        if not isinstance(number, _Register):
            raise NoTemplate("a register's number is computed")
        return self._h.s + _symbol(f"u_{number.name}") + hart_state.offset(self._name)

    def __getitem__(self, number: object) -> Value:
        at = self._at(number)
        assert isinstance(number, _Register)
        if number.way == assembler.MEM:
            value = load(at, kind="volatile" if self._h.immediate else "plain")  # else the immediate gets 64 bits, for itself
        else:
            value = u64(0) if number.way == assembler.ZERO else self._h.a0
        if number.name == "rs1":
            self._h.pointer = value
        return value

    def __setitem__(self, number: object, value: Value) -> None:
        at = self._at(number)
        assert isinstance(number, _Register)
        if self._name == "x":
            self._h.result = value
        if number.way == assembler.MEM:
            store(at, value)


class TemplateHart(HandlerHart):
    """One instruction of template code."""

    def __init__(self, name: str, length: int = 4, near: bool = True, share: int = assembler.ALONE) -> None:
        super().__init__(name, length, "fast", near)
        self.gd, self.share = param("gd"), share
        self.pointer: Value | None = None
        self.access = (0, 0)
        self.x, self.f = _Registers(self, "x"), _Registers(self, "f")  # type: ignore[assignment]
        self.result: Value | None = None
        self.immediate = False

    @property
    def pc(self) -> Value:
        return (self.ip - self.ab).sar(2) + _symbol("w_offset")

    def to(self, where: str, ip: Value | None = None, ic: Value | None = None, **others: Value) -> NoReturn:
        """Go to a symbol; others: a0, a1, gd, as far as they matter."""
        words = (ip if ip is not None else self.ip, self.s, self.ab, self.base, ic if ic is not None else self.ic, self.tlb)
        tracer().effect("tail", (*words, *others.values()), 0, (where, *others))
        raise PathEnd

    def tail(self, handler: str, a0: Value | int = 0, a1: Value | int = 0, ic: Value | None = None) -> NoReturn:
        if handler in _HANDLERS and ic is not None:  # of a jump, which is done
            self.to(handler, None, ic, a0=as_value(a0, 64))
        self.to(_EXIT)

    def counted(self) -> Value:
        """`ic`, exact, with this instruction."""
        return self.ic + _symbol("w_count")

    def finish(self) -> NoReturn:
        if self._refetch:
            raise NoTemplate("translations change")
        self.to(_NEXT, gd=self.gd, **({} if self.result is None else {"a0": self.result}))

    def branch(self, offset: Value) -> NoReturn:
        if self.near:
            self.to(_TAKEN)
        self.jump(self.pc + offset)

    def jump(self, target: Value) -> NoReturn:
        ic = self.counted()
        if ic >= self.get("limit"):
            self.tail("poll", target, ic=ic)
        self.go(target, ic)

    def miss(self, address: Value, write: bool) -> NoReturn:
        self.to(_STORE_MISS if write else _LOAD_MISS, a1=address, gd=self.gd)

    def load(self, address: Value, size: int) -> Value:
        self.access = (1, size)
        return load(self._shared_host(address, size, False), 8 * size, "volatile", 1)

    def store(self, address: Value, value: Value) -> None:
        self.access = (2, value.width // 8)
        store(self._shared_host(address, value.width // 8, True), value, "volatile", 1)

    def _shared_host(self, address: Value, size: int, write: bool) -> Value:
        """Host address; with a look for all who share it, or by the look that is done."""
        if self.share == assembler.ALONE:
            return self._host(address, size, write)
        if self.share == assembler.LEAD:
            assert self.pointer is not None
            first, last = self.pointer + _symbol("n_low"), self.pointer + _symbol("n_high")
            entry = self.tlb + ((first >> 7) & ((hart_state.DATA_TLB_ENTRIES - 1) << 5))
            if (last & PAGE_MASK) != load(entry + (8 if write else 0)):
                self.miss(first, write)
            self.gd = load(entry + 16)
        return address + self.gd

    def exit(self, kind: str) -> NoReturn:
        self.to(_EXIT)

    def trap(self, trap: Trap) -> NoReturn:
        self.to(_EXIT)


# -- what is no instruction's ------------------------------------------------------------------------------


def _sync(h: TemplateHart) -> None:
    """`ic` becomes exact: code that others jump to begins."""
    h.to(_NEXT, None, h.counted())


def _go(h: TemplateHart) -> None:
    """On by a record: what is there is not this code's."""
    h.dispatch(h.ip + _symbol("w_to"), h.ab, h.counted())


def _leave(h: TemplateHart) -> None:
    h.to("resume", a0=_symbol("w_packed"))


def _load_miss(h: TemplateHart) -> None:
    h.to("refill_load", a0=_symbol("l_again"), a1=h.a1, gd=h.gd)


def _store_miss(h: TemplateHart) -> None:
    h.to("refill_store", a0=_symbol("l_again"), a1=h.a1, gd=h.gd)


def _taken(h: TemplateHart) -> None:
    h.to(_TARGET, None, h.counted())


def _back(h: TemplateHart) -> None:
    ic = h.counted()
    if ic >= h.get("limit"):
        h.to(_EXIT)
    h.dispatch(h.ip + _symbol("w_to"), h.ab, ic)


def _entry(h: TemplateHart) -> None:
    """From a record."""
    h.to(_TARGET, h.ip - _symbol("w_to"))


_STUBS: dict[str, Callable[[TemplateHart], None]] = dict(
    zip(assembler.STUBS, (_sync, _go, _leave, _taken, _back, _entry, _load_miss, _store_miss), strict=True)
)


# -- tracing ---------------------------------------------------------------------------------------------------


def _operands(handler: Handler, ways: Mapping[str, int]) -> Iterator[object]:
    for operand in handler.rows[0].operands:
        if operand.name in handler.constants:
            yield handler.constants[operand.name]
        elif operand.is_register:
            yield _Register(operand.name, ways.get(operand.name, assembler.MEM))
        else:
            value = _symbol(f"{'s' if handler.places[operand.name].signed else 'u'}_{operand.name}")
            yield value.trunc(8) if operand.width == 8 else value


def _trace(handler: Handler, near: bool, ways: Mapping[str, int], share: int) -> tuple[Block, tuple[int, int]]:
    """And its access to memory: 1 load, 2 store, and its size. NoTemplate: the instruction cannot have one."""
    if "csr" in handler.constants:
        raise NoTemplate("seldom, and their checks are long")
    recorder = Tracer()
    accesses = {(0, 0)}

    def body() -> None:
        h = TemplateHart(handler.name, handler.length, near, share)
        h.immediate = not handler.branches and any(place.signed for place in handler.places.values())
        try:
            handler.rows[0].function(h, *_operands(handler, ways))
            accesses.add(h.access)
            h.finish()
        except Trap as trap:
            h.trap(trap)

    recorder.trace(body)
    if not _goes_on(recorder.root, False):
        raise NoTemplate("it always leaves")
    return recorder.root, max(accesses)


def _goes_on(block: Block, done: bool) -> bool:
    """Whether some path from here does not leave; `done`: something has been changed on the way here. NoTemplate: a path
    leaves that has changed something, or does what templates cannot.
    """
    for op in block.ops:
        if op.opcode in _IMPOSSIBLE:
            raise NoTemplate(op.opcode)
        if op.opcode == "tail" and op.attrs and op.attrs[0] in _LEAVING:
            if done:
                raise NoTemplate("it would be done twice")
            return False
        done = done or op.opcode in _EFFECTS
    if block.if_true is None or block.if_false is None:
        return True
    ways = [_goes_on(successor, done) for successor in (block.if_true, block.if_false)]
    return any(ways)


def _asks_about_symbols(block: Block, symbols: frozenset[int | str]) -> bool:
    """Whether an operand is compared with a constant: to LLVM the address of a symbol is never 0."""
    known = set(symbols)
    for op in block.ops:
        named = {arg.key[1] for arg in op.args if arg.const is None}
        if op.opcode == "address" or (op.opcode in ("trunc", "zext", "sext") and op.args[0].key[1] in known):
            assert op.result is not None
            known.add(op.result.key[1])
        elif op.opcode in _COMPARISONS and any(arg.const is not None for arg in op.args) and named & known:
            return True
    successors = [successor for successor in (block.if_true, block.if_false) if successor is not None]
    return any(_asks_about_symbols(successor, frozenset(known)) for successor in successors)


_COMPARISONS = frozenset(("eq", "ne", "ult", "ule", "slt", "sle"))


def _touches_memory(block: Block) -> bool:
    """Whether there is an access of the guest's, which need not be aligned."""
    if any(op.opcode in ("load", "store") and op.attrs == ("volatile", 1) for op in block.ops):
        return True
    return any(_touches_memory(successor) for successor in (block.if_true, block.if_false) if successor is not None)


def _variants(handler: Handler) -> Iterator[tuple[int, dict[str, int], int]]:
    """(index in Group.variants, ways of the registers, how its access is made)."""
    names = [operand.name for operand in handler.rows[0].operands if operand.name not in handler.constants]
    frequent = handler.name.startswith(_FREQUENT)
    choices = [_WAYS if frequent and name in names else (assembler.MEM,) for name in ("rs1", "rs2")]
    sinks = (0, 1) if handler.name.startswith(_JUMPING) else (0,)
    for share, rs1, rs2, sink in product(_SHARES, *choices, sinks):
        if rs1 == rs2 != assembler.MEM or (share != assembler.ALONE and rs1 == assembler.ZERO):
            continue
        ways = {"rs1": rs1, "rs2": rs2, "rd": assembler.ZERO if sink else assembler.MEM}
        yield assembler.variant(rs1, rs2, sink, share), ways, share


@dataclass(slots=True)
class Made:
    """The templates' LLVM IR, whose functions are named by number, and what the table is made of besides. STUBS come first."""

    text: str
    handlers: dict[int, Handler]
    """Of a template; stubs have none."""
    decisions: dict[int, int]
    """Of a template whose trace has nothing that LLVM makes jumps of."""
    groups: dict[str, tuple[Handler, dict[int, int]]]
    """Name of a handler -> its templates by variant."""
    accesses: dict[str, tuple[int, int]]
    """Name of a handler -> 1 load, 2 store, and its size, for those that may share a look at the TLB."""


def _stub(function: Callable[[TemplateHart], None]) -> None:
    function(TemplateHart(""))


def trace_all() -> Made:
    """All templates."""
    emitter = Emitter(likely_false=True)
    made = Made("", {}, {}, {}, {})
    known: dict[str, int] = {}
    count = 0
    for function in _STUBS.values():
        recorder = Tracer()
        recorder.trace(partial(_stub, function))
        emitter.handler(f"t{count}", recorder.root)
        made.decisions[count] = _decisions(recorder.root)
        count += 1
    for handler in handlers().values():
        for name, near in ((handler.name, True), (handler.name + ".far", False)):
            if not near and not handler.branches:
                continue
            try:
                for index, ways, share in _variants(handler):
                    if share != assembler.ALONE and name not in made.accesses:
                        continue
                    root, access = _trace(handler, near, ways, share)
                    if ways["rs1"] == assembler.ZERO and _touches_memory(root):
                        continue  # an address that is all immediate: LLVM makes it relative to the code
                    if _asks_about_symbols(root, frozenset()):
                        if not any(ways.values()):
                            raise NoTemplate("LLVM would answer for it")
                        continue
                    key = _shape(root) + repr(handler.places)
                    if key not in known:
                        known[key] = count
                        emitter.handler(f"t{count}", root)
                        made.handlers[count] = handler
                        if name.startswith(_FREQUENT):
                            made.decisions[count] = _decisions(root)
                        count += 1
                    made.groups.setdefault(name, (handler, {}))[1][index] = known[key]
                    if access[0] and name.startswith(_FREQUENT):
                        made.accesses[name] = access
            except NoTemplate:
                continue
    made.text = _module(emitter)
    return made


def _shape(block: Block) -> str:
    """Equal for traces that do the same."""
    ops = ";".join(f"{op.opcode}{op.attrs}{[arg.key for arg in op.args]}" for op in block.ops)
    if block.condition is None or block.if_true is None or block.if_false is None:
        return ops
    return f"{ops}?{block.condition.key}({_shape(block.if_true)})({_shape(block.if_false)})"


def _module(emitter: Emitter) -> str:
    """Symbols' ranges let LLVM take instructions with 32 bits for them; `optsize` makes a branch to a jump a jump."""
    text = emitter.module().replace("attributes #0 = {", "attributes #0 = { optsize")
    types = ", ".join(["i64"] * len(HANDLER_PARAMETERS))
    lines = [f"declare preserve_nonecc void @{name}({types})" for name in (*_JUMPS, *_HANDLERS)]
    for name in sorted(set(re.findall(r"@([wnsul]_\w+)", text))):
        lines.append(f"@{name} = external global i8, align 1, !absolute_symbol !{_RANGES[name[0]]}")
    ranges = ["!0 = !{i64 0, i64 2147483648}", "!1 = !{i64 -2147483648, i64 2147483648}", "!2 = !{i64 -1, i64 -1}"]
    return "\n".join([*lines, text, *ranges, ""])


_RANGES = {"w": 0, "u": 0, "n": 1, "s": 1, "l": 2}


# -- the table -----------------------------------------------------------------------------------------------


def table(made: Made, pieces: Mapping[str, Piece], functions: Mapping[str, int]) -> bytes:
    """Table of template_assembler.py. functions: the image's, relative to what records are relative to."""
    data = bytearray(ctypes.sizeof(assembler.Table))
    templates = []
    alone = {number for number in range(len(pieces)) if _stands_alone(pieces[f"t{number}"])}
    for number in range(len(pieces)):
        piece, handler = pieces[f"t{number}"], made.handlers.get(number)
        decisions = made.decisions.get(number)
        templates.append(_template(data, piece, handler, decisions, functions) if number in alone else assembler.Template())
    templates_at = _append(data, b"".join(bytes(template) for template in templates))
    groups = [bytes(ctypes.sizeof(assembler.Group))]  # number 0: no template
    places = bytearray(2 * (max(functions[name] for name in made.groups) // _UNIT + 1))
    for name, (handler, variants) in made.groups.items():
        if not alone.issuperset(variants.values()):
            continue
        place, odd = divmod(functions[name], _UNIT)
        assert not odd, f"{name} is not aligned"
        places[2 * place : 2 * place + 2] = len(groups).to_bytes(2, "little")
        groups.append(bytes(_group(handler, variants, name, made.accesses.get(name, (0, 0)))))
    groups_at = _append(data, b"".join(groups))
    head = assembler.Table(map=_append(data, bytes(places)), groups=groups_at, templates=templates_at)
    data[: ctypes.sizeof(head)] = bytes(head)
    return bytes(data)


def _stands_alone(piece: Piece) -> bool:
    """Whether the code has no constants elsewhere, as some of floating point has."""
    return all(relocation.symbol in _KNOWN or relocation.symbol[:2] in _NUMBERS for relocation in piece.relocations)


_KNOWN = frozenset((*_JUMPS, *_HANDLERS))
_NUMBERS = tuple(f"{sort}_" for sort in _RANGES)
_UNIT = 16
"""Bytes that handlers are aligned to."""


def _append(data: bytearray, what: bytes) -> int:
    data += bytes(-len(data) % 8)
    at = len(data)
    data += what
    return at


def _template(
    data: bytearray, piece: Piece, handler: Handler | None, decisions: int | None, functions: Mapping[str, int]
) -> assembler.Template:
    """decisions: of the trace; None: LLVM may have made some of its own."""
    code, relocations = piece.code, list(piece.relocations)
    last = relocations[-1]
    if last.symbol == _NEXT and last.offset == len(code) - 4 and code[-5] == 0xE9:  # falls through
        code, relocations = code[:-5], relocations[:-1]
    straight = decisions is not None and _is_straight(code, relocations, decisions)
    if straight:
        code, relocations = shorter(code, relocations)
    patches = b"".join(
        bytes(_patch(relocation, handler, functions, code if straight else b"")) for relocation in relocations
    )
    result = assembler.Template(length=len(code), count=len(relocations), patches=_append(data, patches))
    result.code = _append(data, code + bytes(16))
    return result


def _is_straight(code: bytes, relocations: list[Relocation], decisions: int) -> bool:
    """Whether each decision of the trace has become a jump out of the template, so that none is over a place inside."""
    out = sum(relocation.type in (R_PC32, R_PLT32) and code[relocation.offset - 2] == 0x0F for relocation in relocations)
    return out == decisions and not any(relocation.symbol == _NEXT for relocation in relocations)


def _decisions(block: Block) -> int:
    successors = [successor for successor in (block.if_true, block.if_false) if successor is not None]
    return len(successors) // 2 + sum(map(_decisions, successors))


def _shorten(patch: assembler.Patch, code: bytes) -> None:
    """If the place is a displacement behind a base, or an immediate, there is an encoding with one byte for it."""
    before = bytes(3) + code[: patch.at]
    modrm, sib = before[-1], before[-2] & 0xC7 == 0x84
    if sib and before[-3] in _SHORT_DISPLACEMENT:
        patch.back, patch.flip = 2, 0xC0
    elif modrm & 0xC0 == 0x80 and modrm & 7 != 4 and before[-2] in _SHORT_DISPLACEMENT:
        patch.back, patch.flip = 1, 0xC0
    elif modrm & 0xC0 == 0xC0 and before[-2] == 0x81:
        patch.back, patch.flip = 2, 0x02


_SHORT_DISPLACEMENT = frozenset(
    bytes.fromhex("03 0B 13 1B 23 2B 33 39 3B 63 83 85 88 89 8A 8B 8D AF B6 B7 BE BF C7 F6 F7")
)
"""Opcodes whose operand may be memory: moves, lea, arithmetic, shifts of BMI2."""


def _patch(relocation: Relocation, handler: Handler | None, functions: Mapping[str, int], code: bytes) -> assembler.Patch:
    """code: b"" if nothing can be shortened."""
    at, kind, symbol, addend = relocation
    patch = assembler.Patch(at=at, addend=addend, factor=1, kind=assembler.WORD, bits=8, size={R_64: 8, R_8: 1}.get(kind, 4))
    if kind in (R_PC32, R_PLT32):
        patch.relative = 1
        if symbol in functions:
            patch.addend, patch.word = addend + functions[symbol], assembler.WORD_OF["zero"]
        elif symbol in _LATER and handler is not None:
            assert addend == -4
            patch.kind, patch.word = assembler.LATER, _LATER[symbol]
        else:
            assert symbol in _JUMPS, f"{symbol} is relative to the code"
            patch.word = assembler.WORD_OF[{_NEXT: "end", _EXIT: "exit", _TARGET: "target"}[symbol]]
        return patch
    assert kind in (R_64, R_32, R_32S, R_8), f"relocation of type {kind} to {symbol}"
    sort, name = symbol.split("_", 1)
    if code and kind == R_32S:  # signed: no move into 32 bits of a register
        _shorten(patch, code)
    if sort in "wnl":
        patch.word = assembler.WORD_OF[name]
        return patch
    assert handler is not None
    place = handler.places[name]
    register = next(operand for operand in handler.rows[0].operands if operand.name == name).is_register
    patch.kind, patch.factor = assembler.OPERAND, 8 if register else place.scale
    patch.shift, patch.bits, patch.signed = 8 * place.byte + place.shift, place.bits, place.signed
    return patch


def _group(handler: Handler, variants: Mapping[int, int], name: str, access: tuple[int, int]) -> assembler.Group:
    group = assembler.Group()
    for share, rs1, rs2, sink in product(_SHARES, _WAYS, _WAYS, (0, 1)):
        # An operand from the hart's block is always right, and so is a look of its own.
        nearest = product((share, assembler.ALONE), (sink, 0), (rs1, assembler.MEM), (rs2, assembler.MEM))
        indices = (assembler.variant(one, two, drop, how) for how, drop, one, two in nearest)
        found = next(variants[index] for index in indices if index in variants)
        group.variants[assembler.variant(rs1, rs2, sink, share)] = found
    if access[0] and all(assembler.variant(assembler.MEM, assembler.MEM, 0, share) in variants for share in _SHARES):
        group.access, group.size = access
        place = handler.places["imm"]
        group.shift, group.bits, group.scale, group.signed = 8 * place.byte + place.shift, place.bits, place.scale, place.signed
    for operand in handler.rows[0].operands:
        if operand.name in ("rs1", "rs2") and operand.kind == "x":
            setattr(group, operand.name, handler.places[operand.name].byte)
        if operand.name == "rd":
            group.rd, group.result = handler.places["rd"].byte, 1
    group.ends = handler.name.startswith(_JUMPING)
    if handler.branches and not name.endswith(".far"):
        place = handler.places["imm"]
        group.shift, group.bits, group.scale = 8 * place.byte + place.shift, place.bits, place.scale
    return group
