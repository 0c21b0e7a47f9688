"""An hour of mixed load: stress-ng of Debian in a guest, which verifies what it does, and work whose checksum must stay the
same (and be the interpreter's, when two VMs are compared). scripts/soak calls main().

Watched from outside: a round that does not end (hang), processes that grow and descriptors that add up (leak), a guest that
panics or computes something else (divergence). The exit status is 1 for each of these.
"""

from __future__ import annotations

import argparse
import os
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from qemu_user.bench import debian_root, programs
from qemu_user.cli.daemon import ensure

PACKAGES = ("bash", "coreutils", "gzip", "grep", "sed", "stress-ng")
MIB = 1 << 20
#: Growth of a VM's processes, without the guest's memory, from the third round on that is taken for a leak.
LEAK_BYTES, LEAK_FILES = 48 * MIB, 16


class SoakError(Exception):
    """What went wrong."""


class Vm:
    """A VM under load. `accel`: translator or interpreter."""

    def __init__(self, accel: str, initrd: Path, cpus: int, seconds: int) -> None:
        self.accel, self.rounds, self.checksum = accel, 0, ""
        words = programs.command("softkvm", initrd, [str(seconds)], "1024M", cpus, f"soak-{accel}-{os.getpid()}")
        words += ["-accel", f"kvmcore,engine={accel}"]
        environment = {**os.environ, "SOFTKVM_ENDPOINT": ensure()}
        self.client = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert self.client.stdout is not None
        self.out = self.client.stdout
        self.heard = time.monotonic()
        self.early: tuple[int, int] | None = None
        self.said: list[str] = []

    def take(self, line: str) -> None:
        """A line of the guest's. SoakError."""
        self.heard = time.monotonic()
        self.said = [*self.said[-40:], line]
        words = line.split()
        if "Kernel panic" in line or "Oops" in line or (" failed" in line and words[:1] == ["soak"]):
            raise SoakError(f"{self.accel}: {line}")
        if words[:2] != ["soak", "round"]:
            return
        self.rounds, checksum = int(words[2]), words[3]
        if self.checksum and checksum != self.checksum:
            raise SoakError(f"{self.accel}: round {self.rounds} computed {checksum}, those before it {self.checksum}")
        self.checksum = checksum
        memory, files = self.cost()
        if self.early is None and self.rounds >= 5:
            self.early = memory, files
        if self.early is not None and (memory - self.early[0] > LEAK_BYTES or files - self.early[1] > LEAK_FILES):
            raise SoakError(f"{self.accel}: {memory / MIB:.0f} MiB and {files} descriptors, after five rounds {self.early}")
        print(f"{self.accel}: round {self.rounds}, {memory / MIB:.0f} MiB private, {files} descriptors", flush=True)

    def cost(self) -> tuple[int, int]:
        """Private bytes and descriptors of the VM's processes; the guest's memory is shared, so it does not count."""
        memory = files = 0
        name = f"kvmcore-vm soak-{self.accel}-{os.getpid()}"
        mine = [process for process in psutil.process_iter(["cmdline"]) if (process.info["cmdline"] or [""])[0] == name]
        for process in (psutil.Process(self.client.pid), *mine):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            memory += int(text.split("\nAnonymous:")[1].split()[0]) * 1024
            files += process.num_fds()
        return memory, files

    def end(self) -> None:
        self.client.terminate()
        try:
            self.client.wait(20)
        except subprocess.TimeoutExpired:
            self.client.kill()


def soak(seconds: float, cpus: int, each: int, accels: list[str], patience: float) -> dict[str, int]:
    """Rounds done by each VM. SoakError."""
    root = debian_root.ensure(PACKAGES, lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="softkvm-soak-") as folder:
        initrd = Path(folder) / "initrd"
        script = (Path(__file__).parent / "soak_guest.sh").read_bytes()
        programs.write_initrd(initrd, root, {"bench.sh": script})
        vms = [Vm(accel, initrd, cpus, each) for accel in accels]
        try:
            _watch(vms, time.monotonic() + seconds, patience)
        finally:
            for vm in vms:
                vm.end()
    checksums = {vm.checksum for vm in vms}
    if len(checksums) != 1:
        raise SoakError(f"the VMs computed different things: {checksums}")
    return {vm.accel: vm.rounds for vm in vms}


def _watch(vms: list[Vm], end: float, patience: float) -> None:
    selector = selectors.DefaultSelector()
    parts = {vm.accel: b"" for vm in vms}
    for vm in vms:
        os.set_blocking(vm.out.fileno(), False)
        selector.register(vm.out, selectors.EVENT_READ, vm)
    while time.monotonic() < end or any(not vm.rounds for vm in vms):
        for key, _ in selector.select(1.0):
            vm = key.data
            data = vm.out.read1(1 << 16)
            if not data:
                raise SoakError(f"{vm.accel}: the VM has ended, its last words: {vm.said[-10:]}")
            *lines, parts[vm.accel] = (parts[vm.accel] + data).split(b"\n")
            for line in lines:
                vm.take(line.decode(errors="replace").strip())
        for vm in vms:
            if time.monotonic() - vm.heard > patience:
                raise SoakError(f"{vm.accel}: silent for {patience:.0f} s after round {vm.rounds}; {vm.said[-10:]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description="Mixed load in a guest: no divergence, leak or hang.")
    parser.add_argument("--seconds", type=float, default=3600, help="for how long (default: 3600)")
    parser.add_argument("--smp", type=int, default=2, help="vCPUs (default: 2)")
    parser.add_argument("--each", type=int, default=30, help="seconds of a round's stress (default: 30)")
    parser.add_argument("--accel", action="append", help="translator, interpreter; both are compared (default: translator)")
    parser.add_argument("--patience", type=float, default=900, help="seconds without a word that are a hang (default: 900)")
    options = parser.parse_args()
    try:
        rounds = soak(options.seconds, options.smp, options.each, options.accel or ["translator"], options.patience)
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    print(f"soak: rounds without a fault: {rounds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
