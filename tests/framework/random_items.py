"""The items of random programs: snippets of assembly, each a small experiment of one kind.

Called by random_programs.py. An item stands for itself: it jumps only to its own labels, sets up the
addresses it uses, and writes no reserved register, so any subset of a program's items is a program too.
What must not be generated, because QEMU 7.2 or the specification leave it open, is said where it is left
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.framework.encodings import ENCODINGS, F_REGISTERS, FORMS, X_REGISTERS
from tests.framework.fields import MEMORY, encode
from tests.framework.random_operands import operand, register, source
from tests.framework.random_values import floating, integer

if TYPE_CHECKING:
    from tests.framework.random_programs import Surroundings

Maker = Callable[["Surroundings"], str]


@dataclass(frozen=True)
class Item:
    """A snippet and the instructions that it names."""

    text: str
    kind: str

    @property
    def names(self) -> set[str]:
        """The instructions that stand in the text (ordering suffixes of atomics left out)."""
        words = {line.strip().split(" ", 1)[0] for line in self.text.replace(";", "\n").splitlines()}
        plain = {word.removesuffix(".aqrl").removesuffix(".aq").removesuffix(".rl") for word in words}
        return {word for word in plain if word in ENCODINGS}


def _instruction(here: Surroundings, name: str) -> str:
    operands = [operand(here, kind) for kind in FORMS[ENCODINGS[name].form].split()]
    if name == "ctzw":
        return _ctzw(here, operands[0], operands[1])
    return f"{name} {', '.join(operands)}"


def _ctzw(here: Surroundings, rd: str, source: str) -> str:
    """QEMU 7.2's ctzw is wrong where the lower word is 0, so it never is (unit tests have that case)."""
    return f"bseti {rd}, {source}, {here.rng.randrange(32)}\nctzw {rd}, {rd}"


def trace(here: Surroundings, number: int) -> str:
    """Stores a register in the trace page, so that a later overwrite does not hide it."""
    if not here.tracing:
        return ""
    here.traced = (here.traced + 8) % 2048
    return f"\nsd x{number}, {here.traced}(x{here.trace_register})"


_COMPUTE_FORMS = {
    "R",
    "R1",
    "I",
    "SH6",
    "SH5",
    "U",
    "CIW",
    "CI",
    "CI0",
    "CNOP",
    "CI16",
    "CLUI",
    "CSH",
    "CSHB",
}
_COMPUTE_FORMS |= {"CANDI", "CA", "CR"}
_COMPUTE = [e.name for e in ENCODINGS.values() if e.form in _COMPUTE_FORMS]


def compute(here: Surroundings) -> str:
    """One or a few integer instructions."""
    lines = []
    for _ in range(here.rng.randint(1, 5)):
        if here.rng.random() < 0.12:
            lines.append(f"li x{register(here)}, {integer(here.rng):#x}")
        lines.append(_instruction(here, here.rng.choice(_COMPUTE)))
    return "\n".join(lines) + (trace(here, here.rng.randrange(32)) if here.rng.random() < 0.3 else "")


_MULTIPLY = [e.name for e in ENCODINGS.values() if e.extension in ("M", "Zba", "Zbb", "Zbs")]


def multiply(here: Surroundings) -> str:
    """An M, Zba, Zbb or Zbs instruction on chosen operands, result traced."""
    name = here.rng.choice(_MULTIPLY)
    rd, a, b = (register(here) for _ in range(3))
    tail = {"R": f"x{b}", "R1": "", "SH6": str(here.rng.randrange(64)), "SH5": str(here.rng.randrange(32))}
    last = tail[ENCODINGS[name].form]
    text = f"li x{a}, {integer(here.rng):#x}\nli x{b}, {integer(here.rng):#x}\n"
    if name == "ctzw":
        return text + _ctzw(here, f"x{rd}", f"x{a}") + trace(here, rd)
    return text + f"{name} x{rd}, x{a}" + (f", {last}" if last else "") + trace(here, rd)


_FP_FORMS = {"FR", "FRM", "FR1M", "FR4", "FCMP", "FTOX", "FTOXM", "XTOF", "XTOFM"}
_FP = [e.name for e in ENCODINGS.values() if e.form in _FP_FORMS]


