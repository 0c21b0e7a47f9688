"""The registry across processes and deaths, the QMP stream, and the list of commands."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.codec.qmp import QmpReader, QmpSyntaxError, encode
from qemu_user.management import registry
from qemu_user.management.commands import commands


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_a_vm_is_listed_while_it_lives() -> None:
    mine = registry.Registration("web")
    assert registry.list_vms() == [], "not described yet"
    mine.describe(vm_pid=1, memory=2, cpus=3)
    (entry,) = registry.list_vms()
    assert (entry.name, entry.pid, entry.vm_pid, entry.memory, entry.cpus) == ("web", os.getpid(), 1, 2, 3)
    assert registry.find("web") == entry
    with pytest.raises(registry.NameTaken, match="web"):
        registry.Registration("web")
    mine.close()
    mine.close()
    assert registry.list_vms() == []
    assert not entry.directory.exists()


def test_what_a_killed_vm_leaves_is_cleared() -> None:
    code = (
        "import os, signal; from qemu_user.management.registry import Registration;"
        "r = Registration('dead'); r.describe(); open(r.directory / 'console.sock', 'w').close();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], check=False)
    assert done.returncode == -9
    left = registry.runtime_directory() / "vms" / "dead"
    assert left.exists()
    assert registry.list_vms() == []
    assert not left.exists()
    registry.Registration("dead").close()


def test_qmp_stream_in_any_pieces() -> None:
    messages = [{"execute": "a", "id": i, "arguments": {"text": 'br{ace"s \\ }'}} for i in range(20)]
    stream = b"".join(encode(m).rstrip() if i % 2 else encode(m) for i, m in enumerate(messages))
    choice = random.Random(3)
    for _ in range(20):
        reader, found, at = QmpReader(), [], 0
        while at < len(stream):
            size = choice.randrange(1, 60)
            found += reader.feed(stream[at : at + size])
            at += size
        assert found == messages


@pytest.mark.parametrize("bad", [b"nonsense\n", b"{'a': 1}", b"[1]", b'{"a" 1}', b"}\n", b"[" * 100 + b"\n", b'"x"\n'])
def test_qmp_syntax_errors_are_survived(bad: bytes) -> None:
    reader = QmpReader()
    found = reader.feed(bad) + reader.feed(b'{"execute": "x"}')
    assert isinstance(found[0], QmpSyntaxError)
    assert found[-1] == {"execute": "x"}


def test_qmp_messages_are_bounded() -> None:
    reader = QmpReader()
    found = reader.feed(b'{"a": "' + b"x" * (2 << 20))
    assert isinstance(found[0], QmpSyntaxError)


def test_every_command_file_is_listed() -> None:
    folder = Path(registry.__file__).parent / "commands"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "command"}
    assert len(files) == len(commands())
    assert all(command.doc for command in commands().values())
