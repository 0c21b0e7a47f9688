"""softkvm host and migrate over tcp: what is told when a key is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from protocol.channel import keys
from qemu_user.cli.main import main


def test_a_host_that_nobody_may_send_vms_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    assert main(["host", "serve", "--listen", "tcp://127.0.0.1:0"]) == 1
    assert f"nobody may send VMs: {keys.folder() / 'peers'} has no public key" in capsys.readouterr().err


def test_a_public_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(keys.KeyFileError, match="there is no such file; copy the other host's public key"):
        keys.public(tmp_path / "b.key")
    (tmp_path / "b.key").write_text("no key")
    with pytest.raises(keys.KeyFileError, match=r"key .*b\.key"):
        keys.public(tmp_path / "b.key")
