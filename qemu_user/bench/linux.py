"""Linux in the guest: what a boot takes, and what processes cost the kernel. `softkvm bench boot` and `smp`.

The busybox image boots here and under QEMU, alternated, with the same kernel, initramfs and devices. What runs in it
is kernels/linux.c, a program without libc, which the host runs as well. Times are the guest's own, but for boots, which are
taken from the start of the command to its end.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from protocol.channel import fd_passing
from qemu_user.bench.processor import QEMU, BenchError, Kernel, figures, take
from qemu_user.images.store import Image, Store, command_line, settings

Tell = Callable[[str], None]
PORTS = ("stdin", "stdout", "stderr", "control")
PROGRAMS = Path(__file__).parent / "kernels"
IN_LINUX = ("system-call", "fork", "fork-exec", "page-fault", "mmap-munmap", "pipe-switch")
NANOSECONDS = 1_000_000_000
_RUN = ["sh", "-c", 'cat >/linux && chmod +x /linux && exec /linux "$@"', "sh"]
_LIMIT_SECONDS = 300
_IDLE_SECONDS = 8.0
_IDLE_WORK_SECONDS = 300.0
"""What the translator gets after the first boot to finish what it does in idle time."""
_QUIET_SECONDS = 12.0
_END_SECONDS = 10.0
_TICK = os.sysconf("SC_CLK_TCK")


def softkvm_command(cpus: int, script: Sequence[str], *options: str) -> list[str]:
    """Run `script` in the busybox image here."""
    return [sys.executable, "-P", "-m", "qemu_user.cli.main", "run", "--smp", str(cpus), *options, "busybox", "--", *script]


def qemu_command(folder: Path, cpus: int, script: Sequence[str], memory: str = "512M") -> list[str]:
    """QEMU with what `softkvm run busybox -- SCRIPT` gives the guest: initrd, console, ports, entropy.

    SCRIPT reads QEMU's standard input; what it writes is in `folder`/stdout, its end in `folder`/control.
    """
    image = the_image()
    initrd = folder / "initrd"
    with initrd.open("wb") as file:
        data = image.initrd.read_bytes()
        file.write(data + bytes(-len(data) % 4))
        file.write(settings({"NAME": "qemu", "COMMAND": command_line(script)}))
    command = [QEMU, "-M", "virt", "-smp", str(cpus), "-m", memory]
    command += ["-global", "virtio-mmio.force-legacy=false", "-display", "none", "-monitor", "none", "-serial", "none"]
    command += ["-nodefaults", "-no-reboot", "-kernel", str(image.kernel), "-initrd", str(initrd)]
    command += ["-append", image.append, "-device", "virtio-rng-device", "-device", "virtio-serial-device"]
    command += ["-chardev", "null,id=console", "-device", "virtconsole,chardev=console"]
    for number, name in enumerate(PORTS, 1):
        back_end = "stdio,id=stdin,signal=off" if name == "stdin" else f"file,id={name},path={folder / name}"
        command += ["-chardev", back_end]
        command += ["-device", f"virtserialport,nr={number},name=org.softkvm.{name},chardev={name}"]
    return command


def the_image() -> Image:
    """The busybox image. BenchError if it was never pulled."""
    image = Store().find("busybox")
    if image is None:
        raise BenchError("the image is not there; softkvm pull busybox fetches it")
    return image


def on_softkvm(cpus: int, script: Sequence[str], stdin: Path | None = None, *options: str) -> str:
    """What SCRIPT writes. BenchError."""
    return _output("softkvm", softkvm_command(cpus, script, *options), stdin)


def on_qemu(cpus: int, script: Sequence[str], stdin: Path | None = None, memory: str = "512M") -> str:
    """The same under QEMU."""
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as name:
        folder = Path(name)
        _output("qemu", qemu_command(folder, cpus, script, memory), stdin)
        control = (folder / "control").read_text()
        if "exit 0" not in control:
            raise BenchError(f"the guest in QEMU did not finish: {control!r} {(folder / 'stderr').read_text()[-500:]}")
        return (folder / "stdout").read_text()


def _output(side: str, command: list[str], stdin: Path | None = None, env: dict[str, str] | None = None) -> str:
    try:
        with open(stdin or "/dev/null", "rb") as file:
            done = subprocess.run(
                command, stdin=file, capture_output=True, text=True, errors="replace",
                timeout=_LIMIT_SECONDS, check=False, env=env,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{side} did not finish within {_LIMIT_SECONDS} s") from error
    if done.returncode:
        raise BenchError(f"{side} failed (status {done.returncode}): {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


def have_qemu(tell: Tell) -> bool:
    """Whether there is a peer."""
    if shutil.which(QEMU):
        return True
    tell(f"no {QEMU} here to compare with (Debian: apt-get install qemu-system-misc)")
    return False


# -- inside Linux ------------------------------------------------------------------------------------------------


def in_linux(names: Sequence[str], rounds: int, seconds: float, tell: Tell) -> dict[str, Kernel]:
    """Work for the kernel in the guest, `seconds` for each kind and round, here, under QEMU and on the host."""
    words = [str(int(seconds * 10_000_000)), *names]
    program = PROGRAMS / "linux.riscv64"
    native = [str(PROGRAMS / "linux.x86_64"), *words]
    kernels: dict[str, Kernel] = {}
    peer = have_qemu(tell)
    for number in range(rounds):
        tell(f"linux: round {number + 1} of {rounds}, softkvm")
        take(kernels, "softkvm", on_softkvm(1, [*_RUN, *words], program), "", NANOSECONDS)
        if peer:
            tell(f"linux: round {number + 1} of {rounds}, qemu")
            take(kernels, "qemu", on_qemu(1, [*_RUN, *words], program), "", NANOSECONDS)
        take(kernels, "native", _output("native", native), "", NANOSECONDS)
    return kernels


# -- boots -------------------------------------------------------------------------------------------------------


def boots(rounds: int, tell: Tell) -> dict[str, Kernel]:
    """`run busybox -- true`: with nothing translated yet and no daemon; with what earlier boots have left, and a daemon."""
    kernels = {"boot-first": Kernel(), "boot-warm": Kernel()}
    peer = have_qemu(tell)
    command = softkvm_command(1, ["true"])
    with scratch() as name, place(Path(name) / "warm") as warm:
        folder = Path(name)
        tell("boot: the first one, and what is translated after it")
        for _ in range(2):
            _output("softkvm", command, env=warm)
            wait_for_idle_work(folder / "warm")
        for number in range(rounds):
            tell(f"boot: round {number + 1} of {rounds}")
            with place(folder / f"cold{number}") as cold:
                note(kernels["boot-first"], "softkvm", _timed(lambda: _output("softkvm", command, env=cold)))
            if peer:
                seconds = _timed(lambda: on_qemu(1, ["true"]))
                for kernel in kernels.values():
                    note(kernel, "qemu", seconds)
            note(kernels["boot-warm"], "softkvm", _timed(lambda: _output("softkvm", command, env=warm)))
    return kernels


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for places: what a process that is just being killed still writes does not matter."""
    return tempfile.TemporaryDirectory(prefix="softkvm-bench-", ignore_cleanup_errors=True)


