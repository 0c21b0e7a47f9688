"""What a process has given up it has given up: each rule is tried, in a child process that has taken it on."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from errno import EACCES, ENOENT, ENOSYS, EPERM
from pathlib import Path

import pytest

from kvmcore.server import confinement as kvmcore
from protocol.channel import confinement
from protocol.channel.confinement import READ, Filter, If
from qemu_user import confinement as qemu_user
from qemu_user.config.machine_config import Drive, MachineConfig, Net, Share

needs_seccomp = pytest.mark.skipif(not confinement.seccomp_available(), reason="this kernel has no seccomp filters")
needs_landlock = pytest.mark.skipif(not confinement.landlock_version(), reason="this kernel has no Landlock")


def in_child(work: Callable[[], int]) -> int:
    """What `work` returns in a forked child, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 199
        try:
            status = work()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def errno_of(call: Callable[[], object]) -> int:
    """0 if it works."""
    try:
        call()
    except OSError as error:
        return error.errno or 199
    return 0


@needs_seccomp
def test_errnos_kills_and_conditions() -> None:
    rules = Filter(
        kill=frozenset(("ptrace",)),
        errnos={"unlink": ENOSYS},
        allow={"socket": (If(0, 0xFFFFFFFF, (socket.AF_UNIX,)),)},
        otherwise=None,
    )

    def refused() -> int:
        confinement.seccomp(rules)
        assert errno_of(lambda: os.unlink("/nowhere")) == ENOSYS
        socket.socket(socket.AF_UNIX).close()
        return 0

    def killed() -> int:
        confinement.seccomp(rules)
        ctypes.CDLL(None).ptrace(0, 0, 0, 0)
        return 0

    assert in_child(refused) == 0
    assert in_child(killed) == -signal.SIGSYS


@needs_seccomp
def test_threads_that_exist_are_bound_too() -> None:
    def work() -> int:
        go, found = threading.Event(), []

        def later() -> None:
            go.wait(60)
            found.append(errno_of(lambda: os.unlink("/nowhere")))

        thread = threading.Thread(target=later, daemon=True)
        thread.start()
        confinement.seccomp(Filter(errnos={"unlink": EPERM}, otherwise=None))
        go.set()
        thread.join(60)
        return int(found != [EPERM])

    assert in_child(work) == 0


