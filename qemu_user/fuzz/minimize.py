"""The smallest sequence that still shows a finding, and the test that keeps it from coming back.

Delta debugging (Zeller and Hildebrandt, 2002) over the operations, then each argument is tried with simpler values.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qemu_user.fuzz.sequence import Finding, Op

Shows = Callable[[list[Op]], bool]
"""Whether a sequence shows the finding."""


_LOGGED = ("log", "internal error")
"""The same fault, seen in the log or in the answer, whichever comes first."""


def same_fault(one: Finding, other: Finding) -> bool:
    """Whether two findings are of one fault: the oracle's, and of logs the last line, which names the exception."""
    if one.oracle == other.oracle == "log":
        return one.text.strip().splitlines()[-1:] == other.text.strip().splitlines()[-1:]
    return one.oracle == other.oracle or (one.oracle in _LOGGED and other.oracle in _LOGGED)


def minimize(ops: list[Op], shows: Shows) -> list[Op]:
    """A sequence of which nothing can be left out. ValueError: the given one does not show the finding."""
    if not shows(ops):
        raise ValueError("the sequence does not show its finding any more")
    return _simplify(_fewer(ops, shows), shows)


def _fewer(ops: list[Op], shows: Shows) -> list[Op]:
    size = max(1, len(ops) // 2)
    while True:
        at, smaller = 0, False
        while at < len(ops):
            rest = ops[:at] + ops[at + size :]
            if rest and shows(rest):
                ops, smaller = rest, True
            else:
                at += size
        if size == 1 and not smaller:
            return ops
        size = max(1, size // 2)


def _simplify(ops: list[Op], shows: Shows) -> list[Op]:
    for index, op in enumerate(ops):
        for name in op.members or {}:
            members: dict[str, Any] = dict(ops[index].members or {})
            del members[name]  # absent members are 0
            candidate = [*ops[:index], replace(ops[index], members=members), *ops[index + 1 :]]
            if shows(candidate):
                ops = candidate
        if ops[index].arg:
            candidate = [*ops[:index], replace(ops[index], arg=0), *ops[index + 1 :]]
            if shows(candidate):
                ops = candidate
        if ops[index].tail:
            candidate = [*ops[:index], replace(ops[index], tail=""), *ops[index + 1 :]]
            if shows(candidate):
                ops = candidate
    return ops


def as_test(ops: list[Op], finding: Finding, name: str, kind: dict[str, Any]) -> str:
    """A pytest module that performs the sequence on a daemon of its own and wants no finding. `kind`: Kind.header."""
    lines = "\n".join(f"    {json.dumps(op.to_json())!r}," for op in ops)
    words = " ".join(finding.text.split())[:300].replace("\\", "/").replace('"', "'")
    return f'''"""Found by softkvm fuzz, oracle "{finding.oracle}": {words}"""

from __future__ import annotations

import json

from qemu_user.fuzz.campaign import perform
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.executor import Executor, Kind
from qemu_user.fuzz.sequence import Op

OPS = (
{lines}
)


def test_{name}() -> None:
    with Daemon() as daemon:
        executor = Executor(daemon.endpoint, kinds=(Kind.of({json.dumps(kind)}),))
        try:
            assert perform(executor, [Op.from_json(json.loads(line)) for line in OPS], None, daemon.complaints) is None
        finally:
            executor.close()
'''
