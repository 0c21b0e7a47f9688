"""A whole Debian that is watched while it is moved: booted to its login prompt, here or under QEMU, with the same kernel,
initramfs and devices; then told at its console to take its address on the wire and to run the probe (kernels/probe.c).

The probe comes with its own disk, the second one: that has the program from block _AT on.
"""

from __future__ import annotations

import os
import select
import subprocess
import time
from pathlib import Path

from qemu_user.backends.block.opening import create_overlay
from qemu_user.bench import debian_boot
from qemu_user.bench.processor import BenchError
from qemu_user.bench.wire import GUEST, HOST, Wire
from qemu_user.images.store import Store

NAME = "bench"
_PROBE = Path(__file__).parent / "kernels" / "probe.bin"
_PROBE_DISK = 1 << 20
_BLOCK, _AT = 4096, 16
_SHELL = b":~#"
_LIMIT_SECONDS = 300.0
_QUIET_SECONDS = 15.0
"""After the prompt: what systemd still does."""
_NETWORK = "/run/systemd/network/10-bench.network"


class Debian:
    """`folder`: for its disk and initramfs, of which the disk is a new overlay over the image's. BenchError: no image."""

    def __init__(self, folder: Path) -> None:
        image = Store().find("debian")
        if image is None:
            raise BenchError("the image is not there; softkvm pull debian makes it")
        self._image = image
        self._initrd = debian_boot.initrd_file(image, folder)
        self._root = folder / "root.qcow2"
        create_overlay(image.disk, self._root, base_format="qcow2")

    def new_probe_disk(self, disk: Path) -> None:
        """Nothing reported yet, and the program."""
        data = bytearray(_PROBE_DISK)
        probe = _PROBE.read_bytes()
        data[_AT * _BLOCK : _AT * _BLOCK + len(probe)] = probe
        disk.write_bytes(data)

    def words(self, disk: Path, wire: Wire) -> list[str]:
        """The options, for QEMU and for what softkvm_command() starts."""
        return [
            *debian_boot.words(self._image, self._initrd, self._root, NAME),
            "-drive", f"file={disk},format=raw,if=none,id=probe", "-device", "virtio-blk-pci,drive=probe",
            "-netdev", f"stream,id=n0,server=off,addr.type=unix,addr.path={wire.path}",
            "-device", "virtio-net-pci,netdev=n0,romfile=",
        ]  # fmt: skip

    def softkvm_command(self) -> list[str]:
        """What takes them here."""
        return debian_boot.softkvm_command()

    def log_in(self, process: subprocess.Popen[bytes]) -> None:
        """At the console, when it is there; the probe samples from then on. BenchError."""
        assert process.stdin is not None
        _wait_for(process, _SHELL)
        time.sleep(_QUIET_SECONDS)
        lines = (
            "mkdir -p /run/systemd/network",
            f"printf '[Match]\\nType=ether\\n[Network]\\nAddress={GUEST}/24\\n' >{_NETWORK}",
            "networkctl reload",
            f"dd if=/dev/vdb of=/root/probe bs={_BLOCK} skip={_AT} count=4; chmod +x /root/probe",
            f"until ping -c 3 -W 1 {HOST}; do sleep 1; done; /root/probe sample /dev/vdb 0 &",
        )
        for line in lines:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            _wait_for(process, _SHELL)


def _wait_for(process: subprocess.Popen[bytes], words: bytes) -> None:
    assert process.stdout is not None
    seen, end = b"", time.monotonic() + _LIMIT_SECONDS
    while words not in seen:
        if not select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise BenchError(f"Debian does not say {words.decode()!r} at its console: {seen[-300:].decode(errors='replace')}")
        part = os.read(process.stdout.fileno(), 65536)
        if not part:
            raise BenchError(f"Debian's VM has ended: {seen[-300:].decode(errors='replace')}")
        seen += part