def _protect(address: int, rights: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if libc.mprotect(address, mmap.PAGESIZE, rights):
        raise OSError(ctypes.get_errno(), "mprotect")


ATTEMPTS: dict[str, Callable[[], object]] = {
    "write a file": lambda: os.open("/dev/null", os.O_WRONLY),
    "create a file": lambda: os.open("/tmp/softkvm-test-created", os.O_RDONLY | os.O_CREAT),
    "use the network": lambda: socket.socket(socket.AF_INET),
    "fork": os.fork,
    "signal another process": lambda: os.kill(os.getppid(), signal.SIGCONT),
    "writable and executable memory": lambda: mmap.mmap(-1, mmap.PAGESIZE, prot=7, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "make a folder": lambda: os.mkdir("/tmp/softkvm-test-folder"),
    "link": lambda: os.link("/tmp/a", "/tmp/b"),
    "become another user": lambda: os.setuid(12345),
    "choose its processors": lambda: os.sched_setaffinity(0, {0}),
}


@needs_seccomp
@pytest.mark.parametrize("name", ATTEMPTS)
def test_what_a_vm_process_may_no_longer(name: str) -> None:
    def work() -> int:
        kvmcore.calls()
        return errno_of(ATTEMPTS[name])

    assert in_child(work) == EPERM


@needs_seccomp
def test_what_a_vm_process_still_may(tmp_path: Path) -> None:
    def work() -> int:
        kvmcore.calls()
        done = []
        threads = [threading.Thread(target=done.append, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        code = mmap.mmap(-1, mmap.PAGESIZE, prot=5, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        code.close()
        fd = os.memfd_create("test")
        os.ftruncate(fd, 4096)
        mmap.mmap(fd, 4096).close()
        import zmq

        context = zmq.Context(1)
        one, two = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        one.bind("inproc://x")
        two.connect("inproc://x")
        one.send(b"y")
        assert two.recv() == b"y"
        import xml.dom.minidom  # a module that nobody has imported yet

        return int(sorted(done) != [0, 1, 2] or xml.dom.minidom is None)

    assert in_child(work) == 0


@needs_seccomp
@pytest.mark.parametrize(
    "confine", [kvmcore.calls, lambda: qemu_user.confine(MachineConfig())], ids=["VM process", "device process"]
)
def test_nobody_starts_programs_or_looks_into_others(confine: Callable[[], object]) -> None:
    def starts() -> int:
        confine()
        return errno_of(lambda: os.execv("/bin/true", ["true"]))

    def traces() -> int:
        confine()
        ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0)
        return 0

    assert in_child(starts) in (-signal.SIGSYS, EPERM)
    assert in_child(traces) == -signal.SIGSYS


@needs_seccomp
def test_only_for_a_user_network_programs_can_be_started() -> None:
    def starts() -> int:
        qemu_user.confine(MachineConfig(nets=(Net(kind="user"),)))
        return errno_of(lambda: os.execv("/nowhere", ["nowhere"]))

    assert in_child(starts) == ENOENT


@needs_landlock
def test_files_beyond_those_named_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("mine")
    (tmp_path / "out").write_text("not mine")

    def work() -> int:
        confinement.landlock({str(tmp_path / "in"): READ, "/nowhere/at/all": READ}, network=False)
        assert (tmp_path / "in" / "file").read_text() == "mine"
        assert errno_of(lambda: (tmp_path / "in" / "file").write_text("x")) == EACCES
        return errno_of((tmp_path / "out").read_text)

    assert in_child(work) == EACCES


@needs_landlock
def test_what_a_vm_process_sees_of_the_file_system(tmp_path: Path) -> None:
    secret, private = tmp_path / "secret", tmp_path / "private"
    secret.write_text("key")
    private.mkdir()
    (private / "socket").touch()

    def work() -> int:
        kvmcore.files(str(private), network=False)
        os.unlink(private / "socket")
        assert Path(__file__).exists()
        assert Path("/proc/self/stat").read_text()
        assert errno_of((secret.parent / "secret").unlink) == EACCES
        import wave  # a module that nobody has imported yet

        return errno_of(secret.read_text) if wave else 0

    assert in_child(work) == EACCES


@needs_landlock
def test_a_device_process_reaches_what_its_vm_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "own"))
    for name in ("own", "disks", "share", "more", "other"):
        (tmp_path / name).mkdir()
    config = MachineConfig(
        drives=(Drive(file=str(tmp_path / "disks" / "a.raw")),), shares=(Share(folder=str(tmp_path / "share"), tag="t"),)
    )

    def confined() -> int:
        qemu_user.only_files(config, [str(tmp_path / "more")])
        for name in ("disks", "share", "more", "own/softkvm"):
            (tmp_path / name / "new").write_text("made")
            (tmp_path / name / "new").unlink()
        refused = [
            errno_of(lambda: (tmp_path / "other" / "new").write_text("")),
            errno_of(lambda: os.listdir(tmp_path / "other")),
            errno_of(lambda: os.listdir(Path.home())),
            errno_of(lambda: open("/etc/hostname", "a").close()),
        ]
        os.kill(os.getppid(), 0)
        return 0 if set(refused) == {EACCES} and not errno_of(lambda: os.listdir("/etc")) else 1

    assert in_child(confined) == 0


def test_a_host_without_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "AUDIT_ARCH", 0)
    monkeypatch.setattr(confinement, "landlock_version", lambda: 0)
    assert kvmcore.missing() == ["seccomp filters", "Landlock"]
    assert "x86-64" in qemu_user.confine(MachineConfig())
