"""The product as its user runs it: the softkvm command, with a runtime directory and a daemon of the test's
own.

Nothing of the user's running VMs or daemon is touched; the image cache is the user's, so that a test does
not fetch what is there. Used by tests/guests and tests/performance.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil

from qemu_user.backends.chardev.attach import keys_frames

ROOT = Path(__file__).resolve().parents[2]
U_BOOT = Path("/usr/lib/u-boot/qemu-riscv64_smode/u-boot.bin")


def have_image(name: str = "busybox") -> bool:
    """Whether the image is in the cache already."""
    from qemu_user.images.store import Store

    return Store().find(name) is not None


class Product:
    """softkvm with XDG_RUNTIME_DIR in a temporary directory. A context manager; its end ends what it
    started."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="softkvm-product-")
        self.runtime = Path(self._folder.name)
        self.runtime.chmod(0o700)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": str(ROOT)}
        self.environment.pop("SOFTKVM_ENDPOINT", None)

    def __enter__(self) -> Product:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self._folder.cleanup()

    def command(self, *arguments: str) -> list[str]:
        """The command line of softkvm with these arguments."""
        return [sys.executable, "-P", "-m", "qemu_user.cli.main", *arguments]

    def daemon(self) -> str:
        """The endpoint of this directory's daemon, started if need be."""
        code = "from qemu_user.cli.daemon import ensure; print(ensure())"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True, env=self.environment
        )
        return done.stdout.strip()

    def warm(self) -> psutil.Process:
        """The parent of warm processes: there when this returns (qemu_user/warm)."""
        self.daemon()
        self.daemon()
        end = time.monotonic() + 60
        while not (self.runtime / "softkvm" / "warm.sock").exists():
            assert time.monotonic() < end, "no warm parent"
            time.sleep(0.05)
        return self.named("softkvm-warm")[0]

    def run(self, *arguments: str, stdin: bytes = b"", seconds: float = 120) -> subprocess.CompletedProcess[bytes]:
        """softkvm to its end."""
        return subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, timeout=seconds, check=False,
            env=self.environment, cwd=self.runtime,
        )  # fmt: skip

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """softkvm in the background, with pipes."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.command(*arguments), stdin=pipe, stdout=pipe, stderr=pipe, env=self.environment,
            cwd=self.runtime,
        )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to this runtime directory, by its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("XDG_RUNTIME_DIR") == str(self.runtime):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return [process for process in found if process.pid != os.getpid()]

    def device_process(self, name: str) -> int:
        """The process that has a VM's devices: not always the command that was started (qemu_user/warm)."""
        (pid,) = [row["pid"] for row in json.loads(self.run("ps", "--format", "json").stdout) if row["name"] == name]
        return int(pid)

    def named(self, name: str) -> list[psutil.Process]:
        """Our processes whose name (as ps shows it) or command line begins with `name`."""
        found = []
        for process in self.processes():
            try:
                if process.name().startswith(name) or " ".join(process.cmdline()).startswith(name):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def wait_gone(self, *pids: int, seconds: float = 60) -> list[int]:
        """Waits until the processes are gone; those that are not."""
        end = time.monotonic() + seconds
        left = list(pids)
        while left and time.monotonic() < end:
            left = [pid for pid in left if psutil.pid_exists(pid) and not _dead(pid)]
            time.sleep(0.05)
        return left


def _dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def read_until(process: subprocess.Popen[bytes], text: bytes, seconds: float = 120) -> bytes:
    """Reads the process's stdout until `text` has come; what was read. AssertionError when it does not
    come."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    seen = b""
    end = time.monotonic() + seconds
    while text not in seen:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            assert time.monotonic() < end, f"no {text!r} within {seconds} s in {seen.decode(errors='replace')}"
            time.sleep(0.02)
            continue
        assert data, f"ended without {text!r}: {seen.decode(errors='replace')}"
        seen += data
    return seen


def on_console(product: Product, name: str, text: bytes, wanted: bytes, seconds: float = 120) -> bytes:
    """Types into a VM's console until the answer comes."""
    path = product.runtime / "softkvm" / "vms" / name / "console.sock"
    with socket.socket(socket.AF_UNIX) as console:
        console.connect(str(path))
        console.settimeout(0.5)
        seen, typed, end = b"", 0.0, time.monotonic() + seconds
        while wanted not in seen:
            assert time.monotonic() < end, f"no {wanted!r} in {seen!r}"
            if time.monotonic() - typed > 5:
                console.sendall(keys_frames(text))
                typed = time.monotonic()
            try:
                seen += console.recv(65536)
            except TimeoutError:
                continue
        return seen
