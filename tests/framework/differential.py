"""Compares two ways of running guest code on random programs, and cuts a failing program down to what
matters.

Used by tests/conformance/test_differential.py and scripts/long-differential. What may differ is listed
here, each with its reason, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tests.framework.cases import WINDOW, Case, Outcome, differences
from tests.framework.random_programs import CONTROL, LOG, Program

BREAKPOINT = 3


class Peer(Protocol):
    """Something that runs cases."""

    def run(self, cases: Sequence[Case]) -> list[Outcome]: ...


def excuse(outcome: Outcome) -> Outcome:
    """The outcome with those differences taken out that the specification allows.

    stval after a breakpoint: 12.1.9 (privileged ISA 1.13) allows 0 or the address; QEMU 7.2 gives 0, we the
    address.
    """
    window = bytearray(outcome.window)
    end = int.from_bytes(window[CONTROL + 256 - WINDOW :][:8], "little")
    for at in range(LOG - WINDOW, min(max(end, LOG), LOG + 4096) - WINDOW, 32):
        if int.from_bytes(window[at : at + 8], "little") == BREAKPOINT:
            window[at + 16 : at + 24] = bytes(8)
    csrs = dict(outcome.csrs)
    if csrs["scause"] == BREAKPOINT:
        csrs["stval"] = 0
    return replace(outcome, window=bytes(window), csrs=csrs)


@dataclass
class Failure:
    """A program whose outcomes differ."""

    program: Program
    found: list[str]
    names: tuple[str, str]

    def __str__(self) -> str:
        here = self.program.surroundings
        mode = {0: "bare", 8: "Sv39", 9: "Sv48"}[here.mode]
        level = "U" if here.user else "S"
        head = f"{self.program.case.name}: {mode}, {level}-mode, {len(self.program.items)} items"
        values = [f"  {line}" for line in self.found[:24]]
        start = [f"  x{i} = {v:#x}" for i, v in enumerate(self.program.case.x) if i]
        start += [f"  f{i} = {v:#018x}" for i, v in enumerate(self.program.case.f)]
        start += [f"  {name} = {value:#x}" for name, value in self.program.case.csrs.items()]
        used = self.program.text
        start = [line for line in start if _mentions(used, line.split()[0])]
        side = f"field: {self.names[0]} / {self.names[1]}"
        return "\n".join([head, side, *values, "registers at the start:", *start, "program:", used])


def _mentions(text: str, name: str) -> bool:
    return not name[1:].isdigit() or any(f"{name}{end}" in text + "\n" for end in (",", ")", "\n"))


class Differential:
    """Two peers, the first being the measure."""

    def __init__(self, left: Peer, right: Peer, names: tuple[str, str]) -> None:
        self._left, self._right, self._names = left, right, names
        self.timeouts = 0

    def compare(self, programs: Sequence[Program]) -> list[Failure]:
        """The programs whose outcomes differ."""
        cases = [program.build() for program in programs]
        failures = []
        for program, left, right in zip(programs, self._left.run(cases), self._right.run(cases), strict=True):
            self.timeouts += left.status == "timeout"
            found = differences(excuse(left), excuse(right))
            if found:
                failures.append(Failure(program, found, self._names))
        return failures

    def minimise(self, failure: Failure) -> Failure:
        """The same failure with as few items as possible (delta debugging by halves)."""
        program, best = failure.program, failure
        items = list(program.items)
        step = max(1, len(items) // 2)
        while True:
            position, removed = 0, False
            while position < len(items):
                program.items = items[:position] + items[position + step :]
                again = self.compare([program])
                if again and program.items:
                    items, best, removed = list(program.items), again[0], True
                else:
                    position += step
            if step == 1 and not removed:
                break
            step = max(1, step // 2)
        program.items = items
        return best
