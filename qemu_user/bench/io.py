"""Disk, network and console as a guest sees them: fio, iperf3, ping and a long output, here and under QEMU, alternated.

The same kernel, initramfs, disk file (in the host's page cache) and host side of the network on both sides; each side as
its user gets it by default: here virtio over PCI and passt, QEMU's with virtio over PCI and slirp. Beside them what an
access to a device register costs (exits.py). Called by `softkvm bench io`; asserts nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qemu_user.bench import exits, io_image
from qemu_user.cli.daemon import ensure
from qemu_user.images.store import Store

QEMU = "qemu-system-riscv64"
_DISK_BYTES = 512 << 20
_LIMIT_SECONDS = 120.0
_SEQ_BYTES = len("".join(f"{number}\n" for number in range(1, 200001)))


class Measure(NamedTuple):
    """`name`: the guest script's, or exits.py's. Less is better for some."""

    name: str
    title: str
    unit: str
    goal: str
    less: bool = False


MEASURES = (
    Measure("exit", "register read of a Python device and back", "us", "<= 2.5 spinning, 8 sleeping", less=True),
    Measure("randread-qd1", "fio 4 KiB random read, QD1", "IOPS", ">= 2x"),
    Measure("randread-qd32", "fio 4 KiB random read, QD32", "IOPS", ">= 2x"),
    Measure("read-1m", "fio sequential read, 1 MiB", "KiB/s", ">= 1.5x"),
    Measure("write-1m", "fio sequential write, 1 MiB", "KiB/s", ">= 1.5x"),
    Measure("iperf-out", "iperf3 guest to host", "Mbit/s", ">= 3x"),
    Measure("iperf-in", "iperf3 host to guest", "Mbit/s", ""),
    Measure("ping", "ping to the host side", "ms", "<= 1x", less=True),
    Measure("console", "console: seq 1 200000", "bytes/s", ">= 3x"),
)
Values = dict[str, dict[str, list[float]]]
"""Measure -> side -> what its runs gave."""


class IoBenchError(RuntimeError):
    """A side did not finish; the text says which and what it said last."""


def run(rounds: int, seconds: float, only: str, tell: Callable[[str], None]) -> Values:
    """Every measure (or those that `only` names, comma-separated), `rounds` times on each side. IoBenchError, ImageError."""
    wanted = [name for name in only.split(",") if name] or [measure.name for measure in MEASURES]
    unknown = set(wanted) - {measure.name for measure in MEASURES}
    if unknown:
        known = ", ".join(measure.name for measure in MEASURES)
        raise IoBenchError(f"nothing to measure is called {', '.join(sorted(unknown))}; there are {known}")
    missing = [program for program in (QEMU, "iperf3", "passt") if shutil.which(program) is None]
    if missing:
        tell(f"not here, so nothing to compare with or no such row: {', '.join(missing)}")
    values: Values = {}

    def keep(side: str, found: dict[str, float]) -> None:
        for name, value in found.items():
            values.setdefault(name, {}).setdefault(side, []).append(value)

    if "exit" in wanted:
        for number in range(rounds):
            tell(f"exits, round {number + 1} of {rounds}")
            keep("softkvm", {"exit": exits.uart_read(exits.softkvm_command)})
            if QEMU not in missing:
                keep("qemu", {"exit": exits.uart_read(exits.qemu_command)})
        wanted = [name for name in wanted if name != "exit"]
    if not wanted:
        return values
    image = Store().ensure("busybox", lambda *_: None)
    tell("fio and iperf3 for the guest")
    programs = io_image.ensure(lambda *_: None)
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as name, iperf_server("iperf3" in missing) as port:
        folder = Path(name)
        initrd, disk = folder / "initrd", folder / "disk.raw"
        initrd.write_bytes(image.initrd.read_bytes() + programs.read_bytes() + io_image.script())
        _fill(disk)
        guest = f"quiet bench.seconds={seconds:g} bench.port={port} bench.only={','.join(wanted)}"
        sides = {"softkvm": _softkvm(image.kernel, initrd, disk, guest, "passt" not in missing)}
        if QEMU not in missing:
            sides["qemu"] = qemu_command(image.kernel, initrd, disk, guest)
        for number in range(rounds):
            for side, command in sides.items():
                tell(f"round {number + 1} of {rounds}, {side}")
                keep(side, boot(side, command, tell))
    return values


def _softkvm(kernel: Path, initrd: Path, disk: Path, append: str, network: bool) -> list[str]:
    command = [sys.executable, "-P", "-m", "qemu_user", "-M", "virt", "-m", "1024M", "-kernel", str(kernel), "-no-reboot"]
    command += ["-initrd", str(initrd), "-drive", f"file={disk},format=raw,if=virtio"]
    command += ["-nic", "user"] if network else ["-nic", "none"]
    command += ["-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"]
    return [*command, "-append", f"console=hvc0 bench.console=hvc0 {append}"]


def qemu_command(kernel: Path, initrd: Path, disk: Path, append: str) -> list[str]:
    command = [QEMU, "-M", "virt", "-m", "1024M", "-nographic", "-monitor", "none", "-no-reboot", "-kernel", str(kernel)]
    command += ["-initrd", str(initrd), "-drive", f"file={disk},format=raw,if=virtio", "-netdev", "user,id=n"]
    command += ["-device", "virtio-net-pci,netdev=n,romfile="]
    return [*command, "-append", f"console=ttyS0 bench.console=ttyS0 {append}"]


def _fill(disk: Path) -> None:
    """A file without holes, so that reads read."""
    piece = os.urandom(1 << 20)
    with disk.open("wb") as file:
        for _ in range(_DISK_BYTES >> 20):
            file.write(piece)


@contextmanager
def iperf_server(missing: bool) -> Iterator[int]:
    """The port of an iperf3 on this host; 0 if there is none."""
    if missing:
        yield 0
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    nothing = subprocess.DEVNULL
    server = subprocess.Popen(["iperf3", "-s", "-p", str(port)], stdin=nothing, stdout=nothing, stderr=nothing)
    try:
        yield port
    finally:
        server.terminate()
        server.wait()


def boot(side: str, command: list[str], tell: Callable[[str], None]) -> dict[str, float]:
    """What one run of the guest reports."""
    found: dict[str, float] = {}
    started = begun = time.monotonic()
    text = said = b""
    environment = {**os.environ, "SOFTKVM_ENDPOINT": ensure()}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, env=environment
    )
    assert process.stdout is not None
    try:
        os.set_blocking(process.stdout.fileno(), False)
        done = False
        while not done:
            if time.monotonic() - started > _LIMIT_SECONDS:
                if not found:
                    raise IoBenchError(f"{side} measured nothing within {_LIMIT_SECONDS:g} s: {_last(said)}")
                tell(f"{side} did not finish within {_LIMIT_SECONDS:g} s; what it measured until then counts")
                break
            try:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                time.sleep(0.001)
                continue
            now = time.monotonic()
            said = (said + chunk)[-500:]
            lines = (text + chunk).split(b"\n")
            text = lines.pop() if chunk else text
            for line in lines:
                words = line.decode("ascii", "replace").split()
                if words[:2] == ["BENCH", "console"]:
                    if words[2] == "end":
                        found["console"] = _SEQ_BYTES / (now - begun)
                    begun = now
                elif words[:2] == ["BENCH", "all"]:
                    done = True
                elif words[:3] == ["no", "value", "for"]:
                    tell(f"{side}: {line.decode('ascii', 'replace').strip()}")
                elif words[:1] == ["BENCH"] and len(words) == 3:
                    found[words[1]] = float(words[2])
            if not chunk and not done:
                raise IoBenchError(f"{side} ended too early (status {process.wait()}): {_last(said)}")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    return found


def _last(text: bytes) -> str:
    return repr(text.decode("ascii", "replace"))


def figures(values: Values) -> dict[str, dict[str, Any]]:
    """Measure -> medians, runs, spread of ours, and `ratio_vs_qemu`: how many times as good as QEMU's (None without it)."""
    rows: dict[str, dict[str, Any]] = {}
    for measure in MEASURES:
        sides = values.get(measure.name)
        if sides is None or "softkvm" not in sides:
            continue
        medians = {side: statistics.median(runs) for side, runs in sides.items()}
        ours, theirs = medians["softkvm"], medians.get("qemu")
        ratio = None if theirs is None else theirs / ours if measure.less else ours / theirs
        rows[measure.name] = {
            "title": measure.title, "unit": measure.unit, "goal": measure.goal, **medians, "ratio_vs_qemu": ratio,
            "spread": (max(sides["softkvm"]) - min(sides["softkvm"])) / ours, "runs": sides,
        }  # fmt: skip
    return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'':44}{'softkvm':>12}{'qemu':>12}  {'':8}{'x qemu':>8}{'spread':>8}  goal"]
    for row in rows.values():
        theirs = f"{row['qemu']:12.5g}" if "qemu" in row else f"{'-':>12}"
        ratio = f"{row['ratio_vs_qemu']:8.2f}" if row["ratio_vs_qemu"] is not None else f"{'-':>8}"
        numbers = f"{row['softkvm']:12.5g}{theirs}  {row['unit']:8}{ratio}{100 * row['spread']:7.0f}%"
        lines.append(f"{row['title']:44}{numbers}  {row['goal']}")
    return "\n".join(lines)
