"""`softkvm doctor` looks at the host itself, and says what is wrong with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from protocol.channel import confinement
from qemu_user import host_checks
from qemu_user.cli.main import main
from qemu_user.host_checks import BROKEN, GOOD, MISSING


def status_of(name: str) -> tuple[str, str]:
    return host_checks.CHECKS[name]()


def test_this_host_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "softkvm can run here" in out
    for name in host_checks.CHECKS:
        assert f"  {name} " in out


def test_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["shared memory"]["status"] == GOOD
    assert "archive" not in found, "nothing is asked of the network unbidden"


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    assert status_of("cache folder")[0] == BROKEN
    assert status_of("data folder")[0] == MISSING
    assert main(["doctor"]) == 1
    assert "softkvm cannot run here: cache folder" in capsys.readouterr().out


def test_a_runtime_folder_that_others_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert status_of("runtime folder")[0] != BROKEN
    os.chmod(tmp_path / "softkvm", 0o755)
    assert status_of("runtime folder")[0] == BROKEN


def test_a_kernel_without_confinement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "AUDIT_ARCH", 0)
    monkeypatch.setattr(confinement, "landlock_version", lambda: 0)
    assert status_of("seccomp")[0] == MISSING
    assert status_of("Landlock")[0] == MISSING


def test_programs_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status_of("passt")[0] == MISSING
    (tmp_path / "passt").write_text("#!/bin/sh\n")
    (tmp_path / "passt").chmod(0o755)
    assert status_of("passt") == (GOOD, str(tmp_path / "passt"))


def test_a_check_that_fails_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> tuple[host_checks.Status, str]:
        raise OSError("not here")

    monkeypatch.setattr(host_checks, "CHECKS", {"fails": fails})
    assert host_checks.examine() == [("fails", BROKEN, "OSError: not here")]


def test_an_archive_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTKVM_MIRROR", "http://127.0.0.1:9/debian")
    status, text = host_checks.ONLINE["archive"]()
    assert status == MISSING
    assert "SOFTKVM_MIRROR" in text
