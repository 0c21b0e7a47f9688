"""Kernels of computation here, under QEMU and on the host's own processor: `softkvm bench cpu`, `fp` and `mmu`.

The same kernels (kernels/kernels.c, made by one compiler) run alternated on all sides; each reports its best round in the
guest's own time, its first one, and a result that must be the same everywhere. The guest is in S-mode under Sv39.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GUEST = Path(__file__).parent / "kernels" / "guest.bin"
GROUPS = ("cpu", "fp", "mmu")
QEMU = "qemu-system-riscv64"
TICKS = 10_000_000
"""In a second."""
_GROUP_AT = 64  # start.S: a number and the budget, for us to fill in
_LIMIT_SECONDS = 300


class BenchError(Exception):
    """A side did not finish, or computed something else. The text says which."""


@dataclass
class Kernel:
    """Seconds of one kernel's best and first rounds, run by run, for each side."""

    best: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)
    result: int | None = None

    def add(self, other: Kernel) -> None:
        """The runs of another one as well."""
        for ours, theirs in ((self.best, other.best), (self.first, other.first)):
            for side, values in theirs.items():
                ours.setdefault(side, []).extend(values)
        self.result = other.result

    def median(self, side: str) -> float:
        return statistics.median(self.best[side])

    def ratio(self, peer: str, side: str = "softkvm") -> float | None:
        """How many times as fast as `peer`; None without it."""
        return self.median(peer) / self.median(side) if peer in self.best else None

    def figures(self) -> dict[str, Any]:
        """For the JSON: seconds of each side, ratios, spread of our runs."""
        ours = self.best["softkvm"]
        return {
            "seconds": {side: self.median(side) for side in self.best},
            "first_seconds": {side: statistics.median(values) for side, values in self.first.items()},
            "vs_qemu": self.ratio("qemu"), "vs_native": self.ratio("native"),
            "spread": (max(ours) - min(ours)) / self.median("softkvm"), "runs": len(ours), "result": self.result,
        }  # fmt: skip


def run(group: str, rounds: int, seconds: float, only: str, tell: Callable[[str], None]) -> dict[str, Kernel]:
    """Run a group's kernels `rounds` times on each side, `seconds` for each kernel. BenchError."""
    sides: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as folder:
        kernel = Path(folder) / "guest.bin"
        budget = int(seconds * TICKS)
        image = bytearray(GUEST.read_bytes())
        image[_GROUP_AT : _GROUP_AT + 16] = GROUPS.index(group).to_bytes(8, "little") + budget.to_bytes(8, "little")
        kernel.write_bytes(image)
        sides["softkvm"] = [sys.executable, "-P", "-m", "qemu_user.cli.main", "run", "-m", "256M", "--kernel", str(kernel)]
        if shutil.which(QEMU):
            sides["qemu"] = [QEMU, "-M", "virt", "-m", "256M", "-nographic", "-monitor", "none", "-kernel", str(kernel)]
        else:
            tell(f"no {QEMU} here to compare with (Debian: apt-get install qemu-system-misc)")
        if group != "mmu":
            sides["native"] = [sys.executable, "-P", "-m", "qemu_user.bench.native", group, str(budget)]
        kernels: dict[str, Kernel] = {}
        for number in range(rounds):
            for side, command in sides.items():
                tell(f"{group}: round {number + 1} of {rounds}, {side}")
                take(kernels, side, _output(side, command), only)
    if not kernels:
        raise BenchError(f"no kernel named {only!r} in the group {group}")
    return kernels


def _output(side: str, command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=_LIMIT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{side} did not finish within {_LIMIT_SECONDS} s") from error
    if done.returncode:
        raise BenchError(f"{side} failed (status {done.returncode}): {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def take(kernels: dict[str, Kernel], side: str, output: str, only: str, unit: int = TICKS) -> None:
    """Lines of "name best first rounds result", among what firmware says; times in parts of a second, `unit` of them.
    BenchError: another result than another side's, or nothing at all."""
    found = 0
    for line in output.splitlines():
        words = line.split()
        if len(words) != 5 or not all(word.isdigit() for word in words[1:]):
            continue
        found += 1
        name, best, first, _, result = words[0], *map(int, words[1:])
        if only and only != name:
            continue
        kernel = kernels.setdefault(name, Kernel(result=result))
        if result != kernel.result:
            raise BenchError(f"{name}: {side} computed {result}, another one {kernel.result}")
        kernel.best.setdefault(side, []).append(best / unit)
        kernel.first.setdefault(side, []).append(first / unit)
    if not found:
        raise BenchError(f"{side} reported nothing: {output[-500:]!r}")


def geomean(kernels: dict[str, Kernel], peer: str) -> float | None:
    """Of how many times as fast as `peer` the kernels are; None without it."""
    ratios = [ratio for kernel in kernels.values() if (ratio := kernel.ratio(peer)) is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def figures(kernels: dict[str, Kernel]) -> dict[str, Any]:
    """What goes into the JSON for a group."""
    return {
        "geomean_vs_qemu": geomean(kernels, "qemu"), "geomean_vs_native": geomean(kernels, "native"),
        "kernels": {name: kernel.figures() for name, kernel in kernels.items()},
    }  # fmt: skip


def table(kernels: dict[str, Kernel]) -> str:
    """Medians of the best rounds in ms, ratios, and the spread of our runs."""

    def number(value: float | None, width: int = 9) -> str:
        if value is None:
            return " " * (width - 1) + "-"
        return f"{value:{width}.5f}" if value < 0.1 else f"{value:{width}.2f}"

    lines = [f"{'kernel':20}{'softkvm':>9}{'qemu':>9}{'native':>9}{'x qemu':>9}{'x native':>9}{'spread':>8}  (ms, best rounds)"]
    for name, kernel in kernels.items():
        cells = [1000 * kernel.median(side) if side in kernel.best else None for side in ("softkvm", "qemu", "native")]
        spread = 100 * kernel.figures()["spread"]
        ratios = number(kernel.ratio("qemu")) + number(kernel.ratio("native"))
        lines.append(f"{name:20}{''.join(map(number, cells))}{ratios}{spread:7.0f}%")
    lines.append(f"{'geometric mean':47}{number(geomean(kernels, 'qemu'))}{number(geomean(kernels, 'native'))}")
    return "\n".join(lines)
