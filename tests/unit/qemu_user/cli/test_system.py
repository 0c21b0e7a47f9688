"""Options of images with a disk: what is refused, what becomes of the rest."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from qemu_user.cli import run, system
from qemu_user.config.errors import ConfigError
from qemu_user.images.store import Image, Meta
from qemu_user.images.vm_disk import VmDisk

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJX0yCcQ somebody@here"


def options(*words: str) -> argparse.Namespace:
    return run.parser().parse_args(["debian", *words])


def disk(new: bool = True) -> VmDisk:
    return VmDisk(Image("debian", Path("/x"), Meta(2, "debian", "", 0.0)), Path("/x,y/disk.qcow2"), new, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hostname", "a_b"], "--hostname a_b"), (['--hostname=-x'], '--hostname'), (["--hostname", "x" * 64], "--hostname"),
        (["--hostname", "a;reboot"], "--hostname"), (["--user", "root"], "--user"), (["--user", "A"], "--user"),
        (["--user", "a b"], "--user"), (["--user", "a\nb"], "--user"), (["--ssh-key", "/nowhere"], "/nowhere: No such file"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        system._check(options(*words))


def test_who_is_logged_in() -> None:
    given = options("--user", "ada")
    assert (system.login(given, disk()), system.login(options(), disk())) == ("ada", "root")
    booted = dataclasses.replace(disk(new=False), login="eve")
    assert (system.login(given, booted), system.login(options(), booted)) == ("eve", "eve")


def test_keys(tmp_path: Path) -> None:
    good, private, empty = tmp_path / "k.pub", tmp_path / "k", tmp_path / "e"
    good.write_text(f"# mine\n{KEY}\n\nssh-rsa AAAA\n")
    private.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n")
    empty.write_text("\n")
    assert system._given_keys(options("--ssh-key", str(good))) == [KEY, "ssh-rsa AAAA"]
    with pytest.raises(ConfigError, match="is a private key; give the public one"):
        system._given_keys(options("--ssh-key", str(private)))
    with pytest.raises(ConfigError, match="holds no public keys"):
        system._given_keys(options("--ssh-key", str(empty)))


def test_default_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(system.shutil, "which", lambda name: f"/bin/{name}")
    root = ["-drive", "file=/x,,y/disk.qcow2,id=root,discard=unmap"]
    assert system.words(options(), disk()) == [*root, "-nic", "user,id=net0", "-vsock", ""]
    assert "-nic" not in system.words(options("--nic", "none"), disk())
    assert system.words(options("--vsock", "/s"), disk())[-2:] != ["-vsock", ""]
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    assert "-nic" not in system.words(options(), disk())
    assert "gets no network: passt is not installed" in capsys.readouterr().err


def test_first_boot_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.shutil, "which", lambda name: None)
    first = system.settings(options("--user", "ada"), disk(), "Web_1", [])
    assert (first["NAME"], first["USER_NAME"], first["SSH_KEYS"], first["ROOT"]) == ("web-1", "ada", "", "/dev/vda")
    assert len(first["MACHINE_ID"]) == 32
    assert first["MACHINE_ID"] != system.settings(options(), disk(), "web", [])["MACHINE_ID"]
    assert system.settings(options("--hostname", "h"), disk(new=False), "web", []) == {"ROOT": "/dev/vda", "NAME": "h"}
    assert system.settings(options(), disk(), "web", ["ls"]) == {"ROOT": "/dev/vda", "NAME": "web"}


def test_options_that_need_a_disk() -> None:
    assert system.given(options("--user", "u", "--disk-size", "9G")) == ["--user", "--disk-size"]
