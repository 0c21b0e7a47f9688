"""A real QEMU that boots the busybox image with a network of the caller's choice and runs one command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.performance.bench import qemu_command


class QemuGuest:
    """`netdev`: QEMU's option with id=n; `command`: what the guest runs; `folder`: for its files."""

    def __init__(self, folder: Path, netdev: str, command: list[str], mac: str = "52:54:00:12:34:99") -> None:
        self._output = folder / "stdout"
        words = qemu_command(folder, 1, command)
        words += ["-netdev", netdev, "-device", f"virtio-net-device,netdev=n,mac={mac}"]
        self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def run(self, seconds: float) -> str:
        """What the command wrote, once the guest has powered off."""
        try:
            said, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
        return self._output.read_text() + said.decode(errors="replace")
