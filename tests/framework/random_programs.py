"""Random guest programs for the differential tests: layout, start state, and assembly into a Case.

A Program is a list of items (snippets of assembly, random_profiles.py) and the surroundings they run in:
bare or under Sv39/Sv48, in S or U mode, with random registers. Everything follows from the seed, so a
failure can be repeated, and items can be taken out one by one to find the ones that matter
(differential.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.framework import random_profiles, random_values
from tests.framework.asm import Assembler, assemble_files
from tests.framework.asm import Program as Assembled
from tests.framework.cases import END, SSTATUS_FS, WINDOW, WINDOW_SIZE, Case
from tests.framework.random_paging import SV39, SV48, A, D, G, R, Tables, U, V, W, X, random_base, random_bits

PAGE = 4096
CODE, CODE_PAGES = WINDOW, 5
HANDLER = WINDOW + 6 * PAGE
CONTROL = WINDOW + 7 * PAGE
LOG = WINDOW + 8 * PAGE
TRACE = WINDOW + 9 * PAGE
DATA, DATA_PAGES = WINDOW + 10 * PAGE, 6
POOL, POOL_PAGES = WINDOW + 16 * PAGE, 16
MAPPED_PAGES = 24
"""Pages of the random data region."""
TO_SUPERVISOR = 0x0A5E55
"""a7 of an ecall from U that asks the handler to go on in S."""
SUM, MXR = 1 << 18, 1 << 19


@dataclass
class Surroundings:
    """What items may refer to. Addresses are those that the body uses, in its own mode."""

    rng: random.Random
    user: bool
    mode: int
    """satp mode: 0, SV39 or SV48"""
    trace: int = TRACE
    data: list[tuple[int, int]] = field(default_factory=list)
    """(address, size) of regions to load from and store to"""
    entries: list[tuple[int, int]] = field(default_factory=list)
    """paged: (address of a page table entry as S-mode sees it, the page that it maps)"""
    delta: int = 0
    """U-mode's address of the code minus S-mode's"""
    trace_register: int = 0
    resume_register: int = 0
    satp: int = 0
    fpu: bool = True
    labels: int = 0
    traced: int = 0
    tracing: bool = True
    in_user: bool = False
    """U-mode at this point of the program"""
    busy: set[int] = field(default_factory=set)
    """registers that the item being made needs for itself"""
    to_supervisor: int = TO_SUPERVISOR

    def label(self) -> str:
        """A label that no other item uses."""
        self.labels += 1
        return f"L{self.labels}"

    @property
    def reserved(self) -> set[int]:
        """Registers that items must not write."""
        return {self.trace_register, self.resume_register}


@cache
def handler() -> Assembled:
    """The trap handler's page."""
    return assemble_files(Path(__file__).with_name("random_handler.S"), base=HANDLER, END=END, TO_SUPERVISOR=TO_SUPERVISOR)


