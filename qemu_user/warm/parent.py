"""The warm parent, at most one for a runtime directory: it has imported what devices, VMs in the background and the verbs that
make them need, and forks a process for each that asks.

Only a process of the same user in the same circumstances (circumstances.py) is served, and none once a file that was imported
has changed. Started by cli/daemon.py beside a daemon. It ends with that daemon and its children. It has one thread and no
ZeroMQ context when it forks: those of its rehearsal have ended.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from protocol.channel import fd_passing, process_memory, process_title
from qemu_user.runtime_folder import runtime_folder
from qemu_user.warm import circumstances, request
from qemu_user.warm.asking import SOCKET
from qemu_user.warm.request import Request

_ROOT = Path(__file__).parents[2]
_ASK_SECONDS = 2.0
_F_SETSIG = 10
_VERBS = ("run", "restore", "clone", "template", "snapshot", "migrate", "upgrade", "attach", "daemon", "console")
_NEEDED = (
    "protocol.client", "protocol.client.batch", "qemu_user.cgroup", "qemu_user.config.qemu_options", "qemu_user.confinement",
    "qemu_user.images.store", "qemu_user.management.instance", "qemu_user.machine.boot", "qemu_user.migration.arrival",
    *(f"qemu_user.cli.{verb}" for verb in _VERBS), "qemu_user.migration.source", "qemu_user.backends.block.raw",
    "qemu_user.backends.block.direct", "qemu_user.machine.networks", "qemu_user.backends.net.stream",
    "qemu_user.backends.net.passt",
)  # fmt: skip


def preload(daemon: int) -> bool:
    """All that a usual VM imports; False: the daemon has ended meanwhile."""
    for name in _NEEDED:
        importlib.import_module(name)
        if select.select([daemon], [], [], 0)[0]:
            return False
    from qemu_user.management.commands import commands
    from qemu_user.migration import arrival

    arrival.preload()
    commands()
    return True


class Parent:
    """serve() until the daemon is gone; in a child it returns the request that the child is to fulfil."""

    def __init__(self, folder: Path, lock: int, daemon: int) -> None:
        """`lock`: a descriptor that keeps others from being made; `daemon`: a pidfd; both are ours from now on."""
        self._lock, self._retired = lock, False
        self._path, self._daemon_path = folder / SOCKET, folder / "kvmcore.sock"
        self._ours = circumstances.of(os.getpid())
        self._variables = circumstances.variables(dict(os.environb))
        self._sources = _sources()
        self._children: dict[int, tuple[int, socket.socket]] = {}
        self._poll = select.poll()
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(0o077)
        try:
            self._listener.bind(str(self._path))
        finally:
            os.umask(umask)
        self._listener.listen(64)
        self._poll.register(self._listener, select.POLLIN)
        self._daemon = daemon
        self._poll.register(daemon, select.POLLIN)

    def serve(self) -> Told | None:
        """What to be, in a child; None when it is over."""
        while True:
            if not self._retired and not self._watch_daemon():
                self._retire()
            if self._retired and not self._children:
                return None
            for fd, _ in self._poll.poll():
                if fd in self._children:
                    self._tell_end(fd)
                elif fd == self._daemon:
                    self._unwatch()
                elif not self._fresh():
                    self._retire()
                elif (told := self._admit()) is not None:
                    return told

    # -- when it is over -------------------------------------------------------------------------

    def _retire(self) -> None:
        """Nobody is served any more, and another one may be started; who asked for a child yet hears of its end."""
        self._retired = True
        self._path.unlink(missing_ok=True)
        self._poll.unregister(self._listener)
        self._listener.close()
        if self._daemon >= 0:
            self._unwatch()
        os.close(self._lock)

    def _watch_daemon(self) -> bool:
        """Whether there is a daemon, or another one in its place; its end is seen by the poll."""
        if self._daemon < 0:
            try:
                with fd_passing.connect(str(self._daemon_path)) as sock:
                    self._daemon = fd_passing.peer_pidfd(sock)
            except OSError:
                return False
            self._poll.register(self._daemon, select.POLLIN)
        return True

    def _unwatch(self) -> None:
        self._poll.unregister(self._daemon)
        os.close(self._daemon)
        self._daemon = -1

    def _fresh(self) -> bool:
        """Whether the program is still what was imported."""
        return _marks(self._sources) == self._sources

    # -- who asks ----------------------------------------------------------------------------------

    def _admit(self) -> Told | None:
        connection, _ = self._listener.accept()
        told, fds = None, list[int]()
        try:
            connection.settimeout(_ASK_SECONDS)
            peer = fd_passing.credentials(connection).pid
            pidfd = fd_passing.peer_pidfd(connection)
            try:
                circumstances.compare(self._ours, circumstances.of(peer))
                ignored = circumstances.ignored(peer)
                if select.select([pidfd], [], [], 0)[0]:
                    raise circumstances.Different("it is gone")
            finally:
                os.close(pidfd)
            wanted = self._hear(connection, fds)
            if circumstances.variables(wanted.environment) != self._variables:
                raise circumstances.Different("its interpreter is to be started otherwise")
            if self._fork(connection):
                told = Told(wanted, fds, ignored)
        except (circumstances.Different, ValueError, OSError) as error:
            with suppress(OSError):
                connection.sendall(f"no {error}\n".encode())
            connection.close()
        if told is None:
            fd_passing.close_all(fds)
        return told

    @staticmethod
    def _hear(connection: socket.socket, fds: list[int]) -> Request:
        """What is asked, its descriptors in `fds`. ValueError, OSError."""
        data, came, _, _ = socket.recv_fds(connection, 65536, request.MOST_FDS + 2)
        fds += came
        for fd in came:
            os.set_inheritable(fd, False)
        while len(data) < request.LENGTH.size or len(data) < (whole := request.LENGTH.size + _length(data)):
            part = connection.recv(65536)
            if not part:
                raise ValueError("cut off")
            data += part
        wanted = request.decode(data[request.LENGTH.size : whole])
        if len(fds) != len(wanted.numbers) + 1 + wanted.dies or not {0, 1, 2} <= set(wanted.numbers):
            raise ValueError("other descriptors than announced")
        if wanted.program.decode() not in (request.SOFTKVM, request.ARRIVAL):
            raise ValueError("no program of that name")
        return wanted

    def _fork(self, connection: socket.socket) -> bool:
        """True in the child, which has nothing of the parent's."""
        pid = os.fork()
        if pid == 0:
            connection.close()
            self._listener.close()
            os.close(self._lock)
            for pidfd, (_, other) in self._children.items():
                os.close(pidfd)
                other.close()
            os.close(self._daemon)
            return True
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, connection
        self._poll.register(pidfd, select.POLLIN)
        with suppress(OSError):  # whoever asked has gone: a process that is to die with it does
            socket.send_fds(connection, [f"pid {pid}\n".encode()], [pidfd])
        return False

    def _tell_end(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        pid, connection = self._children.pop(pidfd)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with connection, suppress(OSError):
            connection.sendall((f"exit {code}" if code >= 0 else f"signal {-code}").encode() + b"\n")


class Told(NamedTuple):
    """What a child is to be."""

    request: Request
    fds: list[int]
    ignored: int
    """The mask of signals that are ignored."""


def become(told: Told) -> int:
    """In the child: be what was asked for, to its end; its exit status."""
    wanted, fds = told.request, told.fds
    os.setsid()
    if wanted.dies:
        _die_with(fds.pop(1))
    directory, *given = _above(fds, max(wanted.numbers))
    os.fchdir(directory)
    for fd, number in zip(given, wanted.numbers, strict=True):
        os.dup2(fd, number, inheritable=True)
    fd_passing.close_all([directory, *given])
    os.umask(wanted.umask)
    for name in list(os.environb):  # clear() and update() ask abstract classes, which looks at (and copies) all classes
        del os.environb[name]
    for name, value in wanted.environment.items():
        os.environb[name] = value
    for number in range(1, signal.NSIG):
        if told.ignored >> (number - 1) & 1 and number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    sys.stdin, sys.stdout, sys.stderr = _stream(0, "r"), _stream(1, "w"), _stream(2, "w")
    arguments = list(map(os.fsdecode, wanted.arguments))
    program = wanted.program.decode()
    module = "qemu_user.cli.main" if program == request.SOFTKVM else "qemu_user.migration.arrival"
    process_title.set_words([sys.executable, "-P", "-m", module, *arguments])
    sys.argv = [program, *arguments]
    return int(importlib.import_module(module).main(arguments))


def _die_with(pipe: int) -> None:
    """Be killed by the kernel when the last writer of `pipe` is gone, whatever this process does."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os.kill(os.getpid(), signal.SIGKILL)


def _above(fds: list[int], number: int) -> list[int]:
    """The same descriptors, all of them higher than `number`."""
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, number + 1) for fd in fds]
    fd_passing.close_all(fds)
    return moved


def _stream(fd: int, mode: str) -> TextIOWrapper:
    """As the interpreter makes them at its start."""
    old = {0: sys.__stdin__, 1: sys.__stdout__, 2: sys.__stderr__}[fd]
    assert old is not None
    lines = fd == 2 or (fd == 1 and os.isatty(fd))
    stream = open(fd, mode, encoding=old.encoding, errors=old.errors, closefd=False, buffering=1 if lines else -1)
    assert isinstance(stream, TextIOWrapper)
    return stream


def _length(data: bytes) -> int:
    length = int(request.LENGTH.unpack_from(data)[0])
    if length > request.MAX_REQUEST:
        raise ValueError("too long")
    return length


def _sources() -> dict[str, tuple[int, int]]:
    """The program's files that are imported, with their marks."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return _marks(file for file in files if file and file.startswith(str(_ROOT)))


def _marks(files: Iterable[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for file in files:
        with suppress(OSError):
            info = os.stat(file)
            found[file] = info.st_mtime_ns, info.st_size
    return found


def main(lock: int, daemon: int) -> int:
    """Serve; in children, what they are told to be. The arguments are Parent's."""
    process_title.set_words(["softkvm-warm"])
    process_memory.merge()
    if not preload(daemon):
        return 0
    from protocol.abi.errors import KvmError
    from qemu_user.machine.machine import StartError
    from qemu_user.management.qmp_client import QmpError
    from qemu_user.migration.job import JobError
    from qemu_user.warm import rehearsal

    with suppress(StartError, KvmError, JobError, QmpError, OSError):  # then its children are less warm
        rehearsal.rehearse(f"ipc://{runtime_folder()}/kvmcore.sock")
    if len(os.listdir("/proc/self/task")) > 1:
        return 1  # a thread is left, with which nobody may fork
    parent = Parent(Path(runtime_folder()), lock, daemon)
    process_memory.settle()
    told = parent.serve()
    return become(told) if told is not None else 0

