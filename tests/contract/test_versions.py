"""A client and a kvmcore of different versions: they notice at the hello, and `softkvm` starts a daemon of its own version."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from protocol.abi.errors import KvmError
from protocol.channel import fd_passing
from protocol.client import Kvm
from qemu_user.cli.daemon import DaemonError, ensure
from tests.framework.full_stack import ROOT

OLD_CLIENT = """
import sys
from protocol.client import Kvm
vm = Kvm.open(sys.argv[1]).create_vm()
print(vm.pid, flush=True)
sys.stdin.readline()
print(vm.check_extension(9), flush=True)
sys.stdin.readline()
"""


class OldProgram:
    """kvmcore as it was before protocol/ was changed, and a daemon of it."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.endpoint = folder / "old", endpoint
        for name in ("protocol", "kvmcore"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        with (self.folder / "protocol" / "version.py").open("a") as file:
            file.write("# of last year\n")
        self.serve()

    def serve(self) -> None:
        """Start the daemon, and wait until it listens."""
        self.daemon = self.start("-m", "kvmcore", "--listen", self.endpoint)
        while self.daemon.poll() is None:
            try:
                fd_passing.connect(self.endpoint.removeprefix("ipc://")).close()
                return
            except OSError:
                time.sleep(0.01)

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, *words], cwd=self.folder, stdin=pipe, stdout=pipe, text=True)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OldProgram]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("SOFTKVM_ENDPOINT", raising=False)
    (tmp_path / "softkvm").mkdir(mode=0o700)
    program = OldProgram(tmp_path, f"ipc://{tmp_path}/softkvm/kvmcore.sock")
    yield program
    program.daemon.kill()
    program.daemon.wait(60)
    for process in _daemons(tmp_path):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(60)


def _daemons(runtime: Path) -> list[psutil.Process]:
    words = f"ipc://{runtime}/softkvm/kvmcore.sock"
    return [process for process in psutil.process_iter() if words in _cmdline(process) and process.pid]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_client_notices(old: OldProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KvmError) as error:
        Kvm.open(old.endpoint)
    assert error.value.errno == errno.EPROTO
    assert "another version" in str(error.value)
    assert str(old.daemon.pid) in str(error.value)
    assert "softkvm upgrade" in str(error.value)
    monkeypatch.setenv("SOFTKVM_ENDPOINT", old.endpoint)
    assert ensure() == old.endpoint  # whoever names a daemon means that one, and is told when it is used
    assert old.daemon.poll() is None


def test_an_old_daemon_makes_way_and_ends_with_its_last_vm(old: OldProgram) -> None:
    client = old.start("-c", OLD_CLIENT, old.endpoint)
    assert client.stdout is not None
    assert client.stdin is not None
    assert client.stdout.readline()
    assert ensure() == old.endpoint
    kvm = Kvm.open(old.endpoint)
    assert kvm.link.welcome["pid"] != old.daemon.pid
    assert kvm.create_vm().alive
    assert ensure() == old.endpoint, "the new one stays"
    assert kvm.alive
    assert old.daemon.poll() is None
    client.stdin.write("\n")
    client.stdin.flush()
    assert client.stdout.readline(), "the VM of the old one does not go on"
    client.kill()
    client.wait(60)
    assert old.daemon.wait(60) == 0
    assert Kvm.open(old.endpoint).link.welcome["pid"] == kvm.link.welcome["pid"], "it has taken the new one's socket along"
    kvm.close()


def test_one_that_does_not_make_way_is_named(old: OldProgram) -> None:
    old.daemon.kill()
    old.daemon.wait(60)
    daemon = old.folder / "kvmcore" / "server" / "daemon.py"
    daemon.write_text(daemon.read_text().replace('.get("retire")', '.get("not yet known")'))
    old.serve()
    with pytest.raises(DaemonError, match="does not make way"):
        ensure()
    assert old.daemon.poll() is None
