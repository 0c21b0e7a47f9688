"""A fuzzing run: sequences by seed until the time is up, oracles after each, findings and corpus kept.

The same seed gives the same sequences in the same order. Findings of one kind are kept once. Used by softkvm fuzz
and, for one sequence, by replay and minimize.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from protocol.abi.errors import KvmError
from qemu_user.fuzz import transport
from qemu_user.fuzz.corpus import Corpus
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.executor import KINDS, UNKNOWN, Executor, Sequence
from qemu_user.fuzz.grammar import Grammar
from qemu_user.fuzz.model import Model
from qemu_user.fuzz.oracles import Bystander, Leaks, judge
from qemu_user.fuzz.sequence import Finding, Op, save
from qemu_user.fuzz.wire import Gone, Hang

_SLOW_CHECKS = 5.0
"""Seconds between looks at the bystander and at what the daemon takes."""
_OF_THE_PROCESS = ("crash", "hang", "log")
"""Faults that may be another sequence's, which is under way at the same time."""
_WARM = 50
"""Sequences before memory and descriptors are counted for the first time."""


@dataclass
class Figures:
    """What a run has done so far; written to DIR/figures.jsonl as it goes."""

    seed: int = 0
    sequences: int = 0
    vms: int = 0
    """Of a differential run, whose sequences share VMs."""
    operations: int = 0
    refused: int = 0
    attacks: int = 0
    findings: int = 0
    started: float = field(default_factory=time.monotonic)
    reached: Counter[str] = field(default_factory=Counter)
    """(ioctl, handle kind, outcome) -> how often: the states of the protocol that were reached."""
    lines: int = 0
    corpus: int = 0
    server_cpu: float = 0.0
    """Seconds of CPU time of a private daemon's processes, all but the bystander's."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def row(self) -> dict[str, float]:
        """One point of the plot."""
        return {
            "seconds": round(self.seconds, 1), "cpu": round(time.process_time(), 1), "server_cpu": round(self.server_cpu, 1),
            "vms": self.vms, "sequences": self.sequences, "operations": self.operations,
            "states": len(self.reached), "lines": self.lines, "corpus": self.corpus, "findings": self.findings,
        }  # fmt: skip


def perform(
    executor: Executor, ops: list[Op], figures: Figures | None = None, complaints: Callable[[], str] = lambda: ""
) -> Finding | None:
    """One sequence in a fresh VM; the first fault, None if there was none."""
    return finish(begin(executor, ops), ops, figures, complaints)


def begin(executor: Executor, ops: list[Op]) -> Sequence | Finding:
    """Send a sequence off; finish() looks what came of it, and others may be sent meanwhile."""
    run = None
    try:
        run = executor.start()
        run.begin(ops)
        return run
    except KvmError as error:
        finding = Finding("start", f"no VM for the sequence: {error}")
    except (Hang, Gone) as error:
        finding = Finding("crash", str(error), 0)
    if run is not None:
        run.close()
    return finding


def finish(
    run: Sequence | Finding, ops: list[Op], figures: Figures | None = None, complaints: Callable[[], str] = lambda: ""
) -> Finding | None:
    """The first fault of a sequence that has begun, None if there was none."""
    if isinstance(run, Finding):
        return run
    model = Model(extended=run.extended)
    step = 0
    finding: Finding | None = None
    try:
        for op, outcome in zip(ops, run.outcomes(), strict=True):
            if figures is not None:
                figures.operations += 1
                figures.refused += bool(outcome.errno)
                figures.reached[f"{op.name or op.do} {op.on[0]} {outcome.errno}"] += 1
            finding = finding or judge(op, outcome, step)
            expected = model.expect(op) if outcome.reason != UNKNOWN else None
            if expected is not None and expected != outcome.errno:
                finding = finding or Finding(
                    "model", f"{op}: {outcome.errno or 0}, the rules say {expected or 0} ({outcome.reason})", step
                )
            model.learn(op, outcome)
            step = min(step + 1, len(ops) - 1)
    except Hang as error:
        finding = Finding("hang", f"{ops[step]}: {error}", step)
    except Gone as error:
        finding = Finding("crash", f"{ops[step]}: {error}", step)
    except KvmError as error:
        finding = Finding("start", f"no VM for the sequence: {error}")
    finally:
        run.close()
    if text := complaints():
        return Finding("log", text[-4000:], finding.step if finding else -1)
    return finding


class Campaign:
    """One run against one daemon, into one directory."""

    def __init__(
        self,
        directory: Path,
        seed: int,
        daemon: Daemon | None,
        endpoint: str,
        *,
        attacks: bool = True,
        corpus: Corpus | None = None,
        overlap: int = 1,
    ) -> None:
        """`overlap`: how many sequences are sent before one is answered (0: none)."""
        self.directory = directory
        self.figures = Figures(seed)
        self._grammar = Grammar(seed)
        self._random = Random(f"{seed}:campaign")
        self._daemon, self._endpoint, self._attacks = daemon, endpoint, attacks and daemon is not None
        self._executor = Executor(endpoint, kinds=KINDS)
        self._bystander = Bystander(endpoint)
        self._leaks: Leaks | None = None
        self._kinds: set[str] = set()
        self._corpus = corpus if corpus is not None else Corpus(None)
        self._overlap = 0 if self._corpus.lines else overlap  # whose were the new lines, else?
        directory.mkdir(parents=True, exist_ok=True)
        self._log = (directory / "figures.jsonl").open("a")
        self._last_look = time.monotonic()

    def run(self, seconds: float, show: Callable[[Figures], None] = lambda figures: None, most: int = 0) -> Figures:
        """Until the time is up (or `most` sequences are done)."""
        figures, end = self.figures, time.monotonic() + seconds
        begun = 0
        under_way: deque[tuple[list[Op], Sequence | Finding]] = deque()
        while True:
            more = time.monotonic() < end and (not most or begun < most)
            pause = (self._attacks and self._random.random() < 0.02) or self._executor.full
            slow = time.monotonic() - self._last_look > _SLOW_CHECKS
            while under_way and (not more or pause or slow or len(under_way) > self._overlap):
                self._finish(*under_way.popleft(), [ops for ops, _ in under_way])
            if not more:
                break
            if pause and not self._executor.full:
                self._attack()
            if slow:
                self._look([])
                show(figures)
            ops = (
                self._corpus.mutate(self._random)
                if self._corpus.wants_mutation(self._random)
                else self._grammar.sequence(begun)
            )
            begun += 1
            under_way.append((ops, begin(self._executor, ops)))
        self._look([])
        show(figures)
        return figures

    def _finish(self, ops: list[Op], run: Sequence | Finding, others: list[list[Op]]) -> None:
        """What came of a sequence; `others` were sent after it and are under way still."""
        figures, before = self.figures, len(self.figures.reached)
        complaints = self._daemon.complaints if self._daemon else lambda: ""
        finding = finish(run, ops, figures, complaints)
        figures.sequences += 1
        if self._corpus.consider(ops, len(figures.reached) > before):
            figures.corpus, figures.lines = len(self._corpus), self._corpus.lines
        if finding is None:
            return
        if others and finding.oracle in _OF_THE_PROCESS:
            for suspect in (ops, *others):  # which of them was it?
                executor = Executor(self._endpoint)
                alone = perform(executor, suspect, None, complaints)
                executor.close()
                if alone is not None:
                    finding, ops = alone, suspect
                    break
        self._found(finding, ops)

    def minimise_corpus(self) -> int:
        """Drop kept sequences that reach no state that smaller ones do not reach; how many went."""

        def reaches(ops: list[Op]) -> set[str]:
            seen = Figures()
            perform(self._executor, ops, seen)
            return set(seen.reached)

        return self._corpus.minimise(reaches)

    def _attack(self) -> None:
        """Something below the level of requests, in a client of its own."""
        self.figures.attacks += 1
        seed = f"{self.figures.seed}:{self.figures.attacks}"
        try:
            name = transport.attack(self._endpoint, seed, self._daemon.far if self._daemon else None)
        except (Hang, Gone) as error:
            self._found(Finding("attack", f"{error}"), [Op("attack", arg=0, extra={"seed": seed})])
            return
        self.figures.reached[f"attack {name}"] += 1
        if self._daemon and (text := self._daemon.complaints()):
            self._found(Finding("log", text[-4000:]), [Op("attack", arg=0, extra={"seed": seed})])

    def _look(self, ops: list[Op]) -> None:
        """The oracles that take time, and a point for the plot."""
        if self._daemon is not None:
            self.figures.server_cpu = self._daemon.cpu_seconds(self._bystander.pid)
        if finding := self._bystander.check():
            self._found(finding, ops)
        if self._daemon is not None and self.figures.sequences >= _WARM:
            try:
                self._executor.quiet()
            except (Hang, Gone, KvmError) as error:
                self._found(Finding("hang", f"the last VM cannot be closed: {error}"), ops)
            if self._leaks is None:
                time.sleep(0.5)
                self._leaks = Leaks(self._daemon)
            elif finding := self._leaks.check():
                self._found(finding, ops)
                self._leaks = Leaks(self._daemon)
        self._log.write(json.dumps(self.figures.row()) + "\n")
        self._log.flush()
        self._last_look = time.monotonic()

    def _found(self, finding: Finding, ops: list[Op]) -> None:
        what = ops[finding.step].name or ops[finding.step].do if ops and 0 <= finding.step < len(ops) else ""
        kind = f"{finding.oracle}-{what}-{finding.text.rsplit(':', 1)[-1] if finding.oracle in ('errno', 'model') else ''}"
        if finding.oracle == "log":
            kind = "log-" + finding.text.strip().splitlines()[-1]
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        self.figures.findings += 1
        digest = hashlib.sha256(kind.encode()).hexdigest()[:8]
        path = self.directory / "findings" / f"{finding.oracle.replace(' ', '-')}-{what or 'run'}-{digest}.jsonl"
        kind_of_session = self._executor.kind.header
        save(path, ops, finding, seed=self.figures.seed, sequence=self.figures.sequences - 1, **kind_of_session)

    def close(self) -> None:
        """Leave the target as it was."""
        (self.directory / "reached.json").write_text(json.dumps(self.figures.reached, indent=0, sort_keys=True))
        self._log.close()
        try:
            self._bystander.close()
            self._executor.close()
        except (KvmError, OSError):
            pass
