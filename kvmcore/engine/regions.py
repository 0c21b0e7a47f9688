"""Finds what a region is to be: the instructions reachable from a hot one, and how control flows between them.

Works on the bytes of code pages alone; offsets ("deltas") count from the region's head, so that the same bytes
give the same region wherever they are mapped. Read by region_code.py, which makes LLVM IR of it. Runs in the
translator; never imports LLVM.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvmcore.isa import rv64a, rv64d, rv64f, rv64i, rv64m, zba, zbb, zbs
from kvmcore.isa.describe import Insn
from kvmcore.isa.table import find

PAGE = 4096
#: Instructions of a region at most.
LIMIT = 160
#: Calls followed into one another at most; deeper ones leave the region.
CALL_DEPTH = 4
#: Branches and calls between the head and straight code that the limit cuts, at most, for the rest to be a region of its own.
_CUT_DISTANCE = 3
#: Bytes that an auipc and a jalr may go far, as a jal may.
_NEAR = 1 << 20

_TRANSLATED = frozenset(module.__name__ for module in (rv64i, rv64m, rv64a, rv64f, rv64d, zba, zbb, zbs))
_LINKS = (1, 5)
"""ra and t0: what the calling convention returns by (Unprivileged ISA, 2.5.1)."""
_CONDITIONAL = frozenset(("beq", "bne", "blt", "bge", "bltu", "bgeu"))


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a region.

    known: where a jalr goes to, if the auipc before it says so.
    """

    delta: int
    raw: int
    row: Insn
    operands: dict[str, int]
    known: int | None = None

    @property
    def kind(self) -> str:
        """ "branch", "jal", "jalr" or "plain"."""
        name = self.row.function.__name__
        if self.row.function.__module__ != rv64i.__name__:
            return "plain"
        if self.known is not None:
            return "jal"
        return "branch" if name in _CONDITIONAL else name if name in ("jal", "jalr") else "plain"

    @property
    def next(self) -> int:
        return self.delta + self.row.length

    @property
    def target(self) -> int:
        return self.known if self.known is not None else self.delta + self.operands["imm"]

    @property
    def calls(self) -> bool:
        """It writes a link register: what follows is where a return comes back to."""
        return self.kind in ("jal", "jalr") and self.operands["rd"] in _LINKS

    @property
    def returns(self) -> bool:
        return self.kind == "jalr" and self.operands["rs1"] in _LINKS and self.operands["rd"] not in _LINKS


@dataclass(slots=True)
class Block:
    """Steps that are always run one after the other, from `start`; other blocks jump only to its start."""

    start: int
    steps: list[Step] = field(default_factory=list)


@dataclass(slots=True)
class Region:
    """What is translated at once. `blocks` by their start; the one at 0 is the head.

    return_sites: where calls of this region come back to, each a block. cut: where straight code near the head goes on that
    was too much for this region. No sample falls there, for only taken branches take samples, and the next one may lead to a
    region: whoever has this one translated should have that one as well.
    """

    blocks: dict[int, Block]
    return_sites: list[int]
    cut: int | None = None

    @property
    def instructions(self) -> int:
        return sum(len(block.steps) for block in self.blocks.values())

    @property
    def steps(self) -> list[Step]:
        return [step for block in self.blocks.values() for step in block.steps]


class Code:
    """The bytes of one or more guest pages, addressed by offset from the head."""

    def __init__(self, pages: Mapping[int, bytes], offset: int) -> None:
        """`pages`: content by page number, the head's page being 0; `offset`: of the head in its page.

        `wanted` collects the numbers of pages that discovery would have gone on in.
        """
        self._pages, self.offset = pages, offset
        self._decoded: dict[int, Step | None] = {}
        self.wanted: set[int] = set()

    def step(self, delta: int) -> Step | None:
        """The instruction there; None if it cannot be part of a region, or its bytes are not at hand."""
        if delta not in self._decoded:
            self._decoded[delta] = self._decode(delta)
        return self._decoded[delta]

    def page(self, delta: int) -> int:
        """The number of the page that a delta lies in."""
        return (self.offset + delta) // PAGE

    def _decode(self, delta: int) -> Step | None:
        page, at = divmod(self.offset + delta, PAGE)
        if page not in self._pages:
            self.wanted.add(page)
            return None
        if at > PAGE - 2:
            return None
        raw = int.from_bytes(self._pages[page][at : at + 4], "little")
        if raw & 3 == 3:
            if at > PAGE - 4:
                return None  # on two pages: the interpreter's
        else:
            raw &= 0xFFFF
        row = find(raw)
        if row is None or row.function.__module__ not in _TRANSLATED:
            return None
        return Step(delta, raw, row, {operand.name: operand.decode(raw) for operand in row.operands})