class Program:
    """One random program. `items` may be cut down before build()."""

    def __init__(self, seed: int, profile: str, length: int = 60) -> None:
        self.seed, self.profile = seed, profile
        rng = random.Random(f"{profile}/{seed}")
        weights = random_profiles.PROFILES[profile]
        mode = rng.choice((0, SV39, SV39, SV48)) if weights.paged is None else rng.choice(weights.paged)
        user = rng.random() < (0.35 if mode else 0.2)
        here = Surroundings(rng, user, mode)
        self.surroundings = here
        here.in_user = user
        free = [r for r in range(1, 32) if r not in (2, 10, 11, 17)]  # used by name: sp, and ecall
        here.trace_register, here.resume_register = rng.sample(free, 2)
        self._image = bytearray(WINDOW_SIZE)
        self.case = self._start(here, weights)
        self._offset = rng.choice((0, 2, 64, PAGE - 30, 2 * PAGE - 42, rng.randrange(0, 2 * PAGE, 2)))
        self.items = [random_profiles.item(here, weights) for _ in range(length)]

    def _start(self, here: Surroundings, weights: random_profiles.Profile) -> Case:
        """Memory but for the code, registers and CSRs."""
        rng, image = here.rng, self._image
        at = DATA - WINDOW
        image[at : at + DATA_PAGES * PAGE] = b"".join(
            random_values.integer(rng).to_bytes(8, "little") for _ in range(DATA_PAGES * PAGE // 8)
        )
        here.data = [(DATA, DATA_PAGES * PAGE)]
        if here.mode:
            self._map(here, weights)
        case = Case(b"", user=here.user, name=f"{self.profile} {self.seed}")
        case.x = [0] + [random_values.integer(rng) for _ in range(31)]
        case.f = [random_values.floating(rng) for _ in range(32)]
        case.x[here.trace_register], case.x[here.resume_register] = here.trace, 0
        here.fpu = rng.random() < 0.9
        sstatus = SSTATUS_FS if here.fpu else 0
        sstatus |= rng.choice((0, SUM)) | rng.choice((0, MXR)) | rng.choice((0, 0x20)) | 2 << 32
        case.csrs |= {
            "fcsr": rng.getrandbits(5) | rng.choice((0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 7)) << 5,
            "sstatus": sstatus,
            "stvec": HANDLER | rng.getrandbits(1),
            "scounteren": rng.choice((7, 0, 2, 5, 0xFFFFFFFF)),
            "senvcfg": 0 if weights.qemu else rng.choice((0, 0xD0, 0xF0, 0xF0, 0x40, 0x80, 0x10)),
            "sscratch": CONTROL,
            "satp": here.satp,
        }
        return case

    def _map(self, here: Surroundings, weights: random_profiles.Profile) -> None:
        """Identity for S-mode, an alias of code and trace for U-mode, and a region of random entries."""
        rng = here.rng
        pool = [POOL + i * PAGE for i in range(POOL_PAGES)]
        tables = Tables(self._image, WINDOW, pool, here.mode)
        ad = A | D
        # Code that is writable must not be where random stores go: they come without fence.i.
        code = (R, 0, R | W) if weights.patches else (R, 0)
        for page in range(CODE, HANDLER + PAGE, PAGE):
            tables.map(page, page, V | X | ad | rng.choice((0, G)) | rng.choice(code))
        for page in range(CONTROL, WINDOW + WINDOW_SIZE, PAGE):
            tables.map(page, page, V | R | W | ad)
        writable = weights.patches and rng.random() < 0.5
        alias = random_base(rng, here.mode, edges=not writable)
        for index in range(CODE_PAGES + 1):
            bits = V | X | U | rng.choice((A, 0)) | rng.choice((R, 0))
            tables.map(alias + index * PAGE, CODE + index * PAGE, bits | (W | R if writable else 0))
        here.delta = alias - CODE
        while (region := random_base(rng, here.mode)) == alias:
            pass
        for index in range(MAPPED_PAGES):
            va = region + index * PAGE
            pa = DATA + rng.randrange(DATA_PAGES) * PAGE
            bits = random_bits(rng)
            high = rng.choice((1 << 54, 1 << 63, 3 << 61)) if rng.random() < 0.03 else 0
            entry = tables.map(va, pa, bits | high)
            here.entries.append((entry, va))
        if rng.random() < 0.3:  # somewhere a superpage with an address that it cannot have, or bits on a branch
            slot = tables.slot(region + (1 << 21) & (1 << 64) - 1, 1)
            kind = rng.choice((V | R | W | ad, V | A, V | D, V | U, V | W, V | R | W | U | ad))
            tables.write(slot, DATA >> 12 << 10 | kind)
            here.data.append((region + (1 << 21) & (1 << 64) - 1, PAGE))
        here.data += [(region, MAPPED_PAGES * PAGE)] * 4
        if here.user:
            here.trace = alias + (CODE_PAGES + 1) * PAGE
            tables.map(here.trace, TRACE, V | R | W | U | ad)
            here.data = [(region, MAPPED_PAGES * PAGE)] * 5 + [(DATA, PAGE)]
        here.satp = tables.satp(rng.choice((0, 1, 0xFFFF, rng.getrandbits(16))))

    @property
    def text(self) -> str:
        """The body in assembly."""
        lines = [item.text for item in self.items]
        return "\n".join([*lines, f"li a7, {END:#x}", "ecall", "1: j 1b"])

    def build(self) -> Case:
        """The case; AssemblyError if the body does not fit."""
        here, case = self.surroundings, self.case
        image = bytearray(self._image)
        start = CODE + self._offset
        assembler = Assembler(start)
        assembler.feed(self.text)
        code = assembler.link().image
        if len(code) > CODE_PAGES * PAGE - self._offset:
            raise ValueError(f"{case.name}: the body has {len(code)} bytes")
        image[self._offset : self._offset + len(code)] = code
        page = handler().image
        image[HANDLER - WINDOW : HANDLER - WINDOW + len(page)] = page
        words = [LOG, 100, here.delta & (1 << 64) - 1, 8 * here.resume_register]
        at = CONTROL + 256 - WINDOW
        image[at : at + 32] = b"".join(word.to_bytes(8, "little") for word in words)
        case.keep, case.fresh = (here.trace_register, here.resume_register), slice(at, at + 32)
        case.image = bytes(image)
        case.pc = (start + here.delta if here.user else start) & (1 << 64) - 1
        return case
