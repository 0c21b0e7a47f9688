"""Sequences worth keeping: those that reached a protocol state, or lines of the server, that none had reached before.

Kept in a directory as replayable files; the next run starts from them. A new sequence is often made of a kept one:
an operation left out, doubled, moved, changed, or the second half taken from another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from qemu_user.fuzz import rules
from qemu_user.fuzz.sequence import Op, load, save

_LONGEST = 80


class Corpus:
    """`directory` None: in memory only. `covered` tells how many lines of the server have run (0: not watched)."""

    def __init__(self, directory: Path | None, covered: Callable[[], int] = lambda: 0) -> None:
        self._directory, self._covered = directory, covered
        self._kept: list[list[Op]] = []
        self.lines = covered()
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob("*.jsonl")):
                self._kept.append(load(path)[1])

    def __len__(self) -> int:
        return len(self._kept)

    def consider(self, ops: list[Op], new_state: bool) -> bool:
        """Keep the sequence if it reached something new."""
        lines = self._covered()
        if not new_state and lines <= self.lines:
            return False
        self.lines = max(lines, self.lines)
        self._kept.append(ops)
        if self._directory is not None:
            digest = hashlib.sha256("\n".join(str(op.to_json()) for op in ops).encode()).hexdigest()[:16]
            save(self._directory / f"{digest}.jsonl", ops)
        return True

    def wants_mutation(self, rng: Random) -> bool:
        """Half of the sequences come from kept ones once there are some."""
        return len(self._kept) >= 16 and rng.random() < 0.5

    def mutate(self, rng: Random) -> list[Op]:
        """A variation of a kept sequence."""
        ops = list(rng.choice(self._kept))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(ops)) if ops else 0
            match rng.randrange(5):
                case 0 if len(ops) > 1:
                    del ops[at]
                case 1 if ops:
                    ops.insert(rng.randrange(len(ops) + 1), ops[at])
                case 2 if ops:
                    ops.append(ops.pop(at))
                case 3:
                    other = rng.choice(self._kept)
                    ops = ops[:at] + other[rng.randrange(len(other) + 1) :]
                case _ if ops and ops[at].members:
                    members = dict(ops[at].members or {})
                    name = rng.choice(list(members))
                    if isinstance(members[name], int):
                        members[name] = rules.boundary(32)(rng)
                        ops[at] = replace(ops[at], members=members)
        return ops[:_LONGEST]

    def minimise(self, reaches: Callable[[list[Op]], set[str]]) -> int:
        """Keep only sequences that reach what smaller ones do not; how many went. `reaches` performs one."""
        before = len(self._kept)
        seen: set[str] = set()
        kept: list[list[Op]] = []
        for ops in sorted(self._kept, key=len):
            reached = reaches(ops)
            if reached - seen:
                seen |= reached
                kept.append(ops)
        self._kept = kept
        if self._directory is not None:
            for path in self._directory.glob("*.jsonl"):
                path.unlink()
            for ops in kept:
                digest = hashlib.sha256("\n".join(str(op.to_json()) for op in ops).encode()).hexdigest()[:16]
                save(self._directory / f"{digest}.jsonl", ops)
        return before - len(kept)
