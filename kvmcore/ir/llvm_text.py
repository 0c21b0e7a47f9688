"""Emission: a decision tree of recorded operations becomes the text of one LLVM function.

Called by the engine's builder (and the translator); the text is parsed elsewhere, so nothing here needs LLVM.
Memory is addressed by 64-bit Values, as in machine code; every access says whether it may be moved ("plain")
or happens exactly where it stands ("volatile"), or is atomic.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from kvmcore.ir.trace import Block, Op
from kvmcore.ir.value import Value

#: The parameters that every handler has, in order. They live in machine registers for as long as guest code
#: runs. The hart's block is in the second one, r13: as a base it costs a byte less than r12.
HANDLER_PARAMETERS = ("ip", "s", "ab", "base", "ic", "tlb", "a0", "a1", "gd")
_HANDLER_TYPES = ", ".join(f"i64 %{name}" for name in HANDLER_PARAMETERS)

_COMPARE = {"eq": "eq", "ne": "ne", "ult": "ult", "ule": "ule", "slt": "slt", "sle": "sle"}
_BINARY = {"add", "sub", "mul", "and", "or", "xor", "shl", "lshr", "ashr", "udiv", "urem", "sdiv", "srem"}
_INTRINSICS = {"ctlz": True, "cttz": True, "ctpop": False, "bswap": False}


def literal(value: Value) -> str:
    """The operand as LLVM writes it, without its type."""
    return (
        str(value.signed)
        if value.const is not None and value.width > 1
        else (("true" if value.const else "false") if value.const is not None else f"%{value.name}")
    )


def typed(value: Value) -> str:
    """Type and operand."""
    return f"i{value.width} {literal(value)}"


#: A definition: what is before its name, its name, its parameters. A name.
_HEAD = re.compile(r"^define (.*?)@([-$.\w]+)(\(.*?\)) #\d+ \{$", re.MULTILINE)
_NAME = re.compile(r"@([-$.\w]+)")


class Emitter:
    """Collects functions of one module. Declarations of what they use are added by `module()`."""

    def __init__(self, likely_false: bool = False) -> None:
        """likely_false: code goes straight on where a condition does not hold."""
        self._likely_false = likely_false
        self._functions: list[str] = []
        self._declarations: set[str] = set()
        self._unnamed = 0

    def handler(self, name: str, root: Block) -> None:
        """A function that is entered and left by tail calls."""
        self._functions.append(
            f"define hidden preserve_nonecc void @{name}({_HANDLER_TYPES}) #0 {{\n{self._body(root)}}}\n"
        )

    def function(self, name: str, parameters: int, root: Block) -> None:
        """An ordinary function of 64-bit parameters p0.. returning two 64-bit words."""
        types = ", ".join(f"i64 %p{i}" for i in range(parameters))
        self._functions.append(
            f"define hidden fastcc {{i64, i64}} @{name}({types}) #1 {{\n{self._body(root)}}}\n"
        )

    def raw(self, text: str) -> None:
        """A function written as text."""
        self._functions.append(text)

    def fresh(self) -> str:
        """A name that no Value has."""
        self._unnamed += 1
        return f"t{self._unnamed}"

    def declare(self, declaration: str) -> None:
        self._declarations.add(declaration)

    def module(self) -> str:
        return self._module(self._functions, [])

    def modules(self, count: int) -> list[str]:
        """The same as so many modules of about one size, to be compiled at once; what the first function is stays first."""
        whole, size = sum(map(len, self._functions)), 0
        parts: list[list[str]] = [[] for _ in range(count)]
        for function in self._functions:
            parts[size * count // whole].append(function)
            size += len(function)
        heads = {name: f"declare {before}@{name}{after}" for before, name, after in _HEAD.findall("\n".join(self._functions))}
        modules = []
        for part in parts:
            text = "\n".join(part)
            others = set(_NAME.findall(text)) - {name for _, name, _ in _HEAD.findall(text)}
            modules.append(self._module(part, [heads[name] for name in sorted(others & heads.keys())]))
        return modules

    def _module(self, functions: list[str], heads: list[str]) -> str:
        attributes = (
            'attributes #0 = { nounwind strictfp "no-jump-tables"="true" }\n'
            'attributes #1 = { nounwind strictfp noinline "no-jump-tables"="true" }\n'
        )
        return "\n".join([*sorted(self._declarations), *heads, *functions, attributes])

    # -- bodies ----------------------------------------------------------------------------------------------
    def _body(self, root: Block) -> str:
        lines: list[str] = []
        waiting = [root]
        while waiting:
            block = waiting.pop()
            lines.append(f"b{block.number}:")
            for op in block.ops:
                lines.extend(f"  {line}" for line in self._op(op))
            if block.condition is not None:
                assert block.if_true is not None
                assert block.if_false is not None
                lines.append(
                    f"  br i1 {literal(block.condition)}, label %b{block.if_true.number},"
                    f" label %b{block.if_false.number}"
                )
                successors = [block.if_false, block.if_true]
                waiting += successors[::-1] if self._likely_false else successors
            elif not block.ops or block.ops[-1].opcode not in _ENDS:
                raise ValueError("a path without an end")
        return "\n".join(lines) + "\n"

    def _op(self, op: Op) -> list[str]:
        name = op.result.name if op.result is not None else ""
        code, args = op.opcode, op.args
        if code in _BINARY:
            return [f"%{name} = {code} {typed(args[0])}, {literal(args[1])}"]
        if code in _COMPARE:
            return [f"%{name} = icmp {_COMPARE[code]} {typed(args[0])}, {literal(args[1])}"]
        if code in ("zext", "sext", "trunc"):
            assert op.result is not None
            return [f"%{name} = {code} {typed(args[0])} to i{op.result.width}"]
        if code == "select":
            return [f"%{name} = select {typed(args[0])}, {typed(args[1])}, {typed(args[2])}"]
        if code in _INTRINSICS:
            width, flag = args[0].width, _INTRINSICS[code]
            self.declare(f"declare i{width} @llvm.{code}.i{width}(i{width}{', i1' if flag else ''})")
            extra = ", i1 false" if flag else ""
            return [f"%{name} = call i{width} @llvm.{code}.i{width}({typed(args[0])}{extra})"]
        return _EFFECTS[code](self, op, name)


def _pointer(name: str, address: Value) -> tuple[str, str]:
    pointer = f"{name}_p"
    return f"%{pointer} = inttoptr {typed(address)} to ptr", f"ptr %{pointer}"


def _param(emitter: Emitter, op: Op, name: str) -> list[str]:
    return [f"%{name} = add i64 %{op.attrs[0]}, 0"]


def _load(emitter: Emitter, op: Op, name: str) -> list[str]:
    """attrs: kind (plain, volatile, atomic), alignment."""
    assert op.result is not None
    kind, align = op.attrs
    cast, pointer = _pointer(name, op.args[0])
    width = op.result.width
    mode = {"plain": "load", "volatile": "load volatile", "atomic": "load atomic"}[str(kind)]
    order = " seq_cst" if kind == "atomic" else ""
    return [cast, f"%{name} = {mode} i{width}, {pointer}{order}, align {align}"]


def _store(emitter: Emitter, op: Op, name: str) -> list[str]:
    kind, align = op.attrs
    cast, pointer = _pointer(emitter.fresh(), op.args[0])
    mode = {"plain": "store", "volatile": "store volatile", "atomic": "store atomic"}[str(kind)]
    order = " seq_cst" if kind == "atomic" else ""
    return [cast, f"{mode} {typed(op.args[1])}, {pointer}{order}, align {align}"]


def _atomicrmw(emitter: Emitter, op: Op, name: str) -> list[str]:
    cast, pointer = _pointer(name, op.args[0])
    return [cast, f"%{name} = atomicrmw {op.attrs[0]} {pointer}, {typed(op.args[1])} seq_cst"]


def _cmpxchg(emitter: Emitter, op: Op, name: str) -> list[str]:
    """args: address, expected, new; result: 1 bit, exchanged."""
    cast, pointer = _pointer(name, op.args[0])
    old, new = op.args[1], op.args[2]
    return [
        cast,
        f"%{name}_x = cmpxchg {pointer}, {typed(old)}, {typed(new)} seq_cst seq_cst",
        f"%{name} = extractvalue {{i{old.width}, i1}} %{name}_x, 1",
    ]


def _fence(emitter: Emitter, op: Op, name: str) -> list[str]:
    return [f"fence {op.attrs[0]}"]


def _ticks(emitter: Emitter, op: Op, name: str) -> list[str]:
    emitter.declare("declare i64 @llvm.readcyclecounter()")
    return [f"%{name} = call i64 @llvm.readcyclecounter()"]


def _pause(emitter: Emitter, op: Op, name: str) -> list[str]:
    emitter.declare("declare void @llvm.x86.sse2.pause()")
    return ["call void @llvm.x86.sse2.pause()"]


def _syscall(emitter: Emitter, op: Op, name: str) -> list[str]:
    """args: number and six arguments; the result is the kernel's, an errno being negative."""
    places = "={rax},{rax},{rdi},{rsi},{rdx},{r10},{r8},{r9},~{rcx},~{r11},~{memory},~{dirflag},~{fpsr},~{flags}"
    return [f'%{name} = call i64 asm sideeffect "syscall", "{places}"({", ".join(typed(arg) for arg in op.args)})']


