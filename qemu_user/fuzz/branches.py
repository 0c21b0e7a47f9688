"""Which branches of the server's source a run has taken: the per cent that `softkvm fuzz --coverage` reports.

A branch is a conditional jump of the bytecode whose two ways lead to different lines; each way counts once. The server marks
the ways from line to line that it takes in a file (kvmcore/server/coverage.py); where a way's mark lies is
protocol/codec/coverage_marks.py's. The source is compiled here, not imported.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import NamedTuple

from protocol.codec import coverage_marks

NOT_WATCHED = {
    "/protocol/codec/qmp.py": "the device process's: fuzzed as a format (softkvm fuzz --devices qmp)",
    "/protocol/codec/switch_hello.py": "the virtual switch's",
    "/protocol/codec/ethernet_stream.py": "the virtual switch's and passt's",
    "/protocol/codec/pcap.py": "a NIC's capture file",
    "/protocol/codec/coverage_marks.py": "what watches",
    "/kvmcore/server/coverage.py": "what watches",
    "/kvmcore/server/runtime_dir.py": "start and end of the daemon: no client reaches it (tests/unit, kill storms)",
    "/kvmcore/server/zygote.py": "start and end of processes: kill storms reach it",
    "/kvmcore/server/translator.py": "start and end of a process: kill storms reach it",
    "/kvmcore/server/confinement.py": "depends on the host alone",
    "/kvmcore/server/daemon.py:Daemon.serve": "start of the daemon",
    "/kvmcore/server/daemon.py:Daemon._close": "end of the daemon",
    "/kvmcore/server/quotas.py:Quotas.of_this_process": "start of a process",
    "/kvmcore/server/acceptor.py:Acceptor.close": "end of the daemon",
    "/kvmcore/server/requests.py:_exhausted": "the host has no more: tests and kill storms",
    "/kvmcore/vm/accelerator.py": "runs before there is a client",
    "/protocol/codec/envelope.py:encode_request": "the client's half",
    "/protocol/codec/envelope.py:decode_reply": "the client's half",
    "/protocol/abi/structs.py:Layout.__init__": "runs at import",
    "/protocol/abi/structs.py:Layout.construct": "for tools that dissect messages",
    "/protocol/abi/structs.py:Layout.build": "mostly the client's half; the server builds few, without arrays",
}
"""Files, and functions of files, whose branches do not count, with the reason."""


class Branch(NamedTuple):
    """One way out of a decision."""

    file: str
    line: int
    to: int


def branches(root: Path) -> list[Branch]:
    """All of the watched folders under `root`, in order."""
    found: set[Branch] = set()
    for folder in coverage_marks.FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            name = "/" + str(path.relative_to(root))
            if name in NOT_WATCHED:
                continue
            code = compile(path.read_text(encoding="utf-8"), name, "exec")
            found.update(Branch(name, line, to) for line, to in _ways(code, name))
    return sorted(found)


def taken(every: list[Branch], marks: bytes | memoryview) -> list[Branch]:
    """Those whose mark is set."""
    seeds = {name: coverage_marks.seed(name) for name in {branch.file for branch in every}}
    return [
        branch for branch in every if marks[coverage_marks.place(seeds[branch.file], branch.line, branch.to, len(marks))]
    ]


def _ways(code: CodeType, file: str) -> Iterator[tuple[int, int]]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _ways(constant, file)
    if f"{file}:{code.co_qualname}" in NOT_WATCHED:
        return
    if code.co_name == "<module>":
        return  # ran before anybody watched
    steps = list(dis.get_instructions(code))
    at = {step.offset: index for index, step in enumerate(steps)}
    for index, step in enumerate(steps):
        if not _decides(step):
            continue
        line = step.positions.lineno if step.positions else None
        ends = [_line_after(steps, at, start, line) for start in (index + 1, at.get(step.argval, len(steps)))]
        if line is not None and None not in ends and ends[0] != ends[1]:
            yield from ((line, end) for end in ends if end is not None)


def _decides(step: dis.Instruction) -> bool:
    return step.opname.startswith(("POP_JUMP", "JUMP_IF")) or step.opname == "FOR_ITER"


def _line_after(steps: list[dis.Instruction], at: dict[int, int], index: int, line: int | None) -> int | None:
    """The line that comes after `line` on the way that begins at `index`; None if it decides again before, or returns."""
    for _ in range(len(steps)):
        if index >= len(steps):
            return None
        step = steps[index]
        now = step.positions.lineno if step.positions else None
        if now is not None and now != line:
            return now
        if _decides(step) or step.opname.startswith(("RETURN", "RAISE", "RERAISE")):
            return None
        index = at.get(step.argval, len(steps)) if step.opname.startswith("JUMP") else index + 1
    return None
