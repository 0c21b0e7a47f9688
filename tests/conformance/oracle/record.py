"""The recorded behaviour of real RISC-V KVM, the answers of this one, and how the two are compared.

What cannot be equal is normalised on both sides alike: numbers of descriptors, process ids, timings, and
limits of the host. Nothing else is touched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

RECORDED = Path(__file__).resolve().parent.parent / "oracle_riscv.json"

_HANDLES = re.compile(
    r"open|CREATE_VM\(type=.*\)|vcpu|CREATE_VCPU (0|5|1023|after init)|GET_STATS_FD (vm|vcpu)"
)
"""Checks whose result is a descriptor."""
_IN_NAMES = (
    (re.compile(r"\b9=\d+"), "9=CPUS"),
    (re.compile(r"\bid=kvm-\d+"), "id=kvm-PID"),
    (re.compile(r"pc: \d+ us each \(TCG\)"), "pc: TIME"),
    (re.compile(r"CREATE_VM until failure: \d+ \w+"), "CREATE_VM until failure: LIMIT"),
)


def recorded(kernel: str) -> dict[str, str]:
    """Check -> result of one kernel ("7.2.13" or "6.12.107"), normalised."""
    checks = json.loads(RECORDED.read_text(encoding="utf-8"))[kernel]
    return dict(normalised(name, result) for name, result in checks.items())


def normalised(name: str, result: str) -> tuple[str, str]:
    """One check without what belongs to the machine it ran on."""
    if _HANDLES.fullmatch(name) and (result.isdigit() or result == "handle"):
        result = "handle"
    for pattern, replacement in _IN_NAMES:
        name = pattern.sub(replacement, name)
    return name, result


class Record:
    """What was observed, in order. A name that comes again is numbered, as in the recording: `name #2`."""

    def __init__(self) -> None:
        self.checks: dict[str, str] = {}

    def say(self, name: str, result: object = "") -> None:
        """Note one check."""
        base, number = name, 1
        while name in self.checks:
            number += 1
            name = f"{base} #{number}"
        self.checks[name] = str(result)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (normalised(name, result) for name, result in self.checks.items())
