"""Verbs are found, explained and refused."""

from __future__ import annotations

import pytest

from qemu_user.cli.main import VERBS, main


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["help", verb])
    assert raised.value.code == 0
    assert f"usage: softkvm {verb}" in capsys.readouterr().out


def test_wrong_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "fly"]) == 2
    assert "no verb 'fly'; there are: run," in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["busybox", "too-many"], ["-m"]])
def test_wrong_option_of_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["run", *arguments])
    assert raised.value.code == 125
    assert "usage: softkvm run" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["console", "stop", "kill"])
def test_no_such_vm(verb: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main([verb, "nobody"]) == 1
    assert "no VM 'nobody'" in capsys.readouterr().err
