"""The figures that the project promises, measured: boot against Debian's QEMU, memory of a VM, the engine's
image.

scripts/bench calls main(). Runs are alternated, QEMU gets the same kernel, initramfs and devices, and both
are timed from the start of the command to its exit. Nothing here asserts anything: test_figures.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from qemu_user.bench.linux import qemu_command
from tests.framework.product import Product, read_until

MIB = 1 << 20


@dataclass
class Series:
    """Seconds of several runs of one thing."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def figures(self) -> dict[str, float]:
        """Median, least and most."""
        return {"median": self.median, "min": min(self.seconds), "max": max(self.seconds), "runs": len(self.seconds)}


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def boots(product: Product, runs: int, cpus: int, script: list[str]) -> dict[str, Any]:
    """`run busybox -- SCRIPT` here and the same boot in QEMU, alternated after one unmeasured run of each."""
    ours, theirs = Series("softkvm"), Series("qemu")

    def run_ours() -> None:
        done = product.run("run", "--smp", str(cpus), "busybox", "--", *script)
        if done.returncode:
            raise RuntimeError(f"softkvm run failed: {done.stderr.decode(errors='replace')}")

    with tempfile.TemporaryDirectory() as folder:
        command = qemu_command(Path(folder), cpus, script)
        control = Path(folder) / "control"

        def run_qemu() -> None:
            control.unlink(missing_ok=True)
            subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL)
            if "exit 0" not in control.read_text():
                raise RuntimeError(f"the guest in QEMU did not finish: {control.read_text()!r}")

        have_qemu = shutil.which(command[0]) is not None
        for number in range(runs + 1):
            for series, action in ((ours, run_ours), (theirs, run_qemu)):
                if series is theirs and not have_qemu:
                    continue
                seconds = timed(action)
                if number:
                    series.seconds.append(seconds)
    result: dict[str, Any] = {"softkvm": ours.figures()}
    if have_qemu:
        result |= {"qemu": theirs.figures(), "ratio": ours.median / theirs.median}
    return result


def memory_of_a_vm(product: Product, mebibytes: int) -> dict[str, Any]:
    """What a VM costs whose guest has used some memory: PSS of its two processes, and pages of its memfd."""
    fill = f"dd if=/dev/urandom of=/fill bs=1M count={mebibytes} 2>/dev/null; echo filled; read line"
    client = product.start("run", "--name", "memory", "busybox", "--", "sh", "-c", fill)
    read_until(client, b"filled\n", 120)
    (vm,) = product.named("kvmcore-vm memory")
    used = guest_pages(vm.pid)
    parts = {"vm_process": pss(vm.pid), "qemu_user": pss(product.device_process("memory"))}
    total = sum(parts.values())
    client.kill()
    client.wait(10)
    return {
        "guest_memory_used": used, "total": total, **parts,
        "limit": int(1.3 * used) + 40 * MIB, "over_guest_memory": total - used,
    }  # fmt: skip


def guest_pages(pid: int) -> int:
    """Bytes of guest memory that exist: the biggest memfd of the VM process."""
    sizes = [0]
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if "memfd" in os.readlink(path):
            sizes.append(os.stat(path).st_blocks * 512)
    return max(sizes)


def pss(pid: int) -> int:
    """Bytes of a process, shared pages in proportion."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) * 1024


def idle_cpu(product: Product, seconds: float) -> dict[str, float]:
    """Part of a core that a VM uses whose guest sleeps, both its processes together."""
    client = product.start("run", "--name", "idle", "busybox", "--", "sh", "-c", "echo up; read line")
    read_until(client, b"up\n", 120)
    (vm,) = product.named("kvmcore-vm idle")
    time.sleep(2)
    processes = [vm, psutil.Process(product.device_process("idle"))]
    before = [process.cpu_times() for process in processes]
    time.sleep(seconds)
    after = [process.cpu_times() for process in processes]
    used = [a.user + a.system - b.user - b.system for a, b in zip(after, before, strict=True)]
    client.kill()
    client.wait(10)
    return {"vm_process": used[0] / seconds, "qemu_user": used[1] / seconds, "core": sum(used) / seconds}


def engine_image() -> dict[str, Any]:
    """Building the engine's image in a process of its own, and mapping it."""
    from kvmcore.engine.loader import Image, ensure_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine"
        build = [sys.executable, "-m", "kvmcore.engine.build", str(path)]
        seconds = [timed(lambda: subprocess.run(build, check=True, capture_output=True)) for _ in range(3)]
        size = path.stat().st_size
    ensure_image()
    loads = [timed(lambda: Image.load()) for _ in range(20)]
    check = "import sys, kvmcore.server.vm_process; print('llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True)
    return {
        "build": Series("build", seconds).figures(), "load": Series("load", loads).figures(), "bytes": size,
        "vm_process_imports_llvmlite": done.stdout.strip() == "True",
    }  # fmt: skip


def measure(runs: int, cpus: list[int]) -> dict[str, Any]:
    """All of it."""
    with Product() as product:
        result: dict[str, Any] = {"engine": engine_image()}
        for number in cpus:
            result[f"boot_true_smp{number}"] = boots(product, runs, number, ["true"])
        result["memory"] = memory_of_a_vm(product, 64)
        result["idle"] = idle_cpu(product, 10)
    result["host"] = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": sys.version.split()[0]}
    return result


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = []
    engine, memory, idle, host = (result[name] for name in ("engine", "memory", "idle", "host"))
    lines.append(
        f"engine image: built in {engine['build']['median']:.2f} s, loaded in {engine['load']['median'] * 1000:.2f} ms, "
        f"{engine['bytes'] >> 10} KiB; a VM process imports llvmlite: {engine['vm_process_imports_llvmlite']}"
    )
    for name, boot in result.items():
        if not name.startswith("boot_"):
            continue
        for side in ("softkvm", "qemu"):
            if side in boot:
                f = boot[side]
                lines.append(f"{name} {side:8} {f['median']:6.2f} s  ({f['min']:.2f} to {f['max']:.2f}, {f['runs']} runs)")
        if "ratio" in boot:
            lines.append(f"{name} ratio    {boot['ratio']:6.2f}")
    used, total, vm, user, limit = (
        memory[name] / MIB for name in ("guest_memory_used", "total", "vm_process", "qemu_user", "limit")
    )
    lines.append(
        f"memory: guest uses {used:.1f} MiB, the VM costs {total:.1f} MiB (limit {limit:.1f}): "
        f"VM process {vm:.1f}, qemu_user {user:.1f}"
    )
    lines.append(f"idle: {idle['core']:.2%} of a core (VM process {idle['vm_process']:.2%}, qemu_user {idle['qemu_user']:.2%})")
    lines.append(f"host: {host['cpus']} CPUs, load {host['load']:.1f}")
    return "\n".join(lines)


def main() -> int:
    """The command line of scripts/bench."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--smp", type=int, action="append", help="CPUs of the guest; may be repeated (default: 1)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there too")
    options = parser.parse_args()
    result = measure(options.runs, options.smp or [1])
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
