"""`softkvm bench ioctl`: how fast kvmcore answers, one ioctl at a time, many in a message, and whole sequences on fresh VMs.

Each row says how many there were in a second of wall time and in a second of CPU time of the server's processes (what one core
would do): the client, which is Python too, has the other core. /dev/kvm, where it opens, does the same generic sequences.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

from protocol.abi.ioctls import BY_NAME
from protocol.client import Kvm
from protocol.codec import control
from qemu_user.fuzz.campaign import begin, finish
from qemu_user.fuzz.daemon import Daemon
from qemu_user.fuzz.dev_kvm import DevKvm, Linux
from qemu_user.fuzz.executor import Executor
from qemu_user.fuzz.grammar import LENGTH, Grammar
from qemu_user.fuzz.sequence import Op
from qemu_user.fuzz.wire import Wire

_BATCH = 250
_FEW = 200
"""Sequences before the clock is looked at."""
Progress = Callable[[str], None]


class Run(NamedTuple):
    """How many, in how many seconds of wall time, of the server's CPU time and of ours."""

    done: int
    wall: float
    server: float
    client: float


def measure(rounds: int, seconds: float, progress: Progress) -> dict[str, dict[str, object]]:
    """Every row: medians of `rounds` runs of about `seconds` each, and the runs."""
    runs: dict[str, list[Run]] = {}
    with Daemon() as daemon:
        for number in range(rounds):
            for name, row in _ROWS.items():
                progress(f"{name}, round {number + 1} of {rounds}")
                runs.setdefault(name, []).append(row(daemon, seconds, number))
    return {name: _figures(made) for name, made in runs.items() if any(run.done for run in made)}


def _figures(runs: list[Run]) -> dict[str, object]:
    per_core = [run.done / run.server for run in runs if run.server]
    return {
        "per_second": median(run.done / run.wall for run in runs),
        "per_server_core": median(per_core) if per_core else None,
        "server_us": median(1e6 * run.server / run.done for run in runs),
        "client_us": median(1e6 * run.client / run.done for run in runs),
        "runs": [run._asdict() for run in runs],
    }


def table(figures: dict[str, dict[str, object]]) -> str:
    """For people."""
    lines = [f"{'':16}{'a second':>12}{'a core of the server':>24}{'server us':>12}{'client us':>12}"]
    for name, row in figures.items():
        core = row["per_server_core"]
        lines.append(
            f"{name:16}{row['per_second']:12,.0f}{core if core is None else format(core, ',.0f')!s:>24}"
            f"{row['server_us']:12.1f}{row['client_us']:12.1f}"
        )
    return "\n".join(lines)


class _Clock:
    """Times a run: `with _Clock(daemon) as clock: ...; clock.run(count)`."""

    def __init__(self, daemon: Daemon | None) -> None:
        self._daemon = daemon
        self._server = daemon.cpu_seconds(0) if daemon else 0.0
        self._wall, self._client = time.monotonic(), time.process_time()

    @property
    def wall(self) -> float:
        return time.monotonic() - self._wall

    def run(self, count: int) -> Run:
        """So much has been done."""
        wall, client = self.wall, time.process_time() - self._client
        return Run(count, wall, self._daemon.cpu_seconds(0) - self._server if self._daemon else 0.0, client)


def _single(daemon: Daemon, seconds: float, number: int) -> Run:
    """CHECK_EXTENSION of a VM, each when the one before is answered."""
    kvm = Kvm.open(daemon.endpoint)
    vm = kvm.create_vm()
    clock, count = _Clock(daemon), 0
    while clock.wall < seconds:
        for _ in range(100):
            vm.check_extension(1)
        count += 100
    run = clock.run(count)
    vm.close()
    kvm.close()
    return run


