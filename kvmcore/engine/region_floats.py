"""Which floating-point registers of a region hold NaN-boxed singles, and where: these are kept as floats, without their box.

A single is boxed when it is written and its box is looked at when it is read (21.2); between a write and a read in one region
neither is needed. For registers that are read as singles before they are written the region's entry looks once.
region_code.py does what is found here. Runs in the translator; never imports LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvmcore.engine.region_loops import whichever_way
from kvmcore.engine.regions import Block, Step
from kvmcore.ir.trace import Block as TraceBlock
from kvmcore.ir.trace import Op
from kvmcore.ir.value import Value

_BOX = 0xFFFFFFFF << 32


@dataclass(slots=True)
class _Uses:
    """Of one step or block: registers written as singles and otherwise, read before as singles and as all 64 bits."""

    singles: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    as_single: set[str] = field(default_factory=set)
    whole: set[str] = field(default_factory=set)


def _uses(blocks: list[TraceBlock]) -> _Uses:
    ops = [op for block in blocks for op in block.ops]
    made = {op.result.name: op for op in ops if op.result is not None}
    found = _Uses()
    for op in ops:
        name = str(op.attrs[0]) if op.opcode in ("getreg", "setreg") else "x"
        if name[0] != "f":
            continue
        if op.opcode == "setreg":
            (found.singles if _boxed(op.args[0], made) else found.others).add(name)
        else:
            assert op.result is not None
            users = {user.opcode for user in ops for arg in user.args if arg.name == op.result.name and arg.const is None}
            if "lshr" in users:
                found.as_single.add(name)
            elif users - {"trunc"}:
                found.whole.add(name)
    found.singles -= found.others
    return found


def _boxed(value: Value, made: Mapping[str, Op]) -> bool:
    if value.const is not None:
        return value.const >> 32 == 0xFFFFFFFF
    op = made.get(value.name)
    return op is not None and op.opcode == "or" and op.args[1].const == _BOX


class Floats:
    """`at`: by a block's start, registers that hold singles there whichever way it is reached."""

    def __init__(
        self, blocks: Mapping[int, Block], traces: Mapping[int, list[TraceBlock]], successors: Callable[[Step], list[int]]
    ) -> None:
        self._steps = {delta: _uses(trace) for delta, trace in traces.items()}
        self._blocks = blocks
        self._after = {start: [s for s in successors(b.steps[-1]) if s in blocks] for start, b in blocks.items()}
        singles, whole = self._read_first("as_single"), self._read_first("whole")
        names = {name for uses in self._steps.values() for name in uses.singles} | singles
        self.at: dict[int, set[str]] = {start: set(names) for start in blocks}
        self.at[0] = singles - whole
        whichever_way(blocks, successors, self.at, self.after)

    def after(self, step: Step, before: set[str]) -> set[str]:
        """What holds singles behind a step."""
        uses = self._steps[step.delta]
        return (before - uses.others) | uses.singles

    def _read_first(self, kind: str) -> set[str]:
        """Registers that some way from the region's head reads so before it writes them."""
        wanted: dict[int, set[str]] = {}
        kills: dict[int, set[str]] = {}
        for start, block in self._blocks.items():
            wanted[start], kills[start] = set(), set()
            for step in block.steps:
                uses = self._steps[step.delta]
                wanted[start] |= getattr(uses, kind) - kills[start]
                kills[start] |= uses.singles | uses.others
        changed = True
        while changed:
            changed = False
            for start in self._blocks:
                come = set().union(*(wanted[s] for s in self._after[start])) - kills[start] - wanted[start]
                if come:
                    wanted[start] |= come
                    changed = True
        return wanted[0]