def _address_of(emitter: Emitter, op: Op, name: str) -> list[str]:
    return [f"%{name} = ptrtoint ptr @{op.attrs[0]} to i64"]


def _call(emitter: Emitter, op: Op, name: str) -> list[str]:
    """attrs: function. Result: its first word; "second" reads the other one."""
    args = ", ".join(typed(arg) for arg in op.args)
    return [
        f"%{name}_r = call fastcc {{i64, i64}} @{op.attrs[0]}({args})",
        f"%{name} = extractvalue {{i64, i64}} %{name}_r, 0",
    ]


def _second(emitter: Emitter, op: Op, name: str) -> list[str]:
    return [f"%{name} = extractvalue {{i64, i64}} %{op.args[0].name}_r, 1"]


def _return(emitter: Emitter, op: Op, name: str) -> list[str]:
    first = f"%{emitter.fresh()}"
    second = f"%{emitter.fresh()}"
    return [
        f"{first} = insertvalue {{i64, i64}} poison, {typed(op.args[0])}, 0",
        f"{second} = insertvalue {{i64, i64}} {first}, {typed(op.args[1])}, 1",
        f"ret {{i64, i64}} {second}",
    ]


def _tail(emitter: Emitter, op: Op, name: str) -> list[str]:
    """args: the handler parameters, as many as matter; attrs: a handler's name, or none: args[-1] is its address. Further
    names are those of the last arguments.
    """
    args = list(op.args)
    lines = []
    if op.attrs:
        target = f"@{op.attrs[0]}"
    else:
        pointer = emitter.fresh()
        lines.append(f"%{pointer} = inttoptr {typed(args.pop())} to ptr")
        target = f"%{pointer}"
    named = op.attrs[1:]
    values = dict(zip((*HANDLER_PARAMETERS[: len(args) - len(named)], *named), args, strict=True))
    words = [typed(values[name]) if name in values else "i64 poison" for name in HANDLER_PARAMETERS]
    return [*lines, f"musttail call preserve_nonecc void {target}({', '.join(words)})", "ret void"]