def fp(here: Surroundings) -> str:
    """A floating-point instruction; its flags and its result are traced."""
    rng = here.rng
    lines = []
    if rng.random() < 0.5:
        lines.append(f"csrrwi x{register(here)}, frm, {rng.choice((0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7))}")
    if rng.random() < 0.6:
        lines.append("csrrw x0, fflags, x0")
    if rng.random() < 0.4:
        temporary = register(here)
        lines += [f"li x{temporary}, {floating(rng):#x}", f"fmv.d.x f{rng.randrange(32)}, x{temporary}"]
    name = rng.choice(_FP)
    text = _instruction(here, name)
    destination = text.split()[1].rstrip(",")
    lines.append(text)
    if destination in F_REGISTERS and here.tracing:
        here.traced = (here.traced + 8) % 2048
        lines.append(f"fsd {destination}, {here.traced}(x{here.trace_register})")
    temporary = register(here)
    tail = f"\ncsrrs x{temporary}, fcsr, x0" + trace(here, temporary)
    number = X_REGISTERS.get(destination)
    return "\n".join(lines) + (trace(here, number) if number else "") + tail


def _address(here: Surroundings) -> int:
    """An address to load from or store to: often at the edge of a page; under paging sometimes anywhere."""
    rng = here.rng
    if here.mode and rng.random() < 0.06:
        return rng.choice((integer(rng), rng.getrandbits(64), here.delta + 0x80200000 & (1 << 64) - 1))
    start, size = rng.choice(here.data)
    if rng.random() < 0.4:
        offset = rng.randrange(0, size + 1, 4096) + rng.randint(-9, 9)
    else:
        offset = rng.randrange(size)
    return start + max(0, min(offset, size - 9)) & (1 << 64) - 1


_MEMORY_FORMS = {"LOAD", "STORE", "FLOAD", "FSTORE", "CL4", "CL8", "CFL8", "CS4", "CS8", "CFS8"}
_MEMORY_FORMS |= {"CLSP4", "CLSP8", "CFLSP8", "CSSP4", "CSSP8", "CFSSP8"}
_MEMORY = [e.name for e in ENCODINGS.values() if e.form in _MEMORY_FORMS]


def memory(here: Surroundings) -> str:
    """Loads and stores, aligned or not, in and across pages."""
    rng = here.rng
    name = rng.choice(_MEMORY)
    first, place = FORMS[ENCODINGS[name].form].split()
    low, high, step, compressed = {
        "mem": (-2048, 2047, 1, False), "cmem4": (0, 124, 4, True), "cmem8": (0, 248, 8, True),
        "spmem4": (0, 252, 4, False), "spmem8": (0, 504, 8, False), "ssmem4": (0, 252, 4, False),
        "ssmem8": (0, 504, 8, False),
    }[place]  # fmt: skip
    assert place in MEMORY or place == "mem"
    base = 2 if place.startswith(("sp", "ss")) else register(here, nonzero=True, compressed=compressed)
    offset = rng.randrange(low, high + 1, step) if rng.random() < 0.6 else 0
    address = _address(here) - offset & (1 << 64) - 1
    target = operand(here, first)
    text = f"li x{base}, {address:#x}\n{name} {target}, {offset}(x{base})"
    number = X_REGISTERS.get(target)
    loads = ENCODINGS[name].form in ("LOAD", "CL4", "CL8", "CLSP4", "CLSP8")
    if loads and number:
        text += trace(here, number)
    if rng.random() < 0.2:  # again, now with the translation known
        text += f"\n{name} {operand(here, first)}, {offset}(x{base})" if number != base or not loads else ""
    return text


_AMO = [e.name for e in ENCODINGS.values() if e.form == "AMO" and not e.name.startswith("sc.")]


def atomic(here: Surroundings) -> str:
    """An AMO, sometimes misaligned; or LR and SC in a constrained loop's shape (nothing else is promised)."""
    rng = here.rng
    base = register(here, nonzero=True)
    size = rng.choice((4, 8))
    suffix = ".w" if size == 4 else ".d"
    address = _address(here)
    if rng.random() < 0.9:
        address &= ~(size - 1)
    order = rng.choice(("", ".aq", ".rl", ".aqrl"))
    text = f"li x{base}, {address:#x}\n"
    if rng.random() < 0.7:
        name = rng.choice([n for n in _AMO if n.endswith(suffix)])
        rd = register(here)
        return text + f"{name}{order} x{rd}, x{source(here)}, (x{base})" + trace(here, rd)
    # Without paging or on a page that may be used: whether a failing SC faults is left open.
    start, length = here.data[0] if not here.mode else (here.trace, 4096)
    address = start + rng.randrange(1024, min(length, 4096) - 1024) & ~7
    old, new, failed = rng.sample([r for r in range(1, 32) if r not in here.reserved and r != base], 3)
    text = f"li x{base}, {address:#x}\nlr{suffix}{order} x{old}, (x{base})\n"
    text += f"addi x{new}, x{old}, {rng.randint(-2048, 2047)}\n"
    if rng.random() < 0.2:  # another address: must fail
        text += f"addi x{base}, x{base}, {rng.choice((512, -512))}\n"
    text += f"sc{suffix}{order} x{failed}, x{new}, (x{base})" + trace(here, failed) + trace(here, old)
    if rng.random() < 0.3:  # without a reservation: must fail
        text += f"\nsc{suffix} x{failed}, x{new}, (x{base})" + trace(here, failed)
    return text


