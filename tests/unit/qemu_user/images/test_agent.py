"""The Debian image's agent: what it does with what the host says, with the commands that it calls replaced."""

from __future__ import annotations

import os
import subprocess
from importlib.resources import files
from pathlib import Path

TOOLS = ("systemctl", "hostnamectl", "ip", "ssh-keygen", "rm")


def test_identity_and_powerdown(tmp_path: Path) -> None:
    port, log, machine_id = tmp_path / "port", tmp_path / "log", tmp_path / "machine-id"
    port.write_text("identity 0123abcd copy-1 52:54:00:00:00:01\nnonsense\npowerdown\n")
    for tool in TOOLS:
        (tmp_path / tool).write_text(f'#!/bin/sh\necho {tool} "$@" >>{log}\n')
        (tmp_path / tool).chmod(0o755)
    for card in ("enp0s1", "enp0s2"):
        (tmp_path / "net" / card / "device").mkdir(parents=True)
    script = files("qemu_user.images").joinpath("debian_files/softkvm-agent.sh").read_text()
    for path, other in (("/dev/virtio-ports/org.softkvm.control", port), ("/etc/machine-id", machine_id)):
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
    assert said[4].startswith("rm -f ")
    assert said[5:] == ["ssh-keygen -A", "systemctl poweroff"]
