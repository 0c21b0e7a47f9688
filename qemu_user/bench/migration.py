"""Migrations measured: an idle guest of 512 MB moved on this machine, by us and by QEMU if it is installed, same kernel
and initramfs; snapshot, restore and clones beside it. Called by `softkvm bench migration`; asserts nothing.

Both sides report downtime and total time themselves (query-migrate); QEMU's is over a Unix socket, with TCG.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qemu_user.images.store import Image, Store, settings
from qemu_user.management.qmp_client import QmpClient

_QEMU = "qemu-system-riscv64"
_READY_SECONDS = 60.0
_SETTLE_SECONDS = 3.0
Row = dict[str, Any]


def run(rounds: int, memory: int, tell: Callable[[str], None]) -> dict[str, Row]:
    """Name of a measurement -> its figures, in milliseconds: medians, with all values beside them."""
    image = Store().ensure("busybox", lambda *_: None)
    results: dict[str, Row] = {}
    with _Host() as one, _Host() as two:
        there, back = two.serve(), one.serve()
        one.boot("bench", memory)
        for name, words in (("migrate, copied", ["--copy"]), ("migrate, memory given", [])):
            values = []
            for _ in range(rounds):
                values.append(one.migrate("bench", there, words))
                two.wait_for("bench")
                two.migrate("bench", back, words)
                one.wait_for("bench")
            results[name] = _figures(values)
            tell(f"{name}: {_text(results[name])}")
        results["snapshot"] = _figures([one.snapshot("bench", f"s{number}") for number in range(rounds)])
        tell(f"snapshot: {_text(results['snapshot'])}")
        results["20 clones"] = _figures([one.clone("bench", 20)])
        tell(f"20 clones: {_text(results['20 clones'])}")
    if shutil.which(_QEMU):
        results["QEMU TCG, migrate"] = _figures([_qemu(image, memory) for _ in range(rounds)])
        tell(f"QEMU TCG, migrate: {_text(results['QEMU TCG, migrate'])}")
    else:
        tell(f"no {_QEMU} here to compare with")
    return results


def _figures(values: list[Row]) -> Row:
    names = values[0].keys()
    return {name: round(statistics.median(value[name] for value in values), 2) for name in names} | {"runs": values}


def _text(row: Row) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row.items() if name != "runs")


class _Host:
    """A runtime directory with its own daemon. A context manager."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="skb-"))
        self._environment = {
            **os.environ, "XDG_RUNTIME_DIR": str(self._folder), "XDG_DATA_HOME": str(self._folder / "data"),
        }  # fmt: skip
        self._environment.pop("SOFTKVM_ENDPOINT", None)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Host:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name in os.listdir(self._folder / "softkvm" / "vms") if (self._folder / "softkvm" / "vms").is_dir() else ():
            self._softkvm("kill", name, check=False)
        for process in self._processes:
            process.terminate()
            process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-P", "-m", "qemu_user.cli.main", *words]

    def _softkvm(self, *words: str, check: bool = True) -> None:
        done = subprocess.run(self._command(*words), env=self._environment, capture_output=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"softkvm {' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")

    def serve(self) -> str:
        """`softkvm host serve`; where it listens."""
        process = subprocess.Popen(self._command("host", "serve"), env=self._environment, stderr=subprocess.PIPE)
        self._processes.append(process)
        assert process.stderr is not None
        return process.stderr.readline().decode().split()[-1]

    def boot(self, name: str, memory: int) -> None:
        """An idle guest, booted and settled."""
        words = ("run", "--name", name, "--memory", str(memory >> 20), "busybox", "--", "sh", "-c", "echo up; sleep 100000")
        command, nothing = self._command(*words), subprocess.DEVNULL
        process = subprocess.Popen(command, env=self._environment, stdin=nothing, stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(_SETTLE_SECONDS)

    @contextmanager
    def _qmp(self, name: str) -> Iterator[QmpClient]:
        with QmpClient(str(self._folder / "softkvm" / "vms" / name / "control.sock"), timeout=60) as client:
            yield client

    def _job(self, name: str, command: str, **arguments: Any) -> Row:
        with self._qmp(name) as client:
            client.execute(command, **arguments)
            while (numbers := client.execute("query-migrate"))["status"] not in ("completed", "failed", "cancelled"):
                time.sleep(0.01)
        if numbers["status"] != "completed":
            raise RuntimeError(f"{command}: {numbers['error-desc']}")
        return dict(numbers)

    def migrate(self, name: str, uri: str, words: list[str]) -> Row:
        """Hand it over; downtime and total."""
        numbers = self._job(name, "migrate", uri=uri, copy="--copy" in words)
        return {"downtime": numbers["downtime"], "total": numbers["total-time"]}

    def wait_for(self, name: str) -> None:
        """Until the VM is listed here and runs."""
        end = time.monotonic() + _READY_SECONDS
        while True:
            try:
                with self._qmp(name) as client:
                    if client.execute("query-status")["running"]:
                        time.sleep(0.3)
                        return
            except OSError:
                pass
            if time.monotonic() > end:
                raise RuntimeError(f"VM {name} did not arrive")
            time.sleep(0.02)

    def snapshot(self, name: str, tag: str) -> Row:
        """Keep it; how long the guest stood, and all of it."""
        folder = str(self._folder / "kept")
        numbers = self._job(name, "softkvm-snapshot-save", tag=tag, folder=folder)
        return {"downtime": numbers["downtime"], "total": numbers["total-time"]}

    def clone(self, name: str, count: int) -> Row:
        """Wall-clock time of the command, and how much memory of its own each clone has (both processes)."""
        import psutil

        started = time.monotonic()
        self._softkvm("clone", name, "copy", "--count", str(count))
        total = 1000 * (time.monotonic() - started)
        time.sleep(1)
        unique = 0
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                if process.environ().get("XDG_RUNTIME_DIR") == str(self._folder) and (
                    words.startswith("kvmcore-vm copy") or "qemu_user.migration.arrival" in words
                ):
                    unique += process.memory_full_info().uss
            except psutil.Error:
                continue
        return {"total": total, "unique MB each": unique / count / 1e6}


# -- QEMU ------------------------------------------------------------------------------------------


def _qemu(image: Image, memory: int) -> Row:
    with tempfile.TemporaryDirectory(prefix="skb-") as name:
        folder = Path(name)
        initrd = folder / "initrd"
        data = image.initrd.read_bytes()
        conf = settings({"NAME": "bench", "COMMAND": "sleep 100000"})
        initrd.write_bytes(data + bytes(-len(data) % 4) + conf)
        command = [
            _QEMU, "-M", "virt", "-m", str(memory >> 20), "-kernel", str(image.kernel), "-initrd", str(initrd),
            "-append", image.meta.append, "-display", "none", "-serial", "null", "-monitor", "none",
            "-device", "virtio-serial-device", "-chardev", "null,id=console", "-device", "virtconsole,chardev=console",
            "-device", "virtio-rng-device",
        ]  # fmt: skip
        path = f"unix:{folder / 'move'}"
        source = subprocess.Popen([*command, "-qmp", f"unix:{folder / 'a'},server=on,wait=off"])
        target = subprocess.Popen([*command, "-qmp", f"unix:{folder / 'b'},server=on,wait=off", "-incoming", path])
        try:
            time.sleep(_SETTLE_SECONDS + 12)  # it has no way to say that it is up
            with _connected(folder / "a") as client:
                client.execute("migrate-set-parameters", max_bandwidth=10 << 30, downtime_limit=30)
                client.execute("migrate", uri=path)
                while (numbers := client.execute("query-migrate"))["status"] not in ("completed", "failed"):
                    time.sleep(0.01)
            if numbers["status"] == "failed":
                raise RuntimeError("QEMU's migration failed")
            return {"downtime": numbers["downtime"], "total": numbers["total-time"]}
        finally:
            for process in (source, target):
                process.send_signal(signal.SIGKILL)
                process.wait()


def _connected(path: Path) -> QmpClient:
    end = time.monotonic() + 10
    while True:
        try:
            return QmpClient(str(path), timeout=60)
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