_BRANCHES = [e.name for e in ENCODINGS.values() if e.form == "B"]


def branch(here: Surroundings) -> str:
    """Branches over something, loops that count down, jumps back and forth, calls."""
    rng = here.rng
    a, b, c = here.label(), here.label(), here.label()
    kind = rng.randrange(9)
    inner = compute(here)
    if kind == 0:
        return f"{rng.choice(_BRANCHES)} x{source(here)}, x{source(here)}, {a}\n{inner}\n{a}:"
    if kind == 1:
        name = rng.choice(("c.beqz", "c.bnez"))
        return f"{name} x{rng.randrange(8, 16)}, {a}\n{inner}\n{a}:"
    if kind == 2:
        counter = register(here, nonzero=True)
        here.busy.add(counter)
        inner = compute(here)
        here.busy.discard(counter)
        name = rng.choice(("bne", "blt", "bltu"))
        order = f"x{counter}, x0" if name == "bne" else f"x0, x{counter}"
        count = rng.choice((1, 2, 3, 17))
        return f"li x{counter}, {count}\n{a}:\n{inner}\naddi x{counter}, x{counter}, -1\n{name} {order}, {a}"
    if kind == 3:
        return f"jal x{register(here)}, {a}\n{b}:\n{inner}\nc.j {c}\n{a}:\njal x{register(here)}, {b}\n{c}:"
    if kind == 4:
        base = register(here, nonzero=True)
        offset = rng.randint(-1024, 1023)
        jump = f"jalr x{register(here)}, {offset | rng.getrandbits(1)}(x{base})"
        return f"la x{base}, {a} - ({offset & ~1})\n{jump}\n{inner}\n{a}:"
    if kind == 5:
        base = register(here, nonzero=True)
        name = rng.choice(("c.jr", "c.jalr")) if 1 not in here.reserved else "c.jr"
        return f"la x{base}, {a}\n{name} x{base}\n{inner}\n{a}:"
    if kind == 7:  # auipc and jalr as a linker leaves them, the jalr reached with and without the auipc
        base = register(here, nonzero=True)
        over = f"{rng.choice(_BRANCHES)} x{source(here)}, x{source(here)}, {c}"
        pair = f"{b}: auipc x{base}, 0\n{c}: jalr x{register(here)}, {a} - {b}(x{base})"
        return f"la x{base}, {b}\n{over}\n{pair}\n{inner}\n{a}:"
    if kind == 6:  # into the middle of an instruction: the upper half of a lui is c.li or c.addi
        hidden = encode(rng.choice(("c.li", "c.addi")), [register(here, nonzero=True), rng.randint(1, 31)])
        return f"j {a} + 2\n{a}: .word {hidden << 16 | 0x037:#x}\n"
    return f"c.j {a}\n.half 0\n{a}: {inner}"


def raw(here: Surroundings) -> str:
    """Words that may be no instruction. Only under paging, where a wild access faults the same everywhere."""
    rng = here.rng
    if not here.mode:
        return illegal(here)
    if rng.random() < 0.5:
        word = rng.getrandbits(32) | 3
        opcode = word & 0x7F
        jumps = opcode in (0x63, 0x67, 0x6F)
        reserved_amo = opcode == 0x2F and word >> 27 in (2, 3)
        system = opcode == 0x73 and (word >> 12 & 3 or word & ~0xE7FFF == 0 or word >> 25 in (8, 9))
        # QEMU 7.2 knows cache-block and other extensions of these opcodes differently from us.
        own = opcode == 0x0F and word >> 12 & 7 > 1
        vector = opcode == 0x57 or (opcode in (0x07, 0x27) and word >> 12 & 7 not in (2, 3))
        destination = word >> 7 & 31
        if jumps or reserved_amo or system or own or vector or destination in here.reserved:
            return illegal(here)
        return f".word {word:#x}"
    half = rng.getrandbits(16)
    quadrant, funct3 = half & 3, half >> 13
    control = (quadrant == 1 and funct3 in (5, 6, 7)) or (quadrant == 2 and funct3 == 4)
    if quadrant == 3 or control or _halves(half) & here.reserved:
        return illegal(here)
    return f".half {half:#x}"


