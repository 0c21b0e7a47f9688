"""Which lines of protocol and kvmcore have run: for fuzzers, switched on by `python -m kvmcore --coverage FILE`.

Every process of the daemon marks one file that the fuzzer maps (protocol/codec/coverage_marks.py). Costs much speed; never on
otherwise. sys.settrace, which 3.11 has too.
"""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from protocol.codec import coverage_marks

_ROOT = str(Path(__file__).parents[2])
_WATCHED = tuple(f"{_ROOT}/{folder}/" for folder in coverage_marks.FOLDERS)


def start(path: str) -> None:
    """Mark from now on, in this process and those forked from it. The file exists and is not empty: OSError, ValueError."""
    with open(path, "r+b") as file:
        hits = mmap.mmap(file.fileno(), 0)
    trace = _tracer(hits)
    threading.settrace(trace)
    sys.settrace(trace)


def _tracer(hits: mmap.mmap) -> Callable[[FrameType, str, Any], Any]:
    size, place = len(hits), coverage_marks.place
    seeds: dict[str, int | None] = {}

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        seed = seeds.get(name, -1)
        if seed == -1:
            relative = name.removeprefix(_ROOT)
            seed = coverage_marks.seed(relative) if name.startswith(_WATCHED) and name != __file__ else None
            seeds[name] = seed
        if seed is None:
            return None
        before = 0

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                line = frame.f_lineno
                hits[place(seed, before, line, size)] = 1
                before = line
            return on_line

        return on_line

    return on_call

