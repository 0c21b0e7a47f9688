"""Two hosts on one machine: runtime directories, daemons and `softkvm host serve` of their own, sharing a folder with
the guest's kernel, disk and output.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from qemu_user.backends.block.opening import format_by_name
from qemu_user.management.qmp_client import QmpClient
from tests.framework import memory_guest
from tests.framework.product import ROOT


class HostUnderTest:
    """One of them. `faults`: SOFTKVM_MIGRATION_FAULT for the processes that it starts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.shared = folder
        self.name = name
        self.runtime = Path(tempfile.mkdtemp(prefix="skvm-"))  # short: a socket's path has 107 characters
        self.environment = {
            **os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "XDG_DATA_HOME": str(self.runtime / "data"),
            "XDG_CONFIG_HOME": str(self.runtime / "config"), "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.environment.pop("SOFTKVM_ENDPOINT", None)
        self._children: list[subprocess.Popen[bytes]] = []

    def softkvm(self, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[bytes]:
        """A verb to its end."""
        command = [sys.executable, "-P", "-m", "qemu_user.cli.main", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, timeout=seconds, check=False)

    def started(self, *words: str) -> subprocess.Popen[bytes]:
        """A verb that is under way."""
        command = [sys.executable, "-P", "-m", "qemu_user.cli.main", *words]
        child = subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL)
        self._children.append(child)
        return child

    def serve(self, listen: str = "", fault: str = "") -> str:
        """`softkvm host serve` in the background; where it listens."""
        command = [sys.executable, "-P", "-m", "qemu_user.cli.main", "host", "serve"]
        if listen:
            command += ["--listen", listen]
        environment = {**self.environment, "SOFTKVM_MIGRATION_FAULT": fault}
        log = self.runtime / "serve.log"
        at = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            child = subprocess.Popen(command, env=environment, stderr=output)
        self._children.append(child)
        end = time.monotonic() + 60
        while not (found := re.search(r"takes VMs at (\S+)\n", said := log.read_bytes()[at:].decode(errors="replace"))):
            assert child.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.02)
        return found[1]

    def words(self) -> str:
        """What those who took VMs in have said here, to be shown when a move fails: the host and the VMs that came."""
        logs = [self.runtime / "serve.log", *sorted(self.runtime.glob("softkvm/*.log"))]
        kept = [(log.name, log.read_text(errors="replace")[-4000:]) for log in logs if log.exists()]
        return "\n".join(f"{self.name}: {name}:\n{text}" for name, text in kept if text)

    def trust(self, other: HostUnderTest) -> None:
        """Know the other's public key, for tcp to and from 127.0.0.1."""
        assert other.softkvm("host", "keys").returncode == 0
        peers = self.runtime / "config" / "softkvm" / "keys" / "peers"
        peers.mkdir(parents=True, exist_ok=True)
        shutil.copy(other.runtime / "config" / "softkvm" / "keys" / "host.key", peers / "127.0.0.1.key")

    def boot(
        self, name: str, fault: str = "", pages: int = 256, pause: int = 20000, options: tuple[str, ...] = (), **more: Any
    ) -> subprocess.Popen[bytes]:
        """A VM with the memory guest, in a process of its own."""
        config = memory_guest.config(self.shared, name, pages=pages, pause=pause, **more)
        words = ["-kernel", config.boot.kernel, "-m", str(config.memory >> 20), "-name", name, "-smp", str(config.cpus),
                 "-display", "none",
                 "-chardev", f"file,id=out,path={self.shared / name}.out,append=on", "-serial", "chardev:out",
                 *options]  # fmt: skip
        for drive in config.drives:
            words += ["-drive", f"file={drive.file},format={format_by_name(drive.file, drive.format)},if=virtio"]
        for bank in config.flash:
            words += ["-drive", f"file={bank.file},format=raw,if=pflash,readonly={'on' if bank.readonly else 'off'}"]
        daemon = "from qemu_user.cli.daemon import ensure; print(ensure())"
        subprocess.run([sys.executable, "-P", "-c", daemon], env=self.environment, check=True, stdout=subprocess.DEVNULL)
        environment = {**self.environment, "SOFTKVM_MIGRATION_FAULT": fault}
        log = (self.shared / f"{name}.log").open("ab")
        child = subprocess.Popen([sys.executable, "-P", "-m", "qemu_user", *words], env=environment, stderr=log)
        self._children.append(child)
        end = time.monotonic() + 60
        while self.status(name) != "running":
            assert child.poll() is None, (self.shared / f"{name}.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.02)
        return child

    def control(self, name: str) -> Path:
        return self.runtime / "softkvm" / "vms" / name / "control.sock"

    def status(self, name: str) -> str:
        """The run state of the VM here; "" if there is none that answers."""
        try:
            with QmpClient(str(self.control(name)), timeout=60) as client:
                return str(client.execute("query-status")["status"])
        except (OSError, EOFError):
            return ""

    def begin_postcopy(self, name: str, uri: str) -> None:
        """Have a VM move by post-copy, with no `softkvm migrate` that would see to what is left of it."""
        peer = str(self.runtime / "config" / "softkvm" / "keys" / "peers" / "127.0.0.1.key")
        with contextlib.suppress(EOFError, OSError), QmpClient(str(self.control(name)), timeout=60) as client:
            client.execute("migrate", uri=uri, postcopy=True, peer_key=peer)
            while client.execute("query-migrate")["status"] not in ("completed", "failed"):
                time.sleep(0.02)

    def names(self) -> list[str]:
        """VMs that are listed here."""
        return [row["name"] for row in json.loads(self.softkvm("ps", "--format", "json").stdout)]

    def wait_for_names(self, names: list[str], seconds: float = 60) -> None:
        """Until just these VMs are listed here: a source is there a moment longer, to be asked how it went."""
        end = time.monotonic() + seconds
        while (listed := self.names()) != names:
            assert time.monotonic() < end, f"{listed} instead of {names}"
            time.sleep(0.05)

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to this host."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("XDG_RUNTIME_DIR") == str(self.runtime):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def close(self) -> None:
        for process in self.processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        for child in self._children:
            child.wait(60)
        shutil.rmtree(self.runtime)
