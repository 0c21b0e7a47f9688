"""The Debian image's agent: what it does with what the host says, with the commands that it calls replaced."""

from __future__ import annotations

import os
import subprocess
from importlib.resources import files
from pathlib import Path

TOOLS = ("systemctl", "hostnamectl", "ip")
KEYGEN = """#!/bin/sh
# Fails if a key is missing meanwhile: sshd would turn everybody away.
cat {keys}/ssh_host_ed25519_key {keys}/ssh_host_ecdsa_key >/dev/null || exit 1
echo "made $3" >{keys}/new; echo "public $3" >{keys}/new.pub
"""


def test_identity_and_powerdown(tmp_path: Path) -> None:
    port, log, machine_id = tmp_path / "port", tmp_path / "log", tmp_path / "machine-id"
    port.write_text("identity 0123abcd copy-1 52:54:00:00:00:01\nnonsense\npowerdown\n")
    for tool in TOOLS:
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >>{log}\n')
        (tmp_path / tool).chmod(0o755)
    keys = tmp_path / "ssh"
    keys.mkdir()
    for name in ("new", "ssh_host_ed25519_key", "ssh_host_ed25519_key.pub", "ssh_host_ecdsa_key", "ssh_host_ecdsa_key.pub"):
        (keys / name).write_text("the parent's")
    (tmp_path / "ssh-keygen").write_text(KEYGEN.format(keys=keys))
    (tmp_path / "ssh-keygen").chmod(0o755)
    for card in ("enp0s1", "enp0s2"):
        (tmp_path / "net" / card / "device").mkdir(parents=True)
    script = files("qemu_user.images").joinpath("debian_files/softkvm-agent.sh").read_text()
    for path, other in (
        ("/dev/virtio-ports/org.softkvm.control", port), ("/etc/machine-id", machine_id), ("/etc/ssh", keys)
    ):  # fmt: skip
        assert path in script
        script = script.replace(path, str(other))
    script = script.replace("/sys/class/net", str(tmp_path / "net"))
    subprocess.run(["sh", "-eu", "-c", script], env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert machine_id.read_text() == "0123abcd\n"
    said = log.read_text().splitlines()
    assert said[0] == "hostnamectl hostname copy-1"
    assert said[1:4] == [
        "ip link set dev enp0s1 down", "ip link set dev enp0s1 address 52:54:00:00:00:01", "ip link set dev enp0s1 up",
    ]  # fmt: skip
    assert said[4:] == ["systemctl poweroff"]
    assert {path.name: path.read_text().strip() for path in keys.iterdir()} == {
        "ssh_host_ed25519_key": "made ed25519", "ssh_host_ed25519_key.pub": "public ed25519",
        "ssh_host_ecdsa_key": "made ecdsa", "ssh_host_ecdsa_key.pub": "public ecdsa",
    }  # fmt: skip