def _halves(half: int) -> set[int]:
    """Registers that a 16-bit instruction might write."""
    return {half >> 7 & 31, half >> 2 & 31, (half >> 7 & 7) + 8, (half >> 2 & 7) + 8}


_ILLEGAL = [".word 0x00000000", ".word 0xffffffff", ".word 0x30200073", ".word 0x00200073", ".half 0x0000"]
_ILLEGAL += [
    ".half 0x8002",
    ".word 0x0000707f",
    ".word 0x4002",
    ".half 0x6081",
    ".half 0x2001",
    ".half 0x4002",
]
_ILLEGAL += ["csrrs x0, mstatus, x0", "csrrs x5, 0x5c0, x0", "csrrw x0, cycle, x6", "csrrsi x7, time, 1"]
_ILLEGAL += ["csrrs x5, 0x600, x0", "csrrs x5, 0x7b0, x0", "csrrs x5, 0xf14, x0", "csrrw x5, 0x3a0, x5"]
_ILLEGAL += ["csrrs x5, stopei, x0", "csrrs x5, sireg, x0", "csrrs x5, seed, x0", "csrrs x5, 0x800, x0"]
_ILLEGAL += [".word 0x9f"]


def illegal(here: Surroundings) -> str:
    """Instructions that do not exist, or not in this mode."""
    text = here.rng.choice(_ILLEGAL)
    if any(number in here.reserved for number in (5, 6, 7)) and "x" in text.split()[1][:1]:
        return ".word 0"
    if text == ".word 0x4002":  # c.lwsp x0: two halves
        return ".half 0x4002"
    return text


def trap(here: Surroundings) -> str:
    """Exceptions on purpose."""
    choices = ["ebreak", "c.ebreak", illegal(here), illegal(here)]
    if here.in_user:
        choices += ["wfi", "sret", "sfence.vma", f"li a7, {here.rng.getrandbits(20):#x}\necall"]
    else:
        choices += [f"li a7, {here.rng.getrandbits(16) | 1 << 24:#x}\necall"]
    return here.rng.choice(choices)


def fetch(here: Surroundings) -> str:
    """A jump to where no code is; the handler comes back by the resume register."""
    rng = here.rng
    if here.mode:
        target = rng.choice((rng.getrandbits(64), 0x80200000 + 8 * 4096, 1 << 47, 0x4000_0000_0000_0000)) & ~1
    else:
        target = 0x2_0000_0000
    base = register(here, nonzero=True)
    label = here.label()
    text = f"la x{here.resume_register}, {label}\nli x{base}, {target:#x}\n"
    return text + f"jalr x{register(here)}, 0(x{base})\n{label}:"


def patch(here: Surroundings) -> str:
    """Writes an instruction over another one, fence.i, and runs it. Faults where code is not writable."""
    rng = here.rng
    base = register(here, nonzero=True)
    value = rng.choice([r for r in range(1, 32) if r not in here.reserved and r != base])
    label, again = here.label(), here.label()
    here.busy |= {base, value}
    rd = register(here)
    here.busy -= {base, value}
    word = (rng.getrandbits(12) << 20 | rd << 7 | 0x13) & 0xFFFFFFFF  # addi rd, x0, random
    run_first = f"j {again}\n" if rng.random() < 0.5 else ""
    text = f"la x{base}, {label}\nli x{value}, {word:#x}\n{run_first}"
    text += f"sw x{value}, 0(x{base})\nfence.i\n"
    return text + (f"{again}:\n" if run_first else "") + f"{label}: addi x{rd}, x{rd}, 1" + trace(here, rd)


def fence(here: Surroundings) -> str:
    """Fences of all sorts."""
    letters = ("iorw", "rw", "r", "w", "io", "i", "o")
    ordered = f"fence {here.rng.choice(letters)}, {here.rng.choice(letters)}"
    return here.rng.choice((ordered, "fence.i", ".word 0x8330000f", "pause", "fence"))


_BLOCK = ("cbo.clean", "cbo.flush", "cbo.inval", "cbo.zero")


def block(here: Surroundings) -> str:
    """Cache block instructions, which QEMU 7.2 does not have."""
    base = register(here, nonzero=True)
    text = f"li x{base}, {_address(here):#x}\n{here.rng.choice(_BLOCK)} (x{base})"
    return text + ("\ncsrrwi x0, senvcfg, 16" if here.rng.random() < 0.1 else "")