def _rare(emitter: Emitter, op: Op, name: str) -> list[str]:
    """The path that this stands on is seldom taken. The load keeps LLVM from making a select of it."""
    cast, pointer = _pointer(emitter.fresh(), Value(64, None, "s"))
    return [cast, f"%{emitter.fresh()} = load volatile i64, {pointer}, align 8"]


def _leave(emitter: Emitter, op: Op, name: str) -> list[str]:
    return ["ret void"]


def _mxcsr_read(emitter: Emitter, op: Op, name: str) -> list[str]:
    emitter.declare("declare void @llvm.x86.sse.stmxcsr(ptr)")
    cast, pointer = _pointer(name, op.args[0])
    return [
        cast,
        f"call void @llvm.x86.sse.stmxcsr({pointer})",
        f"%{name} = load volatile i32, {pointer}, align 4",
    ]


def _mxcsr_write(emitter: Emitter, op: Op, name: str) -> list[str]:
    """args: scratch address, 32-bit content."""
    emitter.declare("declare void @llvm.x86.sse.ldmxcsr(ptr)")
    cast, pointer = _pointer(emitter.fresh(), op.args[0])
    return [
        cast,
        f"store volatile {typed(op.args[1])}, {pointer}, align 4",
        f"call void @llvm.x86.sse.ldmxcsr({pointer})",
    ]


