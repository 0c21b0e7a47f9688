"""softkvm ssh and cp: the way over vsock, waiting for a guest that is not up, what is told when something is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_user.cli import ssh, ssh_proxy
from qemu_user.cli.main import main
from qemu_user.cli.vm import VerbError
from qemu_user.management.registry import Registration

Answer = Callable[[socket.socket, bytes], None]


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registration]:
    """A VM in the registry, called web."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    registration = Registration("web")
    registration.describe(vm_pid=0, memory=0, cpus=1)
    yield registration
    registration.close()


def serve(path: Path, answers: list[Answer]) -> threading.Thread:
    """The host side of a vsock device: each connection's request goes to the next answer."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def work() -> None:
        with listener:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    answer(connection, connection.recv(64))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def refuse(connection: socket.socket, request: bytes) -> None:
    """The guest does not listen yet."""


def accept(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"OK 1024\nSSH-2.0-guest " + request)


def test_the_proxy_waits_and_hands_its_connection_over(tmp_path: Path) -> None:
    server = serve(tmp_path / "v", [refuse, refuse, accept])
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", "-m", "qemu_user.cli.ssh_proxy", str(tmp_path / "v"), "30"]
    with ours, theirs:
        subprocess.run(command, stdout=theirs, check=True, timeout=60)
        message, fds, _, _ = socket.recv_fds(ours, 16, 4)
        assert (message, len(fds)) == (b"\0", 1)
        with socket.socket(fileno=fds[0]) as connection:
            assert connection.recv(100) == b"SSH-2.0-guest CONNECT 22\n"
    server.join()


def test_a_guest_that_does_not_come(tmp_path: Path) -> None:
    server = serve(tmp_path / "v", [refuse, refuse])
    with pytest.raises(TimeoutError, match="did not answer within"):
        ssh_proxy.connect(str(tmp_path / "v"), 0.05)
    server.join()
    with pytest.raises(ConnectionRefusedError):
        ssh_proxy.connect(str(tmp_path / "v"), 1)  # nobody listens: the VM is gone


def test_no_ssh_client(vm: Registration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["ssh", "web"]) == 1
    assert "ssh is not installed (Debian, Ubuntu: apt install openssh-client" in capsys.readouterr().err
    assert main(["cp", "web:/x", "y"]) == 1
    assert "scp is not installed" in capsys.readouterr().err


def test_a_vm_that_cannot_be_reached(vm: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerbError, match="no VM 'nobody' is running"):
        ssh.options("nobody")
    with pytest.raises(VerbError, match="web: cannot be reached by ssh: it has no vsock device"):
        ssh.options("web")


class Executed(Exception):
    """In the place of another program."""


def words_of(verb: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is executed."""

    def execute(program: str, words: list[str]) -> None:
        raise Executed(words)

    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(ssh, "program", lambda name: f"/bin/{name}")
    monkeypatch.setattr(ssh, "key", lambda: Path("/key"))
    with pytest.raises(Executed) as raised:
        main(verb)
    return list(raised.value.args[0])


def test_what_ssh_is_told(vm: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    (vm.directory / "vsock.sock").touch()
    words = words_of(["ssh", "-t", "-L", "80:a:80", "web", "ls", "-l"], monkeypatch)
    assert words[-6:] == ["-t", "-L", "80:a:80", "web", "ls", "-l"]
    assert "User=root" in words
    assert any(word.startswith("ProxyCommand=") and str(vm.directory / "vsock.sock") in word for word in words)
    vm.describe(vm_pid=0, memory=0, cpus=1, login="ada")
    assert "User=ada" in words_of(["ssh", "web"], monkeypatch)
    assert "User=eve" in words_of(["ssh", "eve@web"], monkeypatch)


def test_what_scp_is_told(vm: Registration, monkeypatch: pytest.MonkeyPatch) -> None:
    (vm.directory / "vsock.sock").touch()
    words = words_of(["cp", "-r", "a", "./b:c", "/d:e", "web:/x"], monkeypatch)
    assert words[-6:] == ["-r", "--", "./a", "././b:c", "/d:e", "web:/x"]


@pytest.mark.parametrize("paths", [["a", "b"], ["web:a", "other:b"], ["web:a"]])
def test_copies_that_make_no_sense(vm: Registration, paths: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["cp", *paths])
    assert raised.value.code == 2
