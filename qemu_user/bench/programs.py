"""Debian's programs in the guest, beside QEMU: python3, sqlite, openssl, 7z, gcc. `softkvm bench programs`.

One boot of each side runs all of them a few times (programs.sh), from memory; what they make must be the same. Times
are the guest's own; the best round is "warm", the first one shows what translation costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from qemu_user.bench import debian_root
from qemu_user.bench.linux import have_qemu, the_image
from qemu_user.bench.processor import QEMU, BenchError, Kernel, take
from qemu_user.cli.daemon import ensure
from qemu_user.images import cpio

PACKAGES = ("bash", "coreutils", "python3", "sqlite3", "openssl", "7zip", "gcc-14")
PROGRAMS = ("python3", "python3-start", "sqlite3", "openssl", "7z", "gcc")
MILLISECONDS = 1000
_HERE = Path(__file__).parent
_LIMIT_SECONDS = 900
_END = "bench-ended "


def run(rounds: int, inner: int, only: str, tell: Callable[[str], None]) -> dict[str, Kernel]:
    """`rounds` boots of each side, each program `inner` times in each. BenchError, ImageError."""
    if only and only not in PROGRAMS:
        raise BenchError(f"no program named {only!r}; there are {', '.join(PROGRAMS)}")
    the_image()
    tell("programs: Debian's packages")
    root = debian_root.ensure(PACKAGES, lambda *_: None)
    files = {"bench.sh": "programs.sh", **{name: f"kernels/{name}" for name in ("kernels.c", "kernels.h", "mmu.h")}}
    kernels: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as name:
        initrd = Path(name) / "initrd"
        write_initrd(initrd, root, {name: (_HERE / source).read_bytes() for name, source in files.items()})
        words = [str(inner), *([only] if only else PROGRAMS)]
        peer = have_qemu(tell)
        for number in range(rounds):
            for side in ("softkvm", "qemu") if peer else ("softkvm",):
                tell(f"programs: round {number + 1} of {rounds}, {side}")
                take(kernels, side, boot(side, initrd, words), "", MILLISECONDS)
    return kernels


def write_initrd(path: Path, root: Path, extra: dict[str, bytes]) -> None:
    """The busybox image with Debian's files in /debian, and `extra` among them."""
    own = cpio.Archive()
    own.file("init", (_HERE / "programs_init.sh").read_bytes(), 0o755)
    for name, content in extra.items():
        own.file(f"{debian_root.ROOT}/{name}", content)
    with path.open("wb") as file:
        for part in (the_image().initrd.read_bytes(), root.read_bytes(), own.finish()):
            file.write(part + bytes(-len(part) % 4))


def command(side: str, initrd: Path, words: Sequence[str], memory: str = "1536M", cpus: int = 1, name: str = "") -> list[str]:
    """Boot it on a side; the guest's output is standard output. `name`: the VM's."""
    start = [QEMU, "-nographic", "-monitor", "none"] if side == "qemu" else [sys.executable, "-P", "-m", "qemu_user"]
    start += ["-name", name or f"bench-{os.getpid()}", "-M", "virt", "-m", memory, "-smp", str(cpus)]
    start += ["-no-reboot", "-nic", "none", "-kernel", str(the_image().kernel), "-initrd", str(initrd)]
    console = "ttyS0"
    if side == "softkvm":
        console = "hvc0"
        start += ["-chardev", "stdio,id=out,signal=off", "-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"]
    return [*start, "-append", f"console={console} quiet bench.console={console} bench.args={','.join(words)}"]


def boot(side: str, initrd: Path, words: Sequence[str]) -> str:
    """What the guest says. BenchError when its script failed."""
    environment = {**os.environ, "SOFTKVM_ENDPOINT": ensure()}
    try:
        done = subprocess.run(
            command(side, initrd, words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=_LIMIT_SECONDS, check=False, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{side} did not finish within {_LIMIT_SECONDS} s: {str(error.output)[-500:]}") from error
    if f"{_END}0" not in done.stdout:
        raise BenchError(f"{side} failed (status {done.returncode}): {done.stdout[-800:]}")
    return done.stdout
