"""Kills and stops, at random moments, of every process that softkvm is made of while clients fuzz it.

Clients perform sequences of the fuzzer without end, in processes of their own; a storm kills (SIGKILL) or stops (SIGSTOP, then
goes on or kills) one process after the other, whatever it is doing: clients, VM processes, the translator, and now and then the
zygote or the daemon, which take their VMs with them as a reboot would. Every so often all clients go, and what is left is
counted: processes, descriptors, endpoints, memory. A bystander, a VM that computes, must never notice. Used by
scripts/kill-storm and by tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil

from protocol.abi.errors import KvmError
from qemu_user.fuzz.daemon import OWN_FILES, Daemon, Footprint
from qemu_user.fuzz.oracles import Bystander
from qemu_user.fuzz.wire import Gone, Hang

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 3
_COUNT_EVERY = 25
_LOOK_EVERY = 5
_SOME = 4
"""Descriptors that come and go with the translator: the daemon's and the bystander's connections to it."""
_PATIENCE = 60.0
"""Seconds that what was killed may take to be gone, on a host that is busy."""


class Disturbed(Exception):
    """Something was left behind, or somebody was disturbed."""


class Nursery:
    """A process that forks clients, for starting Python takes longer than what a client does."""

    def __init__(self, endpoint: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.framework.kill_storm", endpoint],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1, cwd=ROOT,
        )  # fmt: skip

    def client(self, seed: int) -> psutil.Process:
        """A new one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seed}\n")
        return psutil.Process(int(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def nurse(endpoint: str) -> None:
    """The nursery's own process: a seed a line on stdin, a pid a line on stdout."""
    from qemu_user.fuzz.executor import Executor
    from qemu_user.fuzz.grammar import Grammar

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            seed = int(line)
            rng, grammar, index = Random(seed), Grammar(seed), 0
            while True:
                with contextlib.suppress(KvmError, OSError, Gone, Hang):
                    executor = Executor(endpoint, apart=rng.random() < 0.6)
                    while True:
                        run, index = executor.start(), index + 1
                        for _ in run.perform_all(grammar.sequence(index)):
                            pass
                        run.close()
                time.sleep(0.01)
        print(pid, flush=True)


class Storm:
    """A context manager. round() is one kill or stop; figures() what came of all."""

    def __init__(self, seed: int) -> None:
        self._rng = Random(seed)
        self.done: Counter[str] = Counter()
        self._clients: list[psutil.Process] = []
        self._start()

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self._clients:
            _signal(client, signal.SIGKILL)
        self._nursery.close()
        with contextlib.suppress(KvmError, OSError):
            self._bystander.close()
        left = self._daemon.close()
        if left and sys.exc_info()[0] is None:
            raise Disturbed("; ".join(left))

    def _start(self) -> None:
        self._daemon = Daemon()
        self._nursery = Nursery(self._daemon.endpoint)
        self._bystander = Bystander(self._daemon.endpoint)
        self._before: Footprint | None = None
        for _ in range(2):
            self._bystander.check()

    def run(self, kills: int, tell: Callable[[int], None] = lambda count: None) -> None:
        """So many rounds, and a last count. Disturbed."""
        for count in range(1, kills + 1):
            self._round()
            if count % _LOOK_EVERY == 0:
                self._look()
            if count % _COUNT_EVERY == 0:
                self._count()
                tell(count)
        self._count()
        self._look()

    # -- one kill -----------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        rng = self._rng
        while len(self._clients) < CLIENTS:
            self._clients.append(self._nursery.client(rng.getrandbits(32)))
        time.sleep(rng.choice((rng.uniform(0, 0.005), rng.uniform(0, 0.05), rng.uniform(0, 0.2))))
        chance = rng.random()
        if chance < 0.40:
            self._kill_client()
        elif chance < 0.80:
            self._hit("kvmcore-vm fuz", signal.SIGKILL)
        elif chance < 0.87:
            self._stop("kvmcore-vm fuz")
        elif chance < 0.94:
            client = rng.choice(self._clients)
            _signal(client, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.1))
            self.done["client stopped"] += 1
            if rng.random() < 0.5:
                self._kill_client(client)
            _signal(client, signal.SIGCONT)
        elif chance < 0.97:
            self._hit("kvmcore-transla", signal.SIGKILL)
        elif chance < 0.985:
            self._stop("kvmcore-zygote")
        else:
            self._fell(rng.choice(("kvmcore-zygote", "")))
        if not self._daemon.alive:
            raise Disturbed(f"the daemon has ended: {self._daemon.log.read_text(errors='replace')[-500:]}")

    def _kill_client(self, client: psutil.Process | None = None) -> None:
        client = client or self._rng.choice(self._clients)
        self._clients.remove(client)
        _signal(client, signal.SIGKILL)
        self.done["client killed"] += 1

    def _victims(self, name: str) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self._daemon.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name().startswith(name):
                        found.append(process)
        return found

    def _hit(self, name: str, number: signal.Signals) -> None:
        victims = self._victims(name)
        if victims:
            _signal(self._rng.choice(victims), number)
            self.done[f"{name} killed"] += 1

    def _stop(self, name: str) -> None:
        for victim in self._victims(name)[:1]:
            _signal(victim, signal.SIGSTOP)
            time.sleep(self._rng.uniform(0, 0.1))
            self.done[f"{name} stopped"] += 1
            if self._rng.random() < 0.3 and name.startswith("kvmcore-vm"):
                _signal(victim, signal.SIGKILL)
            _signal(victim, signal.SIGCONT)

    def _fell(self, name: str) -> None:
        """The zygote, or the daemon: its VMs go with it, and nothing else stays; then life goes on."""
        family = [psutil.Process(self._daemon.pid), *psutil.Process(self._daemon.pid).children(recursive=True)]
        victims = self._victims(name) if name else []
        _signal(victims[0] if victims else family[0], signal.SIGKILL)
        self.done[f"{name or 'daemon'} killed"] += 1
        vms = [process for process in family if _name(process).startswith("kvmcore-vm")]
        _, left = psutil.wait_procs(vms if victims else family[1:], timeout=_PATIENCE)
        if left:
            raise Disturbed(f"orphans of {name or 'the daemon'}: {[_name(process) for process in left]}")
        for client in self._clients:
            _signal(client, signal.SIGKILL)
        self._clients.clear()
        with contextlib.suppress(KvmError, OSError):
            self._bystander.close()
        self._nursery.close()
        if not victims:
            files = [path.name for path in self._daemon.directory.iterdir() if path.name not in OWN_FILES | {"kvmcore.sock"}]
            if files:
                raise Disturbed(f"a killed daemon left {files}")
        self._daemon.close()
        self._start()

    # -- what is left -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        self.done["looks at the bystander"] += 1
        if finding := self._bystander.check():
            raise Disturbed(f"the bystander: {finding.text}")
        if text := self._daemon.complaints():
            raise Disturbed(f"kvmcore's log: {text[-1500:]}")

    def _footprint(self) -> Footprint:
        """As the daemon's, without the translator: one that was started anew has opened other things by then."""
        descriptors = memory = processes = 0
        for process in (psutil.Process(self._daemon.pid), *psutil.Process(self._daemon.pid).children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and not process.name().startswith("kvmcore-transla"):
                    descriptors += process.num_fds()
                    memory += process.memory_info().rss
                    processes += 1
        files = [path for path in self._daemon.directory.rglob("*") if not path.name.startswith("t-")]
        return Footprint(processes, max(descriptors - _SOME, 0) if self._before else descriptors, len(files), memory)

    def _count(self) -> None:
        """All clients go; what the daemon takes then is what it took before."""
        for client in self._clients:
            _signal(client, signal.SIGKILL)
        self._clients.clear()
        self.done["counts"] += 1
        end, more = time.monotonic() + _PATIENCE, ["not counted"]
        while time.monotonic() < end:
            gone = not self._victims("kvmcore-vm fuz")
            now = self._footprint()
            if gone and self._before is None:
                time.sleep(2)  # the spare VM process is there by then
                self._before = self._footprint()
                return
            more = now.grown(self._before) if gone and self._before else ["VM processes of clients that are dead"]
            if not more:
                return
            time.sleep(0.1)
        raise Disturbed(f"left behind: {'; '.join(more)}")


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """Never to another process that has its pid by now: psutil looks."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return str(process.name())
    return ""


if __name__ == "__main__":
    nurse(sys.argv[1])
