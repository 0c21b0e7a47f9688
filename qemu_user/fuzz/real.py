"""Runs against a real /dev/kvm: alone (does the kernel's answer break a documented rule?), or beside kvmcore.

Used by softkvm fuzz --target /dev/kvm and --differential. Findings are files as everywhere.
"""

from __future__ import annotations

import hashlib
import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from qemu_user.fuzz.campaign import Figures
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.dev_kvm import DevKvm, Kernel, Linux
from qemu_user.fuzz.differential import Comparison, Running, compare
from qemu_user.fuzz.executor import Executor
from qemu_user.fuzz.grammar import SHORT, Grammar
from qemu_user.fuzz.model import X86, Model
from qemu_user.fuzz.sequence import Finding, Op, save

_SHOW = 2.0
_TOGETHER = 4
"""Short sequences on one VM."""


class RealRun:
    """`kernel` is Linux, or what stands for it; `ours` None: the real KVM alone."""

    def __init__(self, kernel: Kernel, seed: int, output: Path, ours: Executor | None) -> None:
        self.figures = Figures(seed)
        self._grammar = Grammar(seed, guest=False, generic=True)
        self._target = DevKvm(kernel)
        self._ours, self._output = ours, output
        self._kinds: set[str] = set()

    def run(self, seconds: float, show: Callable[[Figures], None], most: int = 0) -> Figures:
        """Until the time is up, or `most` sequences are done."""
        figures, shown = self.figures, time.monotonic()
        end = shown + seconds
        self._output.mkdir(parents=True, exist_ok=True)
        with (self._output / "figures.jsonl").open("a") as log:
            while time.monotonic() < end and (not most or figures.sequences < most):
                ops = self._grammar.together(figures.vms, _TOGETHER)
                run = self._target.start()
                result = compare(ops, self._ours.start(), run) if self._ours else self._against_rules(ops, run)
                figures.vms += 1
                figures.sequences += -(-result.compared // SHORT)
                figures.operations += result.compared
                if result.finding is not None:
                    self._found(result.finding, ops)
                if time.monotonic() - shown > _SHOW:
                    shown = time.monotonic()
                    log.write(json.dumps(figures.row()) + "\n")
                    log.flush()
                    show(figures)
            log.write(json.dumps(figures.row()) + "\n")
        show(figures)
        return figures

    def _against_rules(self, ops: list[Op], run: Running) -> Comparison:
        model = Model(X86)
        try:
            run.begin(ops)
            for step, (op, outcome) in enumerate(zip(ops, run.outcomes(), strict=True)):
                expected = model.expect(op)
                self.figures.reached[f"{op.name or op.do} {op.on[0]} {outcome.errno}"] += 1
                if expected is not None and expected != outcome.errno:
                    text = f"{op}: {outcome.errno or 0}, the rules say {expected or 0}"
                    return Comparison(step + 1, Finding("model", text, step))
                model.learn(op, outcome)
        finally:
            run.close()
        return Comparison(len(ops))

    def _found(self, finding: Finding, ops: list[Op]) -> None:
        name = ops[finding.step].name
        kind = f"{finding.oracle}-{name}-{finding.text.rsplit('kvmcore', 1)[-1]}"
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.figures.findings += 1
            path = self._output / "findings" / f"{finding.oracle}-{name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}.jsonl"
            save(path, ops, finding, seed=self.figures.seed, sequence=self.figures.sequences - 1)

    def close(self) -> None:
        """Let go of both."""
        self._target.close()
        if self._ours is not None:
            self._ours.close()


def run_real(device: str, seed: int, options: Namespace, show: Callable[[Figures], None]) -> Figures:
    """What the command line asks for. OSError: no such device, or no right to use it."""
    kernel = Linux(device)
    kernel.close(kernel.open())  # says at once what is wrong
    daemon = Daemon() if options.differential and (options.target or device) == device else None
    try:
        endpoint = daemon.endpoint if daemon else options.target
        run = RealRun(kernel, seed, options.output, Executor(endpoint) if options.differential else None)
        try:
            return run.run(options.time, show, options.sequences)
        finally:
            run.close()
    finally:
        if daemon is not None:
            daemon.close()
