"""Which accesses of a region share one look at the TLB: those by one pointer, a few bytes apart.

A pointer is a register from where it is set to where it is set again: all ways by which one access may have got its
address belong together (a web of definitions and uses). Moving it along (addi rd, rd, imm) keeps it the same pointer,
though what was found out about it is void. region_code.py makes the checks. Runs in the translator; never imports LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvmcore.engine.regions import Region, Step
from kvmcore.ir.trace import Block as TraceBlock
from kvmcore.ir.trace import Op

#: Bytes that one check is for at most: the larger, the more often they lie on two pages.
SPAN = 512
#: Pointers whose page is kept from one round of a loop to the next, at most.
KEPT = 12


@dataclass(frozen=True, slots=True)
class Pointer:
    """Accesses at [register + low, register + high). Variables: gd.NAME host minus guest address of them, 0 if not known.

    kept: of the memory that it was in the last time, cb.NAME is the address, cs.NAME how far from there the accesses may begin
    (0: nothing is kept), ca.NAME host minus guest address.
    """

    name: str
    low: int
    high: int
    writes: bool
    kept: bool


@dataclass(frozen=True, slots=True)
class Access:
    """The load or store of a step: at register + offset."""

    register: int
    offset: int
    size: int
    write: bool


def access_of(blocks: list[TraceBlock]) -> Access | None:
    """A step's only access, if its address is a register and a constant."""
    ops = [op for block in blocks for op in block.ops]
    found = [op for op in ops if op.opcode in ("gload", "gstore")]
    if len(found) != 1:
        return None
    op = found[0]
    by_name = {other.result.name: other for other in ops if other.result is not None}
    if op.opcode == "gload":
        assert op.result is not None
        size = op.result.width // 8
    else:
        size = op.args[1].width // 8
    at, offset = by_name.get(op.args[0].name), 0
    if at is not None and at.opcode == "add" and at.args[1].const is not None:
        offset = at.args[1].signed
        at = by_name.get(at.args[0].name)
    if at is None or not _reads_x(at):
        return None
    return Access(int(str(at.attrs[0])[1:]), offset, size, op.opcode == "gstore")


def _reads_x(op: Op) -> bool:
    return op.opcode == "getreg" and str(op.attrs[0])[0] == "x"


def moves(step: Step, register: int) -> bool:
    """Whether a step sets a register to itself and a little more."""
    return step.row.function.__name__ == "addi" and step.operands.get("rs1") == register == step.operands.get("rd")


class Pointers:
    """Of one region: `at` by the access's step, `set` those that begin anew when a step has set a register."""

    def __init__(
        self,
        region: Region,
        traces: Mapping[int, list[TraceBlock]],
        written: Mapping[int, frozenset[str]],
        successors: Callable[[Step], list[int]],
        loops: set[int],
    ) -> None:
        """`written`: names of the registers that a step sets; `loops`: starts of blocks that are in loops."""
        self._blocks = region.blocks
        self._written = {
            delta: [int(name[1:]) for name in names if name[0] == "x"] for delta, names in written.items()
        }
        self._after = {
            start: [s for s in successors(block.steps[-1]) if s in self._blocks] for start, block in self._blocks.items()
        }
        self._access = {delta: access for delta, blocks in traces.items() if (access := access_of(blocks)) is not None}
        self._parent: dict[tuple[int, int], tuple[int, int]] = {}
        self.at: dict[int, Pointer] = {}
        self.set: dict[tuple[int, int], Pointer] = {}
        """(step, register) -> the pointer that the register is from there on."""
        self._choose(self._webs(), loops)

    @property
    def all(self) -> list[Pointer]:
        return sorted({pointer.name: pointer for pointer in self.at.values()}.values(), key=lambda pointer: pointer.name)

    # -- webs: a node is (where, register), where being a step that sets it or, odd, a block's start ------------------
    def _find(self, node: tuple[int, int]) -> tuple[int, int]:
        while (parent := self._parent.get(node, node)) != node:
            node = parent
        return node

    def _webs(self) -> dict[int, tuple[int, int]]:
        """The node of each access's register."""
        wanted = self._live()
        used: dict[int, tuple[int, int]] = {}
        for start, block in self._blocks.items():
            now = {register: _begin(start, register) for register in wanted[start]}
            for step in block.steps:
                access = self._access.get(step.delta)
                if access is not None:
                    used[step.delta] = now.setdefault(access.register, _begin(start, access.register))
                for register in self._written[step.delta]:
                    if not moves(step, register):
                        now[register] = (step.delta, register)
            for successor in self._after[start]:
                for register in wanted[successor]:
                    here, there = self._find(now.get(register, _begin(start, register))), _begin(successor, register)
                    self._parent[here] = self._find(there)
        return {delta: self._find(node) for delta, node in used.items()}

    def _live(self) -> dict[int, set[int]]:
        """For each block the registers by which something is accessed before they are set anew."""
        uses: dict[int, set[int]] = {}
        kills: dict[int, set[int]] = {}
        for start, block in self._blocks.items():
            uses[start], kills[start] = set(), set()
            for step in block.steps:
                access = self._access.get(step.delta)
                if access is not None and access.register not in kills[start]:
                    uses[start].add(access.register)
                kills[start].update(r for r in self._written[step.delta] if not moves(step, r))
        live = {start: set(used) for start, used in uses.items()}
        changed = True
        while changed:
            changed = False
            for start in self._blocks:
                come = set().union(*(live[s] for s in self._after[start])) - kills[start] - live[start]
                if come:
                    live[start] |= come
                    changed = True
        return live

    # -- what is shared -------------------------------------------------------------------------------------------
    def _choose(self, webs: Mapping[int, tuple[int, int]], loops: set[int]) -> None:
        where = {step.delta: start for start, block in self._blocks.items() for step in block.steps}
        sites: dict[tuple[int, int], list[int]] = {}
        for delta, web in webs.items():
            sites.setdefault(web, []).append(delta)
        names: dict[tuple[int, int], Pointer] = {}
        kept = 0
        for web, deltas in sorted(sites.items(), key=lambda item: -sum(where[d] in loops for d in item[1])):
            chosen = self._densest(deltas)
            accesses = [self._access[delta] for delta in chosen]
            keeps = kept < KEPT and any(where[delta] in loops for delta in chosen)
            kept += keeps
            pointer = Pointer(
                f"p{len(names)}",
                min(access.offset for access in accesses),
                max(access.offset + access.size for access in accesses),
                any(access.write for access in accesses),
                keeps,
            )
            names[web] = pointer
            self.at.update(dict.fromkeys(chosen, pointer))
        for start, block in self._blocks.items():
            now: dict[int, tuple[int, int]] = {}
            for step in block.steps:
                for register in self._written[step.delta]:
                    if not moves(step, register):
                        now[register] = (step.delta, register)
                    found = names.get(self._find(now.get(register, _begin(start, register))))
                    if found is not None:
                        self.set[step.delta, register] = found

    def _densest(self, deltas: list[int]) -> list[int]:
        """As many accesses as lie within SPAN bytes."""
        ordered = sorted(deltas, key=lambda delta: self._access[delta].offset)
        best: list[int] = []
        for index, first in enumerate(ordered):
            low = self._access[first].offset
            near = [d for d in ordered[index:] if self._access[d].offset + self._access[d].size - low <= SPAN]
            if len(near) > len(best):
                best = near
        return best


def _begin(start: int, register: int) -> tuple[int, int]:
    """The node of a register at a block's start. Steps' deltas are even, so it is no step's."""
    return 2 * start + 1, register
