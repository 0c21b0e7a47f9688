"""Tier 2 without a translator process: regions are compiled here, and installed before the code runs again.

Each case is run twice from the same state: first by the interpreter, which decodes the pages, then with regions at
instructions that were executed. So everything that can be translated is, however cold. Used by differential tests.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from functools import cache

from kvmcore.engine import machine_state
from kvmcore.engine.loader import ARENA_BYTES, Image
from kvmcore.engine.machine import Machine
from kvmcore.engine.region_compiler import compile_region
from kvmcore.engine.regions import LIMIT, Code, discover
from kvmcore.engine.translation import identity_of, mark_of
from tests.framework.cases import WINDOW, Case, Outcome
from tests.framework.engine_peer import EnginePeer, native_image

_SECRET = bytes(32)


@cache
def arena(image: Image) -> mmap.mmap:
    """This process's arena of an image, mapped behind it."""
    fd = os.memfd_create("regions")
    os.ftruncate(fd, ARENA_BYTES)
    image.map_arena(fd)
    return mmap.mmap(fd, ARENA_BYTES)


class Regions:
    """Compiles and installs regions in one machine's decoded pages."""

    def __init__(self, machine: Machine, image: Image) -> None:
        self._machine, self._image = machine, image
        self._memory = arena(image)
        machine.state.regions = image.arena
        self._used = 0
        self.installed = 0

    def pages(self) -> list[int]:
        """Addresses of the decoded pages that are in use."""
        start, used = self._machine.state.pool, self._machine.state.pool_used
        bases = range(start, start + used, machine_state.PAGE_STRIDE)
        return [base for base in bases if ctypes.c_uint64.from_address(base + machine_state.PAGE_HOST).value]

    @staticmethod
    def content(base: int) -> bytes:
        """The bytes that a page was decoded from."""
        return ctypes.string_at(base + machine_state.PAGE_COPY, 4096)

    def decoded(self, base: int) -> list[int]:
        """Offsets in the page of instructions that have been decoded and lead to no region."""
        records = (ctypes.c_uint64 * 2048).from_address(base + machine_state.PAGE_RECORDS)
        return [2 * i for i, record in enumerate(records) if record and record & 0xFFFFFFFF < self._image.arena]

    def install(self, base: int, offset: int, neighbours: dict[int, int] | None = None, limit: int = LIMIT) -> bool:
        """A region whose head is there; `neighbours`: decoded pages by their number relative to this one."""
        bases = {0: base, **(neighbours or {})}
        contents = {number: self.content(at) for number, at in bases.items()}
        marks = {number: mark_of(identity_of(_SECRET, content)) for number, content in contents.items()}
        for number, at in bases.items():
            ctypes.c_uint64.from_address(at + machine_state.PAGE_IDENTITY).value = marks[number]
        code = Code(contents, offset)
        region = discover(code, limit)
        if region is None:
            return False
        blob = compile_region(code, region, self._image.functions, marks)
        if self._used + len(blob) > ARENA_BYTES:
            self._used = 0  # earlier cases' regions are not entered any more
        self._memory[self._used : self._used + len(blob)] = blob
        record = base + machine_state.PAGE_RECORDS + offset // 2 * machine_state.RECORD
        operands = self._image.decode(contents[0], offset) >> 32 << 32
        ctypes.c_uint64.from_address(record).value = operands | (self._image.arena + self._used)
        self._used += -(-len(blob) // 64) * 64
        self.installed += 1
        return True


class TranslatedPeer(EnginePeer):
    """Every case runs in regions, as far as its instructions can be translated."""

    def __init__(self, limit: float = 1.0, heads: int = 2, rounds: int = 1) -> None:
        """`heads`: regions of a page at most, besides the one at the case's start."""
        super().__init__(limit, rounds=rounds)
        self._heads = heads
        self.regions = Regions(self._machine, native_image())

    def _begin(self, case: Case) -> None:
        state = self.hart.state
        super()._begin(case)
        before = state.icount
        self._first = self._until_end(case), state.icount - before
        super()._begin(case)
        choice = random.Random(case.pc ^ len(case.image))
        for base in self.regions.pages():
            gpa = ctypes.c_uint64.from_address(base).value
            offsets = self.regions.decoded(base)
            if not offsets or self._content(gpa) != self.regions.content(base):
                continue  # the first run has changed its own code
            self._translate(base, offsets, choice, case.pc & 4095 if gpa == case.pc & ~4095 else -1)

    def _translate(self, base: int, offsets: list[int], choice: random.Random, first: int) -> None:
        """One page, of which `offsets` were executed, `first` first of all."""
        heads = set(choice.sample(offsets, min(self._heads, len(offsets))))
        if first in offsets:
            heads.add(first)
        for offset in heads:
            self.regions.install(base, offset)

    def _content(self, gpa: int) -> bytes:
        return self._memory[gpa - WINDOW : gpa - WINDOW + 4096]

    def _run(self, case: Case) -> Outcome:
        self._begin(case)
        before = self.hart.state.icount
        status = self._until_end(case, self._rounds)
        retired = self.hart.state.icount - before
        self.retired += retired
        if status == self._first[0] == "done" and self._rounds == 1:
            assert retired == self._first[1], f"{case.name}: {retired} instructions retired, not {self._first[1]}"
        return self._outcome(status)
