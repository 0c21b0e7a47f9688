"""Sequences of operations and the files they are kept in: one JSON object a line, the header first.

An operation names resources by kind and position ("vcpu" 1 = the second one that this sequence has made), never by
number, so that a file means the same on every target. Arguments: integers; {"ref": [kind, n]} a resource's number;
{"in": hex} a pointer to these bytes; {"out": n} a pointer to room for n bytes; {"map": n} an address in mapped memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
Value = Any
"""An int, or one of the objects above."""


@dataclass
class Op:
    """One step. `do` is what (an executor's method), `on` the resource (kind, position) it is done to."""

    do: str
    on: tuple[str, int] = ("system", 0)
    name: str = ""
    arg: Value = 0
    members: dict[str, Value] | None = None
    tail: str = ""
    """Hex bytes behind the struct."""
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Only what is not the default."""
        made: dict[str, Any] = {"do": self.do}
        if self.on != ("system", 0):
            made["on"] = list(self.on)
        for key in ("name", "arg", "members", "tail", "extra"):
            value = getattr(self, key)
            if value or (key == "members" and value is not None):
                made[key] = value
        return made

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Op:
        """ValueError if it is not an operation."""
        if not isinstance(data, dict) or not isinstance(data.get("do"), str):
            raise ValueError(f"not an operation: {data!r:.80}")
        kind, position = data.get("on", ("system", 0))
        return cls(
            data["do"], (str(kind), int(position)), str(data.get("name", "")), data.get("arg", 0), data.get("members"),
            str(data.get("tail", "")), dict(data.get("extra", {})),
        )  # fmt: skip

    def __str__(self) -> str:
        what = self.name or self.extra.get("request", "")
        argument = json.dumps(self.members) if self.members is not None else self.arg or ""
        return f"{self.on[0]}{self.on[1]}: {self.do} {what} {argument}".rstrip()


@dataclass
class Finding:
    """What an oracle objects to: `oracle` its name, `text` what was seen, `step` the operation (-1: afterwards)."""

    oracle: str
    text: str
    step: int = -1


def save(path: Path, ops: list[Op], finding: Finding | None = None, **header: Any) -> None:
    """Write a replayable file."""
    head: dict[str, Any] = {"softkvm-fuzz": FORMAT, **header}
    if finding is not None:
        head |= {"oracle": finding.oracle, "text": finding.text[:2000], "step": finding.step}
    lines = [json.dumps(head), *(json.dumps(op.to_json()) for op in ops)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def load(path: Path) -> tuple[dict[str, Any], list[Op]]:
    """(header, operations). ValueError: not such a file; OSError."""
    try:
        head, *rest = (json.loads(line) for line in path.read_text().splitlines() if line.strip())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of softkvm fuzz ({error})") from error
    if not isinstance(head, dict) or head.get("softkvm-fuzz") != FORMAT:
        raise ValueError(f"{path}: not a file of softkvm fuzz, format {FORMAT}")
    return head, [Op.from_json(item) for item in rest]