def discover(code: Code, limit: int = LIMIT, behind: bool = False) -> Region | None:
    """The region whose head is at delta 0: nearest instructions first. None if there is none.

    Near means few taken branches away; a call's body and what follows the call are equally near. `behind`: the head is
    where another region was cut; then this one is cut only before the first branch, so that a row of them has an end.
    """
    steps: dict[int, Step] = {}
    leaders = {0}
    return_sites: set[int] = set()
    cut: int | None = None
    waiting: list[tuple[int, int, int]] = [(0, 0, 0)]  # distance, depth of calls, delta
    while waiting and len(steps) < limit:
        distance, depth, delta = heapq.heappop(waiting)
        before: Step | None = None
        while len(steps) < limit:
            if delta in steps:
                leaders.add(delta)
                break
            step = code.step(delta)
            if step is None:
                break
            if before is not None:
                step = _together(before, step)
            steps[delta] = before = step
            if step.kind == "plain":
                delta = step.next
                continue
            if step.kind == "branch":
                for successor in (step.next, step.target):
                    leaders.add(successor)
                    heapq.heappush(waiting, (distance + 1, depth, successor))
            elif step.kind == "jal" and not step.calls:
                leaders.add(step.target)
                heapq.heappush(waiting, (distance + 1, depth, step.target))
            elif step.calls:
                return_sites.add(step.next)
                leaders.add(step.next)
                heapq.heappush(waiting, (distance + 1, depth, step.next))
                if step.kind == "jal" and depth < CALL_DEPTH:
                    leaders.add(step.target)
                    heapq.heappush(waiting, (distance + 1, depth + 1, step.target))
            break
        else:
            if distance <= (0 if behind else _CUT_DISTANCE) and delta not in steps:
                cut = delta
    if 0 not in steps:
        return None
    leaders |= {step.next for step in steps.values() if code.page(step.next) != code.page(step.delta)}  # it is looked at
    return Region(_blocks(steps, leaders), sorted(site for site in return_sites if site in steps), cut)


def _together(first: Step, second: Step) -> Step:
    """A jalr behind the auipc that it belongs to, which is how calls are made that the linker has not made a jal."""
    if second.kind != "jalr" or first.row.function is not rv64i.auipc or first.operands["rd"] != second.operands["rs1"]:
        return second
    far = (first.operands["imm"] + (1 << 31)) % (1 << 32) - (1 << 31)
    target = (first.delta + far + second.operands["imm"]) & ~1
    return replace(second, known=target) if abs(target) < _NEAR else second


def _blocks(steps: dict[int, Step], leaders: set[int]) -> dict[int, Block]:
    """Cut the steps at leaders. A step in the middle of another one's bytes begins a block of its own."""
    follows = {step.next for step in steps.values() if step.kind in ("plain", "branch")}
    starts = {delta for delta in steps if delta in leaders or delta not in follows}
    reached: dict[int, int] = {}
    for step in steps.values():  # two ways of falling into one step: it is a start
        if step.kind == "plain":
            reached[step.next] = reached.get(step.next, 0) + 1
    starts |= {delta for delta, ways in reached.items() if ways > 1 and delta in steps}
    for start in starts:  # what is jumped to may come without the auipc
        steps[start] = replace(steps[start], known=None)
    blocks = {}
    for start in sorted(starts):
        block = Block(start)
        delta = start
        while True:
            step = steps[delta]
            block.steps.append(step)
            delta = step.next
            if step.kind != "plain" or delta not in steps or delta in starts:
                break
        blocks[start] = block
    return blocks
