"""Items of random programs that need S-mode: CSRs, interrupts, page tables, changes of mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.framework import random_items
from tests.framework.random_paging import A, D, R, U, V, W, X, random_bits
from tests.framework.random_values import integer

if TYPE_CHECKING:
    from tests.framework.random_programs import Surroundings

_U64 = (1 << 64) - 1
_SSTATUS = (1 << 1, 1 << 5, 1 << 8, 3 << 13, 1 << 18, 1 << 19)


def _sample(here: Surroundings, count: int) -> list[int]:
    """Different registers that may be written."""
    return here.rng.sample([r for r in range(1, 32) if r not in here.reserved and r not in here.busy], count)


def _value(here: Surroundings, name: str) -> int:
    """A value to write to a CSR: what both QEMU 7.2 and we make of it is laid down."""
    rng = here.rng
    value = integer(rng)
    match name:
        case "sstatus":  # QEMU 7.2 lets UXL be changed; FS = 1 or 2 need not become 3 at once
            return sum(bits for bits in _SSTATUS if rng.random() < (0.85 if bits == 3 << 13 else 0.4))
        case "stvec":  # QEMU ignores a write with a reserved mode, we take the mode's low bit
            return value & ~2
        case "sepc":
            return value & ~1
        case "sip":
            return value & 2
        case "scounteren":
            return value & 0xFFFFFFFF
        case "senvcfg":
            return value & 0xF1 & ~(0x20 if not value & 0x10 else 0)
        case "stimecmp":  # far away, or long ago
            return rng.choice((0, 1, _U64, 1 << 62 | value))
        case "satp":  # modes that neither has; QEMU 7.2 has Sv57
            return rng.choice((1, 2, 5, 7, 11, 12, 15)) << 60 | value & (1 << 60) - 1
    return value


def _write(here: Surroundings, name: str, rd: int, number: int) -> str:
    rng = here.rng
    if rng.random() < 0.25 and name not in ("satp", "stvec", "stimecmp", "sepc", "senvcfg"):
        immediate = rng.randrange(32)
        return f"{rng.choice(('csrrwi', 'csrrsi', 'csrrci'))} x{rd}, {name}, {immediate}"
    operation = "csrrw" if name in ("satp", "stvec", "stimecmp", "senvcfg") else rng.choice(("csrrw", "csrrs", "csrrc"))
    return f"li x{number}, {_value(here, name):#x}\n{operation} x{rd}, {name}, x{number}"


_PLAIN = ("sie", "scounteren", "senvcfg", "sepc", "scause", "stval", "sip", "stimecmp", "sstatus", "satp")
_RESTORED = ("sscratch", "stvec")
_USER = ("fflags", "frm", "fcsr")


def csr(here: Surroundings) -> str:
    """A CSR instruction, or several."""
    rng = here.rng
    first, second, third = _sample(here, 3)
    if rng.random() < 0.25:
        return counter(here)
    name = rng.choice(_USER * 2 + _PLAIN * 2 + _RESTORED)
    if name in _RESTORED and not here.in_user:
        value = _value(here, name)
        text = f"li x{third}, {value:#x}\ncsrrw x{first}, {name}, x{third}\ncsrrw x{second}, {name}, x{first}"
        return text + random_items.trace(here, second)
    if name in _RESTORED:
        name = "sie"
    text = _write(here, name, first, second)
    if rng.random() < 0.5:
        text += random_items.trace(here, first) + f"\ncsrrs x{third}, {name}, x0" + random_items.trace(here, third)
    if name == "sstatus" and here.fpu:
        text += f"\nli x{second}, 0x6000\ncsrrs x0, sstatus, x{second}" if rng.random() < 0.7 else ""
    return text


def counter(here: Surroundings) -> str:
    """Counters only go up; their values are not compared."""
    rng = here.rng
    first, second, result = _sample(here, 3)
    if rng.random() < 0.3:  # QEMU 7.2 has hpmcounter3 to 18
        return f"csrrs x{result}, {0xC03 + rng.randrange(16):#x}, x0" + random_items.trace(here, result)
    name = rng.choice(("cycle", "time", "instret"))
    text = f"csrrs x{first}, {name}, x0\nadd x0, x0, x0\ncsrrs x{second}, {name}, x0\n"
    text += f"sltu x{result}, x{second}, x{first}\nli x{first}, 0\nli x{second}, 0"
    return text + random_items.trace(here, result)


def interrupt(here: Surroundings) -> str:
    """Software and timer interrupts: pending, enabled, globally enabled, in any order; wfi with one
    pending."""
    if here.in_user:
        return random_items.trap(here)
    rng = here.rng
    number, other = _sample(here, 2)
    steps = [f"csrrsi x0, sip, 2\nli x{number}, 0x2\ncsrrs x0, sie, x{number}", "csrrsi x0, sstatus, 2"]
    if rng.random() < 0.4:
        timer = f"li x{number}, 0x20\ncsrrs x0, sie, x{number}"
        steps = ["csrrw x0, stimecmp, x0", timer, "csrrsi x0, sstatus, 2"]
    rng.shuffle(steps)
    text = "\n".join(steps) + f"\ncsrrs x{other}, sip, x0" + random_items.trace(here, other)
    if rng.random() < 0.3:
        text = "csrrci x0, sstatus, 2\ncsrrsi x0, sie, 2\ncsrrsi x0, sip, 2\nwfi\n" + text
    if rng.random() < 0.7:
        text += f"\nli x{number}, -1\ncsrrw x0, stimecmp, x{number}\ncsrrci x0, sip, 2\ncsrrci x0, sstatus, 2"
    return text


def paging(here: Surroundings) -> str:
    """Changes an entry, fences in one of the ways, and looks at the page; or changes SUM, MXR or satp."""
    rng = here.rng
    if here.in_user or not here.mode or not here.entries:
        return random_items.memory(here)
    number, address, third = _sample(here, 3)
    kind = rng.random()
    if kind < 0.15:
        bits = rng.choice((1 << 18, 1 << 19, 3 << 18))
        return f"li x{number}, {bits:#x}\n{rng.choice(('csrrs', 'csrrc'))} x0, sstatus, x{number}"
    if kind < 0.3:  # another address space, or none, for a moment: the code is mapped 1:1
        asid = rng.getrandbits(16)
        satp = rng.choice((0, here.satp & ~(0xFFFF << 44) | asid << 44))
        text = f"li x{number}, {satp:#x}\ncsrrw x{third}, satp, x{number}\n"
        text += rng.choice((f"sfence.vma\nld x{address}, 0(x{here.trace_register})\n", "sfence.vma x0, x0\n"))
        return text + f"csrrw x{number}, satp, x{third}\nsfence.vma" + random_items.trace(here, number)
    entry, page = rng.choice(here.entries)
    bits = rng.choice((random_bits(rng), V | R | W | A | D, V | R | W, V | R, V | X | A, V | R | U, 0, V | W))
    pte = (0x80200000 + (10 + rng.randrange(6)) * 4096) >> 12 << 10 | bits
    fence = rng.choice(
        (
            "sfence.vma",
            f"sfence.vma x{address}",
            f"li x{third}, {here.satp >> 44 & 0xFFFF}\nsfence.vma x0, x{third}",
        )
    )
    if rng.random() < 0.3:
        fence = "sfence.vma"
    access = rng.choice(("ld", "lb", "sd", "sb", "lwu", "sw", "amoadd.d"))
    touch = f"{access} x{third}, 8(x{address})" if access != "amoadd.d" else f"amoadd.d x{third}, x0, (x{address})"
    text = f"li x{number}, {pte:#x}\nli x{address}, {page:#x}\n"
    text += f"ld x{third}, 8(x{address})\n" if rng.random() < 0.6 else ""
    text += f"li x{third}, {entry:#x}\nsd x{number}, 0(x{third})\n{fence}\n{touch}\n"
    return text + f"li x{number}, {entry:#x}\nld x{third}, 0(x{number})" + random_items.trace(here, third)


def drop(here: Surroundings) -> str:
    """Goes to U-mode by sret, does a few things there, and comes back by ecall."""
    if here.in_user:
        return random_items.trap(here)
    rng = here.rng
    number, other = _sample(here, 2)
    label = here.label()
    text = f"la x{number}, {label}\nli x{other}, {here.delta & _U64:#x}\nadd x{number}, x{number}, x{other}\n"
    text += f"csrrw x0, sepc, x{number}\nli x{number}, 0x100\ncsrrc x0, sstatus, x{number}\n"
    text += f"csrrsi x0, sie, 0\nsret\n{label}:\n"
    here.in_user, here.tracing = True, False
    makers = (random_items.compute, random_items.memory, random_items.fp, random_items.trap, csr)
    text += "\n".join(rng.choice(makers)(here) for _ in range(rng.randint(1, 4)))
    here.in_user, here.tracing = False, True
    return text + f"\nli a7, {here.to_supervisor:#x}\necall"


def sret(here: Surroundings) -> str:
    """sret that stays in S-mode, with any interrupt enable."""
    if here.in_user:
        return "sret"
    number, other = _sample(here, 2)
    label = here.label()
    flags = here.rng.choice((0x100, 0x120))
    text = f"la x{number}, {label}\ncsrrw x0, sepc, x{number}\nli x{other}, {flags:#x}\n"
    return text + f"csrrs x0, sstatus, x{other}\nsret\n.half 0\n{label}:"
