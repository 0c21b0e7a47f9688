"""Which integer registers of a region hold words, sign-extended from 32 bits, and where: these are kept as 32-bit variables.

Instructions on words (4.2) extend their result, and compilers keep 32-bit values so. Between a write and a read in one
region the extension is not needed. At the region's head nothing is known. region_code.py does what is found here. Runs in
the translator; never imports LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmcore.engine.region_loops import whichever_way
from kvmcore.engine.regions import Block, Step
from kvmcore.ir.trace import Block as TraceBlock
from kvmcore.ir.value import Value

_BITWISE = ("and", "or", "xor")
_LARGEST = (1 << 31) - 1


class _Step:
    """What a step does with integer registers."""

    def __init__(self, blocks: list[TraceBlock]) -> None:
        ops = [op for block in blocks for op in block.ops]
        self._made = {op.result.name: op for op in ops if op.result is not None}
        self.sets: dict[str, list[Value]] = {}
        for op in ops:
            if op.opcode == "setreg" and str(op.attrs[0])[0] == "x":
                self.sets.setdefault(str(op.attrs[0]), []).append(op.args[0])

    def _is_word(self, value: Value, words: set[str]) -> bool:
        """Whether a value is a word if these registers are."""
        if value.const is not None:
            return -_LARGEST - 1 <= value.signed <= _LARGEST
        op = self._made.get(value.name)
        if op is None:
            return False
        if op.opcode == "getreg":
            return str(op.attrs[0]) in words
        if op.opcode == "sext":  # not "zext": a byte that was loaded is 64 bits at no cost, and would have to be extended later
            return op.args[0].width <= 32
        if op.opcode == "and" and any(arg.const is not None and arg.const <= _LARGEST for arg in op.args):
            return True
        return op.opcode in _BITWISE and all(self._is_word(arg, words) for arg in op.args)

    def after(self, words: set[str]) -> set[str]:
        """The registers that are words behind the step."""
        found = words - self.sets.keys()
        return found | {name for name, values in self.sets.items() if all(self._is_word(value, words) for value in values)}


class Words:
    """`at`: by a block's start, registers that hold words there whichever way it is reached."""

    def __init__(
        self, blocks: Mapping[int, Block], traces: Mapping[int, list[TraceBlock]], successors: Callable[[Step], list[int]]
    ) -> None:
        self._steps = {delta: _Step(trace) for delta, trace in traces.items()}
        names = {name for step in self._steps.values() for name in step.sets}
        self.at: dict[int, set[str]] = {start: set(names) for start in blocks}
        self.at[0] = set()
        whichever_way(blocks, successors, self.at, self.after)

    def after(self, step: Step, before: set[str]) -> set[str]:
        """What holds words behind a step."""
        return self._steps[step.delta].after(before)
