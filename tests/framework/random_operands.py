"""Random operands of instructions, by the kinds of encodings.FORMS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.framework.encodings import ROUNDING

if TYPE_CHECKING:
    from tests.framework.random_programs import Surroundings

_NUMBERS = {
    "imm12": (-2048, 2047, 1), "imm20": (0, 0xFFFFF, 1), "shamt6": (0, 63, 1), "shamt5": (0, 31, 1),
    "zimm": (0, 31, 1), "imm6": (-32, 31, 1), "uimm10x4": (4, 1020, 4), "shamt6n": (1, 63, 1),
}  # fmt: skip


def register(here: Surroundings, nonzero: bool = False, compressed: bool = False) -> int:
    """A register that may be written."""
    while True:
        number = here.rng.randrange(8, 16) if compressed else here.rng.randrange(32)
        if number not in here.reserved and number not in here.busy and (number or not nonzero):
            return number


def source(here: Surroundings) -> int:
    """A register to read."""
    return here.rng.randrange(32)


def _number(here: Surroundings, low: int, high: int, step: int) -> str:
    rng = here.rng
    edges = [v for v in (low, high - (high - low) % step, 0, step, -step) if low <= v <= high]
    return str(rng.choice(edges) if rng.random() < 0.25 else rng.randrange(low, high + 1, step))


def operand(here: Surroundings, kind: str) -> str:
    """One operand, in text."""
    rng = here.rng
    if kind in _NUMBERS:
        return _number(here, *_NUMBERS[kind])
    match kind:
        case "rd":
            return f"x{register(here)}"
        case "rdn":
            return f"x{register(here, nonzero=True)}"
        case "rd'":
            return f"x{register(here, compressed=True)}"
        case "rdlui":
            while (number := register(here, nonzero=True)) == 2:
                pass
            return f"x{number}"
        case "rs1" | "rs2" | "crs2":
            return f"x{source(here)}"
        case "rs2n":
            return f"x{rng.randrange(1, 32)}"
        case "rs1'" | "rs2'":
            return f"x{rng.randrange(8, 16)}"
        case "frd" | "frs1" | "frs2" | "frs3" | "cfrs2":
            return f"f{rng.randrange(32)}"
        case "frd'" | "frs2'":
            return f"f{rng.randrange(8, 16)}"
        case "rm":
            return rng.choice(list(ROUNDING)) if rng.random() < 0.95 else rng.choice(("5", "6"))
        case "sp":
            return "sp"
        case "immlui":
            value = rng.choice((*range(1, 32), *range(0xFFFE0, 0x100000)))
            return str(value)
        case "imm10x16":
            return str(rng.choice([v for v in range(-512, 512, 16) if v]))
    raise KeyError(kind)