_FLOAT = {32: "float", 64: "double"}
_STRICT = 'metadata !"fpexcept.strict"'
_ROUNDED = 'metadata !"round.dynamic", ' + _STRICT


def _fp(emitter: Emitter, op: Op, name: str) -> list[str]:
    """attrs: operation, format width [, integer width]; operands and results are bit patterns."""
    operation, width, *rest = op.attrs
    ft = _FLOAT[int(str(width))]
    suffix = f"f{width}"
    lines, operands = [], []
    to_int = operation in ("fptosi", "fptoui")
    from_int = operation in ("sitofp", "uitofp")
    for index, arg in enumerate(op.args):
        if from_int:
            operands.append(typed(arg))
            continue
        source = _FLOAT[arg.width]
        lines.append(f"%{name}_{index} = bitcast {typed(arg)} to {source}")
        operands.append(f"{source} %{name}_{index}")
    strict = f"@llvm.experimental.constrained.{operation}"
    if operation in ("oeq", "une", "uno", "olt", "ole", "quiet_olt", "quiet_ole"):
        call = "fcmps" if operation in ("olt", "ole") else "fcmp"
        predicate = str(operation).removeprefix("quiet_")
        emitter.declare(
            f"declare i1 @llvm.experimental.constrained.{call}.{suffix}({ft}, {ft}, metadata, metadata)"
        )
        lines.append(
            f"%{name} = call i1 @llvm.experimental.constrained.{call}.{suffix}"
            f'({", ".join(operands)}, metadata !"{predicate}", {_STRICT}) #0'
        )
        return lines
    if to_int:
        iw = rest[0]
        emitter.declare(f"declare i{iw} {strict}.i{iw}.{suffix}({ft}, metadata)")
        return [*lines, f"%{name} = call i{iw} {strict}.i{iw}.{suffix}({operands[0]}, {_STRICT}) #0"]
    if from_int:
        iw = rest[0]
        emitter.declare(f"declare {ft} {strict}.{suffix}.i{iw}(i{iw}, metadata, metadata)")
        lines.append(f"%{name}_f = call {ft} {strict}.{suffix}.i{iw}({operands[0]}, {_ROUNDED}) #0")
    elif operation == "fpext":
        emitter.declare("declare double @llvm.experimental.constrained.fpext.f64.f32(float, metadata)")
        lines.append(f"%{name}_f = call double {strict}.f64.f32({operands[0]}, {_STRICT}) #0")
        ft, width = "double", 64
    elif operation == "fptrunc":
        emitter.declare(
            "declare float @llvm.experimental.constrained.fptrunc.f32.f64(double, metadata, metadata)"
        )
        lines.append(f"%{name}_f = call float {strict}.f32.f64({operands[0]}, {_ROUNDED}) #0")
        ft, width = "float", 32
    else:
        kinds = ", ".join([ft] * len(operands))
        exact = operation == "trunc"  # its rounding is its name
        emitter.declare(f"declare {ft} {strict}.{suffix}({kinds}, metadata{'' if exact else ', metadata'})")
        modes = _STRICT if exact else _ROUNDED
        lines.append(f"%{name}_f = call {ft} {strict}.{suffix}({', '.join(operands)}, {modes}) #0")
    lines.append(f"%{name} = bitcast {ft} %{name}_f to i{width}")
    return lines


_EFFECTS: dict[str, Callable[[Emitter, Op, str], list[str]]] = {
    "param": _param,
    "load": _load,
    "store": _store,
    "atomicrmw": _atomicrmw,
    "cmpxchg": _cmpxchg,
    "fence": _fence,
    "ticks": _ticks,
    "pause": _pause,
    "syscall": _syscall,
    "address": _address_of,
    "call": _call,
    "second": _second,
    "return": _return,
    "tail": _tail,
    "rare": _rare,
    "leave": _leave,
    "mxcsr_read": _mxcsr_read,
    "mxcsr_write": _mxcsr_write,
    "fp": _fp,
}
_ENDS = frozenset({"return", "tail", "leave"})
