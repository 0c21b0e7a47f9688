"""Measures what a user waits for and pays for: `run busybox -- true` against Debian's QEMU, memory, the
engine image.

`scripts/bench [--rounds N] [--json FILE]`. Both machines boot the same kernel and initramfs to the same
point (the command's exit status), alternated in one run; medians, spread and ratio. A test never asserts
these figures.
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
from pathlib import Path

from qemu_user.images.store import Image, Store, command_line, settings

ROOT = Path(__file__).parent.parent.parent
SOFTKVM = str(ROOT / "scripts" / "softkvm")


def softkvm_true() -> float:
    """Seconds of `softkvm run busybox -- true`, from command to exit status."""
    start = time.monotonic()
    subprocess.run([SOFTKVM, "run", "busybox", "--", "true"], check=True, timeout=120, stdin=subprocess.DEVNULL)
    return time.monotonic() - start


def qemu_true(image: Image, folder: Path) -> float:
    """Seconds of the same under qemu-system-riscv64 -M virt with virtio-mmio devices."""
    initrd, control = folder / "initrd", folder / "control"
    initrd.write_bytes(image.initrd.read_bytes() + settings({"COMMAND": command_line(["true"])}))
    words = ["qemu-system-riscv64", "-M", "virt", "-m", "512M", "-display", "none", "-nodefaults",
             "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", image.meta.append,
             "-device", "virtio-serial-device", "-chardev", "null,id=con", "-device", "virtconsole,chardev=con",
             "-device", "virtio-rng-device", "-chardev", f"file,id=control,path={control}"]  # fmt: skip
    for name in ("stdin", "stdout", "stderr"):
        words += ["-chardev", f"null,id={name}", "-device", f"virtserialport,chardev={name},name=org.softkvm.{name}"]
    words += ["-device", "virtserialport,chardev=control,name=org.softkvm.control"]
    start = time.monotonic()
    subprocess.run(words, check=True, timeout=120, stdin=subprocess.DEVNULL)
    seconds = time.monotonic() - start
    if "exit 0" not in control.read_text():
        raise RuntimeError("the guest under QEMU did not get to the command's exit status")
    return seconds


def memory() -> dict[str, float]:
    """MiB of guest memory in use and of the whole VM (both processes, shared pages in proportion) with 64
    MB filled."""
    name = f"bench-{os.getpid()}"
    script = "dd if=/dev/zero of=/tmp/fill bs=1M count=64 2>/dev/null; echo filled; sleep 100"
    command = [SOFTKVM, "run", "-m", "256M", "--name", name, "busybox", "--", "sh", "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"filled\n":
            raise RuntimeError("the guest did not fill its memory")
        rows = json.loads(subprocess.run([SOFTKVM, "ps", "--format", "json"], check=True, capture_output=True).stdout)
        row = next(row for row in rows if row["name"] == name)
        total = sum(_pss(int(row[key])) for key in ("pid", "vm_pid"))
        return {"guest_used_mib": _guest_used(int(row["vm_pid"])), "vm_pss_mib": total}
    finally:
        subprocess.run([SOFTKVM, "kill", name], check=False)
        process.wait(20)


def _pss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def _guest_used(pid: int) -> float:
    """MiB that the largest memfd of the VM process holds."""
    blocks = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "memfd:" in os.readlink(path):
                blocks.append(os.stat(path).st_blocks)
        except OSError:
            continue
    return max(blocks) * 512 / (1 << 20)


def engine() -> dict[str, float]:
    """Seconds to build the engine's image, and milliseconds to map it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.img"
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "kvmcore.engine.build", str(path)], check=True, cwd=ROOT)
        built = time.monotonic() - start
        program = ("import sys, time; from pathlib import Path; from kvmcore.engine.loader import Image; "
                   "t = time.monotonic(); Image.load(Path(sys.argv[1])); print(time.monotonic() - t)")  # fmt: skip
        result = subprocess.run([sys.executable, "-c", program, str(path)], check=True, cwd=ROOT, capture_output=True)
    return {"build_s": built, "load_ms": 1000 * float(result.stdout)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    image = Store().ensure("busybox", lambda *_: None)
    ours: list[float] = []
    peers: list[float] = []
    softkvm_true()  # the daemon and the engine image are there from now on
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            if shutil.which("qemu-system-riscv64"):
                peers.append(qemu_true(image, Path(folder)))
            ours.append(softkvm_true())
    figures: dict[str, object] = {"softkvm_s": ours, "qemu_s": peers, "memory": memory(), "engine": engine()}
    for name, values in (("softkvm", ours), ("QEMU", peers)):
        if values:
            print(f"{name:8} median {statistics.median(values):.2f} s, {min(values):.2f} to {max(values):.2f}")
    if peers:
        figures["ratio_vs_qemu"] = statistics.median(ours) / statistics.median(peers)
        print(f"ratio    {figures['ratio_vs_qemu']:.2f}x QEMU's time")
    print(f"memory   {figures['memory']}\nengine   {figures['engine']}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
