"""A private kvmcore daemon to be fuzzed, started by its command line, and what can be seen of it from outside.

Counts its processes, descriptors, memory and files, and reads its log: "internal error" there is a finding even where
the client saw an errno.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import psutil
import zmq.auth

from protocol.channel import keys
from protocol.channel.zmq_socket import Curve
from protocol.codec import coverage_marks
from qemu_user.fuzz.branches import Branch, branches, taken

OWN_FILES = frozenset(("log", "coverage", "peers", "host.key", "host.key_secret", "ours.key", "ours.key_secret"))
"""What is ours in the directory that the daemon listens in."""
_LEFT_ALONE = 60
"""Seconds after which a daemon ends whose fuzzer was killed."""


class Footprint(NamedTuple):
    """What a daemon with its VMs takes: counts, memory in bytes."""

    processes: int
    descriptors: int
    files: int
    memory: int

    def grown(self, before: Footprint, descriptors: int = 0) -> list[str]:
        """What there is more of than before, memory only beyond 32 MiB: pages of Python come and go. `descriptors`: so many
        more are none.
        """
        names = ("processes", "descriptors", "endpoints")
        spare = (0, descriptors, 0)
        rows = zip(names, before, self, spare, strict=False)
        more = [f"{name}: {old} -> {new}" for name, old, new, most in rows if new > old + most]
        if self.memory > before.memory + (32 << 20):
            more.append(f"memory: {before.memory >> 20} -> {self.memory >> 20} MiB")
        return more


class Daemon:
    """`with Daemon() as daemon`: listens at daemon.endpoint until the end."""

    def __init__(self, *, coverage: bool = False) -> None:
        """Listens on tcp too: `far` is where, and a client's keys."""
        self.directory = Path(tempfile.mkdtemp(prefix="softkvm-fuzz-"))
        self.endpoint = f"ipc://{self.directory / 'kvmcore.sock'}"
        self.log = self.directory / "log"
        self._map: mmap.mmap | None = None
        options: list[str] = []
        if coverage:
            marks = self.directory / "coverage"
            marks.write_bytes(bytes(coverage_marks.SIZE))
            with marks.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), coverage_marks.SIZE)
            options = ["--coverage", str(marks)]
        self.far = self._keys()
        options += ["--listen", self.far[0], "--key", str(self.directory / "host.key_secret")]
        options += ["--peers", str(self.directory / "peers")]
        readable, writable = os.pipe()
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvmcore", "--listen", self.endpoint, "--ready-fd", str(writable),
                 "--idle-timeout", str(_LEFT_ALONE), *options],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[writable], start_new_session=True,
            )  # fmt: skip
        os.close(writable)
        with os.fdopen(readable, "rb") as pipe:
            word = pipe.readline()
        self._read = 0
        if word.strip() != b"ready":
            text = self.log.read_text(errors="replace")
            self.close()
            raise RuntimeError(f"kvmcore did not start: {text[-500:]}")
        self._tree = psutil.Process(self._process.pid)

    def _keys(self) -> tuple[str, Curve]:
        """Key files for a server and one client of it."""
        for name in ("host", "ours"):
            zmq.auth.create_certificates(self.directory, name)
        peers = self.directory / "peers"
        peers.mkdir()
        shutil.copy(self.directory / "ours.key", peers)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = keys.own(self.directory / "ours.key_secret")
        return f"tcp://127.0.0.1:{port}", Curve(own.public, own.secret, keys.public(self.directory / "host.key"))

    @property
    def pid(self) -> int:
        return self._process.pid

    def covered(self) -> int:
        """How many ways through the server's lines have been taken so far; 0 when that is not watched."""
        return self._map[:].count(1) if self._map is not None else 0

    @property
    def alive(self) -> bool:
        """Whether the daemon runs; the zygote may have been replaced."""
        return self._process.poll() is None

    def branches(self) -> tuple[list[Branch], list[Branch]]:
        """The branches of the watched source, and those of them that have been taken; ([], []) if nobody watches."""
        if self._map is None:
            return [], []
        every = branches(Path(__file__).parents[2])
        return every, taken(every, self._map[:])

    def complaints(self) -> str:
        """What has come into the log since the last look and is a fault of the server's, "" if nothing."""
        if self.log.stat().st_size == self._read:
            return ""
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read().decode(errors="replace")
        self._read += len(text.encode())
        return (
            text if any(word in text for word in ("Traceback", "internal error", "Fatal", "Segmentation", "Assertion")) else ""
        )

    def cpu_seconds(self, but: int) -> float:
        """CPU time of the daemon and its processes so far, those that have ended included, without process `but`."""
        seconds = 0.0
        for process in (self._tree, *self._tree.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.children_user + times.children_system
                seconds += times.user + times.system if process.pid != but else 0.0
        return seconds

    def footprint(self) -> Footprint:
        """As it is now. Processes that end meanwhile count as ended."""
        processes, descriptors, memory = 0, 0, 0
        for process in (self._tree, *self._tree.children(recursive=True)):
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                descriptors += process.num_fds()
                memory += process.memory_info().rss
                processes += 1
            except psutil.Error:
                continue
        return Footprint(processes, descriptors, sum(1 for _ in self.directory.rglob("*")), memory)

    def close(self) -> list[str]:
        """Stop it; what it leaves behind: processes and files, [] as it should be. Idempotent."""
        left: list[str] = []
        if not self.directory.exists():
            return left
        children = []
        try:
            children = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.Error:
            pass
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            left.append("the daemon does not end on SIGTERM")
            self._process.kill()
            self._process.wait()
        _, stay = psutil.wait_procs(children, timeout=10)
        for process in stay:
            left.append(f"process {process.pid} is left")
            process.kill()
        left += [f"{path.name} is left" for path in self.directory.iterdir() if path.name not in OWN_FILES]
        shutil.rmtree(self.directory, ignore_errors=True)
        return left

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