@contextmanager
def place(folder: Path) -> Iterator[dict[str, str]]:
    """An environment with a daemon and a cache of translations of its own, but the images and the engine that are there.

    Afterwards the daemon is ended: what its translator does in idle time would be in the next measurement.
    """
    ours = Store().folder.parent
    engine = folder / "cache" / "softkvm" / "engine"
    engine.mkdir(parents=True)
    for image in (ours / "engine").glob("*.img"):
        shutil.copy(image, engine)
    (engine.parent / "images").symlink_to(ours / "images")
    runtime = folder / "run"
    runtime.mkdir(mode=0o700)
    try:
        yield {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "XDG_RUNTIME_DIR": str(runtime)}
    finally:
        end_daemon(runtime / "softkvm" / "kvmcore.sock")


def end_daemon(path: Path) -> None:
    """And wait until it has, if one listens there."""
    try:
        with fd_passing.connect(str(path)) as sock:
            fd = os.pidfd_open(fd_passing.credentials(sock)[0])
        signal.pidfd_send_signal(fd, signal.SIGTERM)
    except OSError:
        return
    select.select([fd], [], [], _END_SECONDS)
    os.close(fd)


def wait_for_idle_work(folder: Path) -> None:
    """Until no translation has been added to the cache for some seconds."""
    end = time.monotonic() + _IDLE_WORK_SECONDS
    while time.monotonic() < end:
        changed = [path.stat().st_mtime for path in (folder / "cache" / "softkvm" / "engine").glob("*.regions*")]
        if changed and time.time() - max(changed) > _QUIET_SECONDS:
            return
        time.sleep(0.5)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def note(kernel: Kernel, side: str, seconds: float) -> None:
    """A time that has no first round of its own."""
    kernel.best.setdefault(side, []).append(seconds)
    kernel.first.setdefault(side, []).append(seconds)


# -- several vCPUs -----------------------------------------------------------------------------------------------


def smp(rounds: int, seconds: float, tell: Tell) -> dict[str, Any]:
    """Two processes at once, on one vCPU and on two: the group's figures, and how many times as fast two vCPUs are."""
    program = PROGRAMS / "linux.riscv64"
    words = [str(int(seconds * 10_000_000)), "workers-2"]
    kernels = {f"workers-2-on-{cpus}": Kernel() for cpus in (1, 2)}
    peer = have_qemu(tell)
    for number in range(rounds):
        for cpus in (1, 2):
            tell(f"smp: round {number + 1} of {rounds}, {cpus} vCPU")
            sides = {"softkvm": on_softkvm(cpus, [*_RUN, *words], program)}
            if peer:
                sides["qemu"] = on_qemu(cpus, [*_RUN, *words], program)
            if cpus == 2:
                sides["native"] = _output("native", [str(PROGRAMS / "linux.x86_64"), *words])
            for side, output in sides.items():
                found: dict[str, Kernel] = {}
                take(found, side, output, "", NANOSECONDS)
                kernels[f"workers-2-on-{cpus}"].add(found["workers-2"])
    one, two = kernels.values()
    scaling = {side: one.median(side) / two.median(side) for side in one.best}
    return {"kernels": kernels, "figures": {**figures(kernels), "two_vcpus_vs_one": scaling, "idle_core": idle(tell)}}


def idle(tell: Tell) -> float:
    """Part of a core that a VM uses whose guest sleeps, both its processes together."""
    from qemu_user.management.registry import find

    tell("smp: an idle VM")
    name = f"bench-idle-{os.getpid()}"
    command = softkvm_command(1, ["sh", "-c", "echo up; read line"], "--name", name)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        try:
            client.stdout.readline()
            entry = find(name)
            if entry is None or not entry.vm_pid:
                raise BenchError("the idle VM is not there")
            time.sleep(2)
            before, start = _cpu(entry.pid) + _cpu(entry.vm_pid), time.monotonic()
            time.sleep(_IDLE_SECONDS)
            return (_cpu(entry.pid) + _cpu(entry.vm_pid) - before) / (time.monotonic() - start)
        finally:
            client.stdin.close()
            try:
                client.wait(20)
            except subprocess.TimeoutExpired:
                client.kill()


def _cpu(pid: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK

