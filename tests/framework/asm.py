"""A small RISC-V assembler: text in, flat bytes out, GNU as spelling, no toolchain needed.

The conformance guests (tests/guests/*.S), the QEMU peer's shim and the random programs are assembled by it
in the test process. One section, no linker, no relaxation: every instruction is the size its text says
(compressed ones are written c.xxx). Where riscv64 binutils are installed, test_asm.py compares it with them.

Directives: .byte .half .word .dword .ascii .asciz .zero .skip .align .balign .org .equ .set .macro .endm
.rept .endr .if .else .endif .globl .text .option (the last three are ignored). Labels: name: and the numeric
1: with 1f / 1b. Comments: # and // to the end of the line; statements may share a line with ';'. In
a .rept body \\+ is the number of the round, from 0.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.framework.encodings import CSRS, ENCODINGS, F_REGISTERS, ROUNDING, X_REGISTERS
from tests.framework.fields import MEMORY, EncodingError, encode, kinds


class AssemblyError(ValueError):
    """The text cannot be assembled; the message names the line."""


@dataclass
class Program:
    """Assembled code: `image` is to be loaded at `base`; `symbols` are absolute addresses."""

    base: int
    image: bytes
    symbols: dict[str, int]

    def __getitem__(self, symbol: str) -> int:
        return self.symbols[symbol]


@dataclass
class _Item:
    """A statement whose size is known; `emit` gives its bytes once every label has its address."""

    line: str
    address: int
    size: int
    emit: Callable[[], bytes]


_LABEL = re.compile(r"^\s*([A-Za-z_.$][\w.$]*|\d+)\s*:")
_LOCAL = re.compile(r"(?<![\w.])(\d+)([fb])\b")
_MEMORY = re.compile(r"^(.*?)\(\s*([\w]+)\s*\)$")
_CHAR = re.compile(r"'(\\?.)'")
_COMMENT = re.compile(r"""("(?:\\.|[^"\\])*")|(//.*|\#.*)""")
_SPLIT = re.compile(r"""\s*((?:"(?:\\.|[^"\\])*"|\([^()]*\)|[^,"(])+)\s*(?:,|$)""")
_OPERATIONS: dict[type, Callable[[int, int], int]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Div: lambda a, b: a // b, ast.Mod: lambda a, b: a % b,
    ast.LShift: lambda a, b: a << b, ast.RShift: lambda a, b: a >> b, ast.BitOr: lambda a, b: a | b,
    ast.BitAnd: lambda a, b: a & b, ast.BitXor: lambda a, b: a ^ b,
}  # fmt: skip
_COMPARE: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: lambda a, b: a == b, ast.NotEq: lambda a, b: a != b, ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b, ast.Gt: lambda a, b: a > b, ast.GtE: lambda a, b: a >= b,
}  # fmt: skip
_DATA = {".byte": 1, ".half": 2, ".short": 2, ".word": 4, ".long": 4, ".dword": 8, ".quad": 8}
_BLOCKS = (".macro", ".rept", ".if")
_IGNORED = {".globl", ".global", ".text", ".option", ".section", ".type", ".size"}
# Condition of a branch pseudo-instruction -> (base instruction, operands in base order by index)
_BRANCHES = {
    "beqz": ("beq", "0z"), "bnez": ("bne", "0z"), "bgez": ("bge", "0z"), "bltz": ("blt", "0z"),
    "blez": ("bge", "z0"), "bgtz": ("blt", "z0"), "bgt": ("blt", "10"), "ble": ("bge", "10"),
    "bgtu": ("bltu", "10"), "bleu": ("bgeu", "10"),
}  # fmt: skip
_CSR_PSEUDO = {"csrw": "csrrw", "csrs": "csrrs", "csrc": "csrrc"} | {
    "csrwi": "csrrwi", "csrsi": "csrrsi", "csrci": "csrrci",
}  # fmt: skip


def load_immediate(value: int) -> list[tuple[str, int]]:
    """The usual sequence that puts a 64-bit value in a register: (lui|addi|addiw|slli, immediate) steps."""
    value &= (1 << 64) - 1
    signed = value - (1 << 64) if value >> 63 else value
    if -(1 << 31) <= signed < 1 << 31:
        low = (signed & 0xFFF) - ((signed & 0x800) << 1)
        high = (signed - low) >> 12 & 0xFFFFF
        if high == 0:
            return [("addi", low)]
        return [("lui", high)] + ([("addiw", low)] if low else [])
    low = (signed & 0xFFF) - ((signed & 0x800) << 1)
    rest = signed - low >> 12
    shift = 12
    while not rest & 1:
        rest >>= 1
        shift += 1
    return [*load_immediate(rest), ("slli", shift), *([("addi", low)] if low else [])]


@dataclass
class Assembler:
    """One assembly: feed text, then link()."""

    base: int = 0
    defines: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.address = self.base
        self.symbols: dict[str, int] = dict(self.defines)
        self.items: list[_Item] = []
        self.locals: dict[str, list[int]] = {}
        self.macros: dict[str, tuple[list[str], list[str]]] = {}
        self.expansions = 0
        self.line = ""

    # -- text -------------------------------------------------------------------------------------------
    def feed(self, text: str) -> None:
        """Assembles text; may be called several times."""
        text = _COMMENT.sub(lambda m: m.group(1) or "", text)
        lines: list[str] = []
        for line in text.splitlines():
            lines += line.split(";") if ";" in line and '"' not in line else [line]
        self._lines(lines)

    def _lines(self, lines: list[str]) -> None:
        position = 0
        while position < len(lines):
            line = lines[position].strip()
            position += 1
            while (label := _LABEL.match(line)) and line[label.end() :].lstrip().startswith(_BLOCKS):
                self._statement(label.group(0))
                line = line[label.end() :].lstrip()
            word = line.split(None, 1)[0] if line else ""
            if word in _BLOCKS:
                body, position = self._block(lines, position, word)
                self._do_block(word, line, body)
            elif line:
                self.line = line
                try:
                    self._statement(line)
                except (EncodingError, KeyError, SyntaxError, IndexError, StopIteration) as error:
                    raise AssemblyError(f"{line!r}: {error}") from None

    def _block(self, lines: list[str], position: int, opener: str) -> tuple[list[str], int]:
        closer = {".macro": ".endm", ".rept": ".endr", ".if": ".endif"}[opener]
        depth = 1
        start = position
        while position < len(lines):
            word = (lines[position].split(None, 1) or [""])[0]
            position += 1
            depth += (word == opener) - (word == closer)
            if depth == 0:
                return lines[start : position - 1], position
        raise AssemblyError(f"{opener} without {closer}")

    def _do_block(self, word: str, line: str, body: list[str]) -> None:
        arguments = line.split(None, 1)[1] if " " in line else ""
        if word == ".macro":
            name, *parameters = arguments.replace(",", " ").split()
            self.macros[name] = (parameters, body)
        elif word == ".rept":
            for number in range(self.value(arguments)):
                self._lines([text.replace("\\+", str(number)) for text in body])
        else:
            depth, split = 0, len(body)
            for index, text in enumerate(body):
                first = (text.split(None, 1) or [""])[0]
                depth += (first == ".if") - (first == ".endif")
                if first == ".else" and depth == 0:
                    split = index
            self._lines(body[:split] if self.value(arguments) else body[split + 1 :])

    def _statement(self, line: str) -> None:
        while match := _LABEL.match(line):
            name = match.group(1)
            if name.isdigit():
                self.locals.setdefault(name, []).append(self.address)
            elif name in self.symbols:
                raise AssemblyError(f"label {name!r} defined twice")
            else:
                self.symbols[name] = self.address
            line = line[match.end() :].strip()
        if not line:
            return
        word, _, rest = line.partition(" ")
        word, rest = word.strip(), rest.strip()
        if "\t" in word:
            word, _, tail = word.partition("\t")
            rest = f"{tail} {rest}".strip()
        operands = [m.strip() for m in _SPLIT.findall(rest)] if rest else []
        if word in self.macros:
            self._macro(word, operands)
        elif word.startswith("."):
            self._directive(word, rest, operands)
        else:
            self._instruction(word, operands)

    def _macro(self, name: str, operands: list[str]) -> None:
        parameters, body = self.macros[name]
        self.expansions += 1
        values = dict(zip([p.split("=")[0] for p in parameters], operands, strict=False))
        for parameter in parameters:
            key, _, default = parameter.partition("=")
            values.setdefault(key, default)
        unique = str(self.expansions)
        text = []
        for line in body:
            line = line.replace("\\@", unique)
            text.append(re.sub(r"\\(\w+)(\\\(\))?", lambda m: values.get(m.group(1), m.group(0)), line))
        self._lines(text)

    def _directive(self, word: str, rest: str, operands: list[str]) -> None:
        if word in _IGNORED:
            return
        if word in _DATA:
            size = _DATA[word]
            where = self.address

            def data() -> bytes:
                mask = (1 << 8 * size) - 1
                return b"".join((self.value(o, where) & mask).to_bytes(size, "little") for o in operands)

            self._add(size * len(operands), data)
        elif word in (".ascii", ".asciz", ".string"):
            text = b"".join(ast.literal_eval(o).encode("latin-1") + b"\0" * (word != ".ascii") for o in operands)
            self._add(len(text), lambda: text)
        elif word in (".zero", ".skip", ".space"):
            self._fill(self.value(operands[0]))
        elif word in (".align", ".p2align"):
            self._fill(-self.address % (1 << self.value(operands[0])))
        elif word == ".balign":
            self._fill(-self.address % self.value(operands[0]))
        elif word == ".org":
            self._fill(self.base + self.value(operands[0]) - self.address)
        elif word in (".equ", ".set"):
            self.symbols[operands[0]] = self.value(operands[1])
        else:
            raise AssemblyError(f"unknown directive {word}")

    def _fill(self, size: int) -> None:
        if size < 0:
            raise AssemblyError(f"{self.line!r}: would go backwards")
        self._add(size, lambda: bytes(size))

    def _add(self, size: int, emit: Callable[[], bytes]) -> None:
        self.items.append(_Item(self.line, self.address, size, emit))
        self.address += size

    # -- expressions ------------------------------------------------------------------------------------
    def value(self, text: str, where: int | None = None) -> int:
        """An integer expression over numbers, 'c', labels, '.' and 1f/1b."""
        text = text.strip()
        try:
            return int(text, 0)
        except ValueError:
            pass
        if text in self.symbols:
            return self.symbols[text]
        here = self.address if where is None else where
        text = _LOCAL.sub(lambda m: str(self._local(m.group(1), m.group(2), here)), text)
        text = _CHAR.sub(lambda m: str(ord(ast.literal_eval(m.group(0)))), text)
        text = re.sub(r"(?<![\w.])\.(?![\w.])", str(here), text)
        return self._evaluate(ast.parse(text, mode="eval").body)

    def _local(self, name: str, direction: str, where: int) -> int:
        places = self.locals.get(name, [])
        if direction == "b":
            return max(p for p in places if p <= where)
        found = [p for p in places if p > where]
        if not found:
            raise KeyError(f"{name}{direction}")
        return min(found)

    def _evaluate(self, node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int() as number):
                return number
            case ast.Name(id=name):
                return self.symbols[name]
            case ast.BinOp(left=left, op=operation, right=right):
                return _OPERATIONS[type(operation)](self._evaluate(left), self._evaluate(right))
            case ast.Compare(left=left, ops=[operation], comparators=[right]):
                return int(_COMPARE[type(operation)](self._evaluate(left), self._evaluate(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._evaluate(operand)
            case ast.UnaryOp(op=ast.Invert(), operand=operand):
                return ~self._evaluate(operand)
        raise AssemblyError(f"{self.line!r}: not an integer expression")

    # -- instructions -----------------------------------------------------------------------------------
    def _word(self, name: str, operands: list[str], ordering: int = 0) -> None:
        where = self.address
        size = ENCODINGS[name].length
        self._add(size, lambda: encode(name, self._values(name, operands, where), ordering).to_bytes(size, "little"))

    def _values(self, name: str, operands: list[str], where: int) -> list[int]:
        wanted = kinds(name)
        if wanted and wanted[-1] == "rm" and len(operands) == len(wanted) - 1:
            exact = name in (
                "fcvt.d.s",
                "fcvt.d.w",
                "fcvt.d.wu",
            )  # GNU as writes rne where rounding cannot happen
            operands = [*operands, "rne" if exact else "dyn"]
        if len(operands) != len(wanted):
            raise AssemblyError(f"{self.line!r}: {name} takes {len(wanted)} operands ({', '.join(wanted)})")
        values: list[int] = []
        for kind, text in zip(wanted, operands, strict=True):
            if kind in MEMORY:
                match = _MEMORY.match(text)
                if match is None:
                    raise AssemblyError(f"{self.line!r}: {text!r} is not offset(register)")
                values += [self.value(match.group(1) or "0", where), X_REGISTERS[match.group(2)]]
            elif kind in ("branch", "jump", "cjump", "cbranch"):
                values.append(self.value(text, where) - where)
            elif kind == "rm":
                values.append(ROUNDING[text] if text in ROUNDING else self.value(text, where))
            elif kind == "csr":
                values.append(CSRS[text] if text in CSRS else self.value(text, where))
            elif kind in ("pred", "succ"):
                values.append(sum(1 << "wroi".index(letter) for letter in text) if text.isalpha() else int(text, 0))
            elif kind.startswith(("f", "cfrs")):
                values.append(F_REGISTERS[text])
            elif kind.startswith(("rd", "rs", "crs", "sp")):
                values.append(X_REGISTERS[text])
            else:
                values.append(self.value(text, where))
        return values

    def _instruction(self, word: str, operands: list[str]) -> None:
        if word in ENCODINGS:
            self._plain(word, operands)
            return
        for suffix, ordering in ((".aqrl", 3), (".aq", 2), (".rl", 1)):
            if word.endswith(suffix):
                self._word(word.removesuffix(suffix), operands, ordering)
                return
        self._pseudo(word, operands)

    def _plain(self, word: str, operands: list[str]) -> None:
        if word == "jal" and len(operands) == 1:
            operands = ["ra", *operands]
        elif word == "jalr" and len(operands) == 1 and "(" not in operands[0]:
            operands = ["ra", f"0({operands[0]})"]
        elif word == "jalr" and len(operands) == 3:
            operands = [operands[0], f"{operands[2]}({operands[1]})"]
        elif word == "fence" and not operands:
            operands = ["iorw", "iorw"]
        elif word == "sfence.vma":
            operands = [*operands, "zero", "zero"][:2]
        elif word == "c.nop" and not operands:
            operands = ["0"]
        elif word == "c.addi16sp" and len(operands) == 1:
            operands = ["sp", *operands]
        elif word + "i" in ENCODINGS and len(operands) == 3 and operands[2] not in X_REGISTERS:
            word += "i"  # add a0, a0, 1 as GNU as allows
        self._word(word, operands)

    def _pseudo(self, word: str, o: list[str]) -> None:
        simple: dict[str, Callable[[], tuple[str, list[str]]]] = {
            "nop": lambda: ("addi", ["zero", "zero", "0"]),
            "mv": lambda: ("addi", [o[0], o[1], "0"]),
            "not": lambda: ("xori", [o[0], o[1], "-1"]),
            "neg": lambda: ("sub", [o[0], "zero", o[1]]),
            "negw": lambda: ("subw", [o[0], "zero", o[1]]),
            "sext.w": lambda: ("addiw", [o[0], o[1], "0"]),
            "zext.b": lambda: ("andi", [o[0], o[1], "255"]),
            "zext.w": lambda: ("add.uw", [o[0], o[1], "zero"]),
            "seqz": lambda: ("sltiu", [o[0], o[1], "1"]),
            "snez": lambda: ("sltu", [o[0], "zero", o[1]]),
            "sltz": lambda: ("slt", [o[0], o[1], "zero"]),
            "sgtz": lambda: ("slt", [o[0], "zero", o[1]]),
            "j": lambda: ("jal", ["zero", o[0]]),
            "jr": lambda: ("jalr", ["zero", f"0({o[0]})"]),
            "call": lambda: ("jal", ["ra", o[0]]),
            "tail": lambda: ("jal", ["zero", o[0]]),
            "ret": lambda: ("jalr", ["zero", "0(ra)"]),
            "csrr": lambda: ("csrrs", [o[0], o[1], "zero"]),
            "rdtime": lambda: ("csrrs", [o[0], "time", "zero"]),
            "rdcycle": lambda: ("csrrs", [o[0], "cycle", "zero"]),
            "rdinstret": lambda: ("csrrs", [o[0], "instret", "zero"]),
            "frcsr": lambda: ("csrrs", [o[0], "fcsr", "zero"]),
            "fscsr": lambda: ("csrrw", ["zero", "fcsr", o[0]]),
            "frflags": lambda: ("csrrs", [o[0], "fflags", "zero"]),
            "fsflags": lambda: ("csrrw", ["zero", "fflags", o[0]]),
            "fsrm": lambda: ("csrrw", ["zero", "frm", o[0]]),
        }
        if word in simple:
            self._word(*simple[word]())
        elif word in _BRANCHES:
            base, order = _BRANCHES[word]
            registers = [*("zero" if c == "z" else o[int(c)] for c in order), o[-1]]
            self._word(base, registers)
        elif word in _CSR_PSEUDO:
            name = _CSR_PSEUDO[word]
            if not name.endswith("i") and o[1] not in X_REGISTERS:
                name += "i"
            self._word(name, ["zero", *o])
        elif word == "li":
            for step, immediate in load_immediate(self.value(o[1])):
                middle = [] if step == "lui" else ["zero" if self._first_li else o[0]]
                self._word(step, [o[0], *middle, str(immediate)])
                self._first_li = False
            self._first_li = True
        elif word in ("la", "lla"):
            where = self.address
            self._pcrel(o[0], o[1], where)
        elif word.startswith(("fmv.", "fabs.", "fneg.")):
            base = {"fmv": "fsgnj", "fabs": "fsgnjx", "fneg": "fsgnjn"}[word[:4].rstrip(".")]
            self._word(f"{base}.{word[-1]}", [o[0], o[1], o[1]])
        else:
            raise AssemblyError(f"{self.line!r}: unknown instruction {word}")

    _first_li = True

    def _pcrel(self, register: str, symbol: str, where: int) -> None:
        """auipc + addi, as `la` expands."""
        number = X_REGISTERS[register]

        def emit() -> bytes:
            offset = self.value(symbol, where) - where
            low = (offset & 0xFFF) - ((offset & 0x800) << 1)
            high = (offset - low) >> 12 & 0xFFFFF
            words = (encode("auipc", [number, high]), encode("addi", [number, number, low]))
            return b"".join(w.to_bytes(4, "little") for w in words)

        self._add(8, emit)

    def link(self) -> Program:
        """Resolves labels; raises AssemblyError for what is undefined or out of range."""
        image = bytearray()
        for item in self.items:
            self.line = item.line
            try:
                code = item.emit()
            except (EncodingError, KeyError, SyntaxError, ValueError) as error:
                raise AssemblyError(f"{item.line!r} at {item.address:#x}: {error}") from None
            image += code
        return Program(self.base, bytes(image), dict(self.symbols))


def assemble(text: str, base: int = 0, **defines: int) -> Program:
    """Assembles text for address `base` with the given constants."""
    assembler = Assembler(base, dict(defines))
    assembler.feed(text)
    return assembler.link()


def assemble_files(*paths: Path, base: int, **defines: int) -> Program:
    """Assembles files one after another, as if they were one."""
    assembler = Assembler(base, dict(defines))
    for path in paths:
        assembler.feed(path.read_text())
    return assembler.link()