def _batched(daemon: Daemon, seconds: float, number: int) -> Run:
    """The same, 250 in a message, two messages under way."""
    kvm = Kvm.open(daemon.endpoint)
    vm = kvm.create_vm()
    wire = Wire(vm.link)
    request = BY_NAME["CHECK_EXTENSION"].number
    clock, count = _Clock(daemon), 0
    under_way: deque[list[int]] = deque()
    while clock.wall < seconds or under_way:
        if clock.wall < seconds:
            frames = [wire.frame(vm.number, request, 1) for _ in range(_BATCH)]
            wire.batch([frame for _, frame in frames])
            under_way.append([sequence for sequence, _ in frames])
        if len(under_way) > 1 or clock.wall >= seconds:
            for sequence in under_way.popleft():
                wire.wait(sequence)
            count += _BATCH
    run = clock.run(count)
    wire.close()
    vm.close()
    kvm.close()
    return run


def _fresh(requests: list[tuple[str, int]]) -> Callable[[Daemon, float, int], Run]:
    """VMs, with what `requests` make, in the process that a session's VMs share; closed again."""

    def row(daemon: Daemon, seconds: float, number: int) -> Run:
        kvm = Kvm.open(daemon.endpoint, together=True)
        wire = Wire(kvm.create_vm().link)
        vm, system = control.made("vm", 0), kvm.shared_number or 0
        clock, count = _Clock(daemon), 0
        while clock.wall < seconds:
            for _ in range(50):
                frames = [wire.frame(system, BY_NAME["CREATE_VM"].number)]
                frames += [wire.frame(vm, BY_NAME[name].number, argument) for name, argument in requests]
                frames.append(wire.frame(vm, control.CLOSE_VM))
                wire.batch([frame for _, frame in frames])
                wire.wait(frames[-1][0])
                wire.forget()
            count += 50
        run = clock.run(count)
        wire.close()
        kvm.close()
        return run

    return row


def _sequences_of(grammar: Grammar) -> Iterator[list[Op]]:
    """Of exactly LENGTH operations."""
    index = 0
    while True:
        ops = grammar.sequence(index)
        index += 1
        if len(ops) >= LENGTH:
            yield ops[:LENGTH]


def _sequences(guest: bool, generic: bool) -> Callable[[Daemon, float, int], Run]:
    def row(daemon: Daemon, seconds: float, number: int) -> Run:
        executor = Executor(daemon.endpoint)
        made = _sequences_of(Grammar(number, guest=guest, generic=generic))
        ready = [next(made) for _ in range(_FEW)]
        for ops in ready[:20]:  # the process is there, its code has been used
            finish(begin(executor, ops), ops)
        clock, count = _Clock(daemon), 0
        under_way: deque[tuple[object, list[Op]]] = deque()
        while clock.wall < seconds or under_way:
            if clock.wall < seconds:
                ops = ready[count % _FEW]
                under_way.append((begin(executor, ops), ops))
                count += 1
            if len(under_way) > 1 or clock.wall >= seconds:
                run, ops = under_way.popleft()
                finish(run, ops)  # type: ignore[arg-type]
        done = clock.run(count)
        executor.close()
        return done

    return row


def _real(daemon: Daemon, seconds: float, number: int) -> Run:
    """Generic sequences on this host's KVM, if it has one; no server."""
    if not Path("/dev/kvm").exists():
        return Run(0, 1.0, 0.0, 0.0)
    try:
        target = DevKvm(Linux())
    except OSError:
        return Run(0, 1.0, 0.0, 0.0)
    made = _sequences_of(Grammar(number, guest=False, generic=True))
    ready = [next(made) for _ in range(_FEW)]
    clock, count = _Clock(None), 0
    while clock.wall < seconds:
        ops = ready[count % _FEW]
        run = target.start()
        run.begin(ops)
        for _ in run.outcomes():
            pass
        run.close()
        count += 1
    target.close()
    return clock.run(count)


_ROWS: dict[str, Callable[[Daemon, float, int], Run]] = {
    "ioctl": _single,
    "ioctl-batch": _batched,
    "vm": _fresh([]),
    "vm-vcpu": _fresh([("CREATE_VCPU", 0)]),
    "generic": _sequences(guest=False, generic=True),
    "sequences": _sequences(guest=False, generic=False),
    "guests": _sequences(guest=True, generic=False),
    "dev-kvm": _real,
}
"""generic: what all KVMs have; sequences: all ioctls, no guest runs on purpose; guests: as `softkvm fuzz` does."""
