"""The launcher of --only-files starts passt, so that a process under Landlock has a network, and nothing else."""

from __future__ import annotations

import os
import select
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_user.backends.net.launcher import Launcher, refused


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


def test_what_passt_is_started_with() -> None:
    usual = ["-f", "-q", "-1", "--runas", "0:0", "--ipv4-only", "-a", "10.0.2.15", "-S", "a b", "-t", "::1/80:80", "--fd", "3"]
    assert refused(usual) == ""
    assert refused([*usual, "--pcap", "/tmp/x"]) == "--pcap"
    assert refused(["-l", "/tmp/x"]) == "-l"
    assert refused(["-t", "--log-file"]) == "-t"
    assert refused(["-t"]) == "-t"
    assert refused(["-t80"]) == "-t80"


def test_another_program_or_option_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(OSError, match="not started with --pcap"):
        launcher.start(["--fd", "3", "--pcap", str(tmp_path / "x")], theirs.fileno(), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)")
def test_it_starts_and_ends(launcher: Launcher) -> None:
    who = ["--runas", f"{os.getuid()}:{os.getgid()}"] if os.getuid() == 0 else []
    for _ in range(2):
        ours, theirs = socket.socketpair()
        errors, theirs_errors = os.pipe()
        started = launcher.start(["-f", "-q", "-1", *who, "--fd", "3"], theirs.fileno(), theirs_errors)
        theirs.close()
        os.close(theirs_errors)
        started.reap()
        with ours:
            assert select.select([ours], [], [], 60)[0]  # nobody has the other end any more
            assert ours.recv(1 << 16) == b""
        os.close(errors)
