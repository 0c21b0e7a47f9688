"""The ways through a region: its loops, and what holds whichever way a block is reached.

Read by region_code.py, region_floats.py and region_words.py; runs in the translator; never imports LLVM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmcore.engine.regions import Block, Step

Successors = Callable[[Step], list[int]]
"""Where a block goes on that ends with the step."""


def in_loops(blocks: Mapping[int, Block], successors: Successors) -> set[int]:
    """Starts of the blocks that can be reached from themselves."""
    after = {start: {s for s in successors(block.steps[-1]) if s in blocks} for start, block in blocks.items()}
    found = set()
    for start in blocks:
        seen: set[int] = set()
        waiting = list(after[start])
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += after[at]
        if start in seen:
            found.add(start)
    return found


def inner_loop(blocks: Mapping[int, Block], successors: Successors) -> set[int]:
    """The blocks of the innermost loop around the head, where that is in another loop too; else none.

    The region's entry has a copy of them. Without it LLVM would see one loop, for what begins in the middle of a loop is
    its beginning, and would not know what is done most often. Compilers put a loop in one piece: it is from the target of
    a branch back to the branch.
    """
    before: dict[int, list[int]] = {start: [] for start in blocks}
    loops = []
    for start, block in blocks.items():
        last = block.steps[-1]
        for successor in successors(last):
            if successor in blocks:
                before[successor].append(start)
                if successor <= 0 <= last.delta and last.kind != "jalr":
                    loops.append((last.delta - successor, successor, last.delta))
    if not loops:
        return set()
    _, first, end = min(loops)
    body = {start for start in blocks if first <= start <= end}
    seen: set[int] = set()
    waiting = list(before[0])
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            waiting += before[at]
    return body if seen - body else set()


def whichever_way(
    blocks: Mapping[int, Block], successors: Successors, at: dict[int, set[str]], after: Callable[[Step, set[str]], set[str]]
) -> None:
    """Take out of `at`, by a block's start, what does not hold on every way there. `after`: what holds behind a step, given
    what holds before it."""
    waiting = list(blocks)
    while waiting:
        start = waiting.pop()
        out = set(at[start])
        for step in blocks[start].steps:
            out = after(step, out)
        for successor in successors(blocks[start].steps[-1]):
            if successor in blocks and not at[successor] <= out:
                at[successor] &= out
                waiting.append(successor)
