"""A whole Debian to its login prompt, here and under QEMU, alternated. `softkvm bench debian`.

The image's disk is booted once, so that what only a first boot does is over; each measured boot has an overlay over that disk
of its own. Both sides get one command line: the same kernel, initramfs, disk and console (virtio-blk and virtio-console on
PCI). Taken is the time from the start of the command to the prompt on the console.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qemu_user.backends.block.opening import create_overlay
from qemu_user.bench.linux import have_qemu, note, place, scratch, wait_for_idle_work
from qemu_user.bench.processor import QEMU, BenchError, Kernel
from qemu_user.cli.system import EXTRAS, ROOT
from qemu_user.images.store import Image, Store, settings

Tell = Callable[[str], None]
PROMPT = b" login: "
_LIMIT_SECONDS = 300.0


def boots(rounds: int, tell: Tell) -> dict[str, Kernel]:
    """The login prompt: with nothing translated yet and no daemon; with what earlier boots have left. BenchError."""
    image = Store().find("debian")
    if image is None:
        raise BenchError("the image is not there; softkvm pull debian makes it")
    kernels = {"debian-first": Kernel(), "debian-warm": Kernel()}
    peer = have_qemu(tell)
    with scratch() as name, place(Path(name) / "warm") as warm:
        folder = Path(name)
        initrd = initrd_file(image, folder)
        booted = folder / "booted.qcow2"
        create_overlay(image.disk, booted, base_format="qcow2")
        tell("debian: the first boot")
        _until_prompt(_softkvm(image, initrd, booted), warm, finish=b"poweroff\n")
        wait_for_idle_work(folder / "warm")

        def measure(kernel: str, side: str, command: Callable[[Path], list[str]], env: dict[str, str]) -> None:
            overlay = folder / "overlay.qcow2"
            create_overlay(booted, overlay, base_format="qcow2")
            note(kernels[kernel], side, _until_prompt(command(overlay), env))
            overlay.unlink()

        for number in range(rounds):
            tell(f"debian: round {number + 1} of {rounds}")
            with place(folder / f"cold{number}") as cold:
                measure("debian-first", "softkvm", lambda disk: _softkvm(image, initrd, disk), cold)
            if peer:
                measure("debian-first", "qemu", lambda disk: _qemu(image, initrd, disk), dict(os.environ))
                kernels["debian-warm"].best["qemu"] = kernels["debian-first"].best["qemu"]
                kernels["debian-warm"].first["qemu"] = kernels["debian-first"].first["qemu"]
            measure("debian-warm", "softkvm", lambda disk: _softkvm(image, initrd, disk), warm)
    return kernels


def initrd_file(image: Image, folder: Path) -> Path:
    """The image's, with modules and settings: for QEMU takes one file."""
    data = image.initrd.read_bytes()
    data += bytes(-len(data) % 4) + settings({"ROOT": ROOT, "NAME": "bench", "MACHINE_ID": "5" * 32, "SSH_KEYS": ""})
    path = folder / "initrd"
    path.write_bytes(data + b"".join(image.extra(name).read_bytes() for name in EXTRAS))
    return path


def words(image: Image, initrd: Path, disk: Path, name: str) -> list[str]:
    """Options that both sides take: console on standard input and output, `disk` (qcow2) as the root's."""
    return [
        "-M", "virt", "-m", "512M", "-smp", "1", "-display", "none", "-monitor", "none", "-serial", "none",
        "-name", name,
        "-no-reboot", "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", image.append,
        "-drive", f"file={disk},format=qcow2,if=none,id=root", "-device", "virtio-blk-pci,drive=root",
        "-device", "virtio-rng-pci", "-device", "virtio-serial-pci", "-chardev", "stdio,id=console,signal=off",
        "-device", "virtconsole,chardev=console",
    ]  # fmt: skip


def softkvm_command() -> list[str]:
    """Who takes these options here."""
    # The daemon is looked for, and started, by the command itself: that belongs to the time.
    start = "from qemu_user.cli.daemon import ensure; import sys; from qemu_user.__main__ import main; " \
            "sys.exit(main([*sys.argv[1:], '-accel', 'kvmcore,endpoint=' + ensure()]))"  # fmt: skip
    return [sys.executable, "-P", "-c", start]


def _softkvm(image: Image, initrd: Path, disk: Path) -> list[str]:
    return [*softkvm_command(), *words(image, initrd, disk, _name()), "-nic", "none"]


def _qemu(image: Image, initrd: Path, disk: Path) -> list[str]:
    return [QEMU, *words(image, initrd, disk, _name()), "-nic", "none"]


def _name() -> str:
    return f"bench-debian-{os.getpid()}"


def _until_prompt(command: list[str], env: dict[str, str], finish: bytes = b"") -> float:
    """Seconds to the prompt; then `finish` is typed and the guest's end awaited, or it is killed. BenchError."""
    start = time.monotonic()
    seen = b""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as guest:
        assert guest.stdout is not None
        assert guest.stdin is not None
        os.set_blocking(guest.stdout.fileno(), False)
        try:
            while PROMPT not in seen:
                if time.monotonic() - start > _LIMIT_SECONDS or guest.poll() is not None:
                    raise BenchError(f"no login prompt from {command[0]}: {seen[-300:].decode(errors='replace')}")
                seen += guest.stdout.read(65536) or b""
                time.sleep(0.002)
            seconds = time.monotonic() - start
            if finish:
                time.sleep(15)  # the shell behind the automatic login
                guest.stdin.write(finish)
                guest.stdin.flush()
                end = time.monotonic() + _LIMIT_SECONDS
                while guest.poll() is None and time.monotonic() < end:
                    guest.stdout.read(65536)
                    time.sleep(0.05)
            return seconds
        finally:
            guest.kill()
