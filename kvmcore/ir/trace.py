"""Tracing: run a semantics function over unknown Values and record every path through it.

A path is recorded by running the function; each `if` on an unknown condition is a decision. The function is
run again for the other side of every decision, so the result is a decision tree of `Block`s. Re-execution is
deterministic: while a known prefix is replayed, each operation is checked against the recorded one.
Called by the emitters (emit.py and, for regions, the translator). Knows nothing of LLVM or RISC-V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvmcore.ir import value as value_module
from kvmcore.ir.value import Value


@dataclass(slots=True)
class Op:
    """One recorded operation: `result` is None for pure effects; `attrs` are constants of the opcode."""

    opcode: str
    args: tuple[Value, ...]
    attrs: tuple[object, ...]
    result: Value | None


@dataclass(slots=True)
class Block:
    """Straight-line operations, then either a decision (condition and two blocks) or the path's end."""

    number: int
    ops: list[Op] = field(default_factory=list)
    condition: Value | None = None
    if_true: Block | None = None
    if_false: Block | None = None


class PathEnd(Exception):
    """Raised (or subclassed) by a traced function to end the path before its last line."""


class TraceError(Exception):
    """The traced function cannot be traced: too many paths, or it did not run the same way twice."""


class Tracer:
    """Records the operations of one function; `pure` and `effect` are what Values and harts call."""

    def __init__(self, max_paths: int = 4096, prefix: str = "") -> None:
        """`prefix` begins the name of every result: traces that share a function need different ones."""
        self._prefix = prefix
        self.root = Block(0)
        self.blocks: list[Block] = [self.root]
        self._max_paths = max_paths
        self._waiting: list[list[bool]] = []
        self._replay: list[bool] = []

    def trace(self, function: Callable[[], None]) -> Block:
        """Run `function` once per path; returns the root of the tree."""
        self._waiting = [[]]
        paths = 0
        while self._waiting:
            paths += 1
            if paths > self._max_paths:
                raise TraceError(f"more than {self._max_paths} paths: use select() or a routine")
            self._run(function, self._waiting.pop())
        return self.root

    def _run(self, function: Callable[[], None], decisions: list[bool]) -> None:
        self._replay = decisions
        self._taken: list[bool] = []
        self._block, self._cursor = self.root, 0
        self._known: dict[tuple[object, ...], Value] = {}
        self._decided: dict[tuple[int, int | str], bool] = {}
        outer, value_module.active = value_module.active, self
        try:
            function()
        except PathEnd:
            pass
        finally:
            value_module.active = outer
        if len(self._taken) < len(decisions):
            raise TraceError("the function did not reach a decision that it reached before")

    # -- what Values and harts call ----------------------------------------------------------------------
    def pure(self, opcode: str, args: tuple[Value, ...], width: int, attrs: tuple[object, ...] = ()) -> Value:
        """An operation without effect: recorded once per path for the same operands."""
        key = (opcode, attrs, *(arg.key for arg in args))
        if key not in self._known:
            result = self._record(opcode, args, width, attrs)
            assert result is not None
            self._known[key] = result
        return self._known[key]

    def effect(
        self, opcode: str, args: Sequence[Value], width: int = 0, attrs: tuple[object, ...] = ()
    ) -> Value:
        """An operation whose order matters (state, memory, flags, jumps); width 0 means no result."""
        result = self._record(opcode, tuple(args), width, attrs)
        return result if result is not None else Value(1, 0)

    def decide(self, condition: Value) -> bool:
        """Which way this run takes an `if`; the other way is noted for a later run."""
        if condition.key in self._decided:
            return self._decided[condition.key]
        depth = len(self._taken)
        if depth < len(self._replay):
            way = self._replay[depth]
        else:
            way = True
            self._waiting.append([*self._taken, False])
        block = self._block
        if block.condition is None:
            block.condition = condition
            block.if_true, block.if_false = self._new_block(), self._new_block()
        elif block.condition.key != condition.key:
            raise TraceError("a decision changed between two runs of the function")
        successor = block.if_true if way else block.if_false
        assert successor is not None
        self._block, self._cursor = successor, 0
        self._taken.append(way)
        self._decided[condition.key] = way
        return way

    # -- recording -------------------------------------------------------------------------------------------
    def _new_block(self) -> Block:
        block = Block(len(self.blocks))
        self.blocks.append(block)
        return block

    def _record(
        self, opcode: str, args: tuple[Value, ...], width: int, attrs: tuple[object, ...]
    ) -> Value | None:
        block = self._block
        if self._cursor < len(block.ops):
            op = block.ops[self._cursor]
            if op.opcode != opcode or op.attrs != attrs or [a.key for a in op.args] != [a.key for a in args]:
                raise TraceError(f"{opcode}: recorded as {op.opcode} in an earlier run")
        else:
            name = f"{self._prefix}v{block.number}_{len(block.ops)}"
            op = Op(opcode, args, attrs, Value(width, None, name) if width else None)
            block.ops.append(op)
        self._cursor += 1
        return op.result
