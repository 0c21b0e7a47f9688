"""The device side: virtio devices and formats that come from strangers, in this process (softkvm fuzz --devices).

A target is a virtio device behind a transport ("blk-pci", "net-mmio", ...: virtio_case.py) or a format (formats.py). The same
target and seed do the same.
"""

from __future__ import annotations

import json
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType

from qemu_user.fuzz import formats
from qemu_user.fuzz.campaign import Figures
from qemu_user.fuzz.sequence import Finding, Op, save
from qemu_user.fuzz.virtio_case import BUILDERS, PORTS, Case

_SECONDS = 10
TARGETS = (*(f"{device}-{port}" for device in BUILDERS for port in PORTS), *formats.TARGETS)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLongError(f"it has worked for {_SECONDS} s on one case")


class _TooLongError(Exception):
    """A case does not end."""


def perform_device(op: Op, directory: Path) -> Finding | None:
    """The case of an operation {"do": "device", "name": one of TARGETS, "extra": {"seed": SEED}}. Main thread only."""
    before = signal.signal(signal.SIGPROF, _too_long)
    seed = str(op.extra["seed"])
    target, refusals = formats.TARGETS.get(op.name, (None, ()))
    try:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of CPU time: a machine that is busy is no fault
        if target is not None:
            target(Random(f"{op.name}:{seed}"), directory)
        else:
            device, _, port = op.name.rpartition("-")
            with Case(device, port, seed, directory) as case:
                case.run()
    except refusals:
        return None
    except Exception as error:
        oracle = "hang" if isinstance(error, _TooLongError) else "device"
        return Finding(oracle, f"{op.name}: {''.join(traceback.format_exception(error)[-4:])}", 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None


def chosen(words: str) -> tuple[str, ...]:
    """The targets whose names begin with one of the words, which commas divide; "": all. ValueError: there is none."""
    found = tuple(name for name in TARGETS if name.startswith(tuple(words.split(","))))
    for word in words.split(","):
        if not any(name.startswith(word) for name in TARGETS):
            raise ValueError(f"no target is called {word}: {', '.join(TARGETS)}")
    return found


def run(
    seed: int,
    seconds: float,
    output: Path,
    show: Callable[[Figures], None],
    most: int = 0,
    targets: tuple[str, ...] = TARGETS,
) -> Figures:
    """Cases of every target in turn until the time is up, or `most` rounds; findings as files."""
    figures, end, kinds = Figures(seed), time.monotonic() + seconds, set[str]()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (output / "figures.jsonl").open("a") as log:
        while time.monotonic() < end and (not most or figures.sequences < most * len(targets)):
            for name in targets:
                op = Op("device", name=name, extra={"seed": f"{seed}:{figures.sequences}"})
                finding = perform_device(op, Path(scratch))
                figures.sequences += 1
                figures.operations += 1
                figures.reached[name] += 1
                kind = f"{name}-{finding.text.strip().splitlines()[-1]}" if finding else ""
                if finding is not None and kind not in kinds:
                    kinds.add(kind)
                    figures.findings += 1
                    save(output / "findings" / f"{finding.oracle}-{name}-{len(kinds)}.jsonl", [op], finding, seed=seed)
            if figures.sequences % (len(targets) * 50) == 0:
                show(figures)
                log.write(json.dumps(figures.row()) + "\n")
                log.flush()
        log.write(json.dumps(figures.row()) + "\n")
    return figures
