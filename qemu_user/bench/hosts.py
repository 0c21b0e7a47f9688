"""Hosts on this machine for measurements: a runtime directory with its own daemon, VMs in it with a guest that is watched
from inside (kernels/probe.c) and from outside (wire.py); and QEMU with the same guest.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qemu_user.bench.debian_guest import Debian
from qemu_user.bench.linux import end_daemon
from qemu_user.bench.wire import GUEST, HOST, Wire
from qemu_user.images.store import Image, settings
from qemu_user.management.qmp_client import QmpClient

QEMU = "qemu-system-riscv64"
_READY_SECONDS = 300.0
_SETTLE_SECONDS = 3.0
_IDLE_SECONDS = 12.0
"""After which a VM that does nothing has given back what it does not need."""
_DISK = 1 << 20
PROBE = Path(__file__).parent / "kernels" / "probe.bin"
_SAMPLE = "/tmp/probe sample /dev/vda 0"
_TICKS = 1e7
Row = dict[str, Any]
Popen = subprocess.Popen[bytes]
Ready = Callable[[Popen], None]


def command(*load: str, idle: bool = False) -> str:
    """What the guest runs: the probe as a sampler, for some seconds only if the guest is to be `idle` then; and `load`, its
    other modes."""
    packed = base64.b64encode(gzip.compress(PROBE.read_bytes(), 9, mtime=0)).decode()
    lines = [f"echo {packed} | base64 -d | gunzip >/tmp/probe", "chmod +x /tmp/probe"]
    lines += [f"ip addr add {GUEST}/24 dev eth0 2>/dev/null; ip link set eth0 up", f"ping -c 3 -W 1 {HOST} >/dev/null"]
    lines += [f"{mode} &" for mode in (f"timeout 3 {_SAMPLE}" if idle else _SAMPLE, *load)]
    return "\n".join([*lines, "sleep 100000"])


class Watch:
    """How long the guest stood while a with block ran: by its own clock, and by who calls it every millisecond. Not `sampled`:
    its own clock is not looked at (QEMU 7.2 does not set a guest's timer again where it has moved to, so the probe, which
    sleeps between two looks, never wakes)."""

    def __init__(self, disk: Path, wire: Wire, sampled: bool = True) -> None:
        self._disk, self._wire, self._sampled = disk, wire, sampled
        self.inside = self.outside = 0.0
        """Milliseconds; of `inside`, the longest gap between two looks at the clock 0.2 ms apart."""

    def _look(self) -> tuple[int, int]:
        with self._disk.open("rb") as file:
            number, longest = struct.unpack("<QQ", file.read(16))
        return number, longest

    def _wait(self, windows: int) -> None:
        if not self._sampled:
            return
        end, first = time.monotonic() + 10, self._look()[0]
        while self._look()[0] < first + windows and time.monotonic() < end:
            time.sleep(0.02)

    def __enter__(self) -> Watch:
        self._wait(1)
        self._wire.call_guest(0.001)
        time.sleep(0.05)
        self._seen: dict[int, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()
        return self

    def _collect(self) -> None:
        while not self._stop.wait(0.02):
            number, longest = self._look()
            self._seen[number] = longest

    def __exit__(self, *exc_info: object) -> None:
        self._wait(2)
        time.sleep(0.1)
        self._stop.set()
        self._thread.join()
        self._wire.call_guest(0)
        if self._sampled:
            self._seen.pop(min(self._seen), None)  # the window before
            if not self._seen:
                raise RuntimeError("the guest has reported nothing for 10 s: it stands, or its probe has ended")
            self.inside = round(1000 * max(self._seen.values()) / _TICKS, 2)
        self.outside = round(1000 * self._wire.longest_silence(), 2)


class Host:
    """A runtime directory with its own daemon. A context manager."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="skb-"))
        self._environment = {
            **os.environ, "XDG_RUNTIME_DIR": str(self._folder), "XDG_DATA_HOME": str(self._folder / "data"),
        }  # fmt: skip
        self._environment.pop("SOFTKVM_ENDPOINT", None)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for name in os.listdir(self._folder / "softkvm" / "vms") if (self._folder / "softkvm" / "vms").is_dir() else ():
            self._softkvm("kill", name, check=False)
        for process in self._processes:
            process.terminate()
            process.wait()
        end_daemon(self._folder / "softkvm" / "kvmcore.sock")
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

    def boot(self, name: str, memory: int, disk: Path, wire: Wire, *load: str, cpus: int = 1, idle: bool = False) -> None:
        """A guest that is watched (at its start only if it is to be `idle`), booted and settled; `disk` is new."""
        new_disk(disk)
        script = command(*load, idle=idle)
        words = (
            "run", "--name", name, "--memory", str(memory >> 20), "--smp", str(cpus), "--drive", f"file={disk},format=raw",
            "--netdev", f"stream,id=n0,addr.type=unix,addr.path={wire.path}", "busybox", "--", "sh", "-c", script,
        )  # fmt: skip
        nothing = subprocess.DEVNULL
        process = subprocess.Popen(self._command(*words), env=self._environment, stdin=nothing, stdout=nothing)
        self._processes.append(process)
        wait_until_up(disk, wire)

    def boot_debian(self, debian: Debian, disk: Path, wire: Wire) -> None:
        """A whole Debian that is watched, booted and settled; `disk` is new."""
        debian.new_probe_disk(disk)
        words = [*debian.softkvm_command(), *debian.words(disk, wire)]
        process = subprocess.Popen(words, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        debian.log_in(process)
        wait_until_up(disk, wire)

    def pause(self, name: str) -> None:
        """It stands, and uses no CPU, until resume()."""
        with self._qmp(name) as client:
            client.execute("stop")

    def resume(self, name: str) -> None:
        """It goes on."""
        with self._qmp(name) as client:
            client.execute("cont")

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

    def migrate(self, name: str, uri: str, **arguments: Any) -> Row:
        """Hand it over; what query-migrate says at the end."""
        return self._job(name, "migrate", uri=uri, **arguments)

    def arrived(self, name: str) -> Row:
        """What the destination says of how the VM came."""
        with self._qmp(name) as client:
            while (numbers := client.execute("query-migrate"))["status"] == "postcopy-active":
                time.sleep(0.02)
        return dict(numbers)

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

    def keep(self, name: str, tag: str) -> None:
        """A snapshot, where restore() finds it."""
        self._softkvm("snapshot", name, tag)

    def restore(self, name: str, tag: str) -> Row:
        """Bring it back; milliseconds: the whole command, and from the arrival of the order at the process that becomes the VM
        (without the time that the VM that ran takes to end) to the moment at which its vCPUs may run."""
        started = time.monotonic()
        self._softkvm("restore", name, tag)
        total = 1000 * (time.monotonic() - started)
        with self._qmp(name) as client:
            numbers = client.execute("query-migrate")
        return {"to first instruction": numbers["total-time"], "command": total}

    def clone(self, name: str, count: int) -> Row:
        """Wall-clock time of the command, and how much memory of its own each clone has: both processes, and apart from them
        what of the guest's memory is there."""
        started = time.monotonic()
        self._softkvm("clone", name, "copy", "--count", str(count))
        total = 1000 * (time.monotonic() - started)
        time.sleep(_IDLE_SECONDS)
        unique, guest = memory_of(self._folder / "softkvm" / "vms", "copy*")
        return {"total": total, "unique MB each": unique / count / 1e6, "guest MB each": guest / count / 1e6}


def memory_of(vms: Path, names: str) -> tuple[int, int]:
    """Of the running VMs with such names in the registry: bytes that their processes, both of each, have for themselves, and
    bytes of their guests' memory that are there."""
    import psutil

    unique = guest = 0
    for meta in vms.glob(f"{names}/meta.json"):
        vm = json.loads(meta.read_text())
        for process in ("pid", "vm_pid"):
            unique += psutil.Process(vm[process]).memory_full_info().uss
        guest += _guest_memory(vm["vm_pid"])
    return unique, guest


def _guest_memory(pid: int) -> int:
    """Bytes of its guest's memory that are in memory."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if "kvm-guest-memfd" in str(fd.readlink()):
                found += 512 * fd.stat().st_blocks
    return found


def new_disk(path: Path) -> None:
    """What a probe reports on: nothing yet."""
    path.write_bytes(bytes(_DISK))


def wait_until_up(disk: Path, wire: Wire) -> None:
    """Until the guest looks at its clock and has called the host."""
    end = time.monotonic() + _READY_SECONDS
    while disk.read_bytes()[:8] == bytes(8) or not wire.known:
        if time.monotonic() > end:
            raise RuntimeError("the guest does not come up")
        time.sleep(0.1)
    time.sleep(_SETTLE_SECONDS)


# -- QEMU ------------------------------------------------------------------------------------------


def busybox_words(image: Image, memory: int, folder: Path, disk: Path, wire: Wire, *load: str, cpus: int = 1) -> list[str]:
    """QEMU's, for the guest of Host.boot()."""
    new_disk(disk)
    initrd, data = folder / "initrd", image.initrd.read_bytes()
    conf = settings({"NAME": "bench", "COMMAND": command(*load), "TTY": "1"}) + image.extra("ext4").read_bytes()
    initrd.write_bytes(data + bytes(-len(data) % 4) + conf)
    return [
        "-M", "virt", "-m", str(memory >> 20), "-smp", str(cpus), "-kernel", str(image.kernel),
        "-initrd", str(initrd), "-append", image.append, "-display", "none", "-serial", "null", "-monitor", "none",
        "-global", "virtio-mmio.force-legacy=false",
        "-device", "virtio-serial-device", "-chardev", "null,id=console", "-device", "virtconsole,chardev=console",
        "-chardev", "file,id=c,path=/dev/null", "-device", "virtserialport,chardev=c,name=org.softkvm.control",
        "-device", "virtio-rng-device", "-drive", f"file={disk},format=raw,if=none,id=d",
        "-device", "virtio-blk-device,drive=d", "-device", "virtio-net-device,netdev=n0",
        "-netdev", f"stream,id=n0,server=off,addr.type=unix,addr.path={wire.path}",
    ]  # fmt: skip


class Qemu:
    """Its guest, watched, booted and settled, that moves from process to process. A context manager. `ready`: what is to be
    said to the guest at its console."""

    def __init__(self, words: list[str], folder: Path, disk: Path, wire: Wire, ready: Ready | None = None) -> None:
        self._words, self._folder = words, folder
        self._count = 0
        self._here = self._start()
        self._there: tuple[Popen, Path, str] | None = None
        try:
            if ready is not None:
                ready(self._here[0])
            wait_until_up(disk, wire)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Qemu:
        return self

    def _start(self, uri: str = "") -> tuple[Popen, Path, str]:
        self._count += 1
        path = self._folder / f"qmp{self._count}"
        words = [QEMU, *self._words, "-qmp", f"unix:{path},server=on,wait=off", *(("-incoming", uri) if uri else ())]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE), path, uri

    def pause(self) -> None:
        """It stands, and uses no CPU, until resume()."""
        with _connected(self._here[1]) as client:
            client.execute("stop")

    def resume(self) -> None:
        """It goes on."""
        with _connected(self._here[1]) as client:
            client.execute("cont")

    def prepare(self) -> None:
        """Start the process that migrate() moves the guest to."""
        self._there = self._start(f"unix:{self._folder / f'move{self._count}'}")
        with _connected(self._there[1]):
            time.sleep(0.5)

    def migrate(self, seconds: float) -> Row:
        """Hand the guest over, 30 ms allowed; what query-migrate says at the end, or after so many seconds, when it is called
        off. prepare() before each."""
        assert self._there is not None
        with _connected(self._here[1]) as client:
            client.execute("migrate-set-parameters", max_bandwidth=10 << 30, downtime_limit=30)
            client.execute("migrate", uri=self._there[2])
            end = time.monotonic() + seconds
            while (numbers := dict(client.execute("query-migrate")))["status"] not in ("completed", "failed"):
                if time.monotonic() > end:
                    client.execute("migrate_cancel")
                    break
                time.sleep(0.01)
        if numbers["status"] == "completed":
            self._here, self._there = self._there, self._here
        return numbers

    def end_other(self) -> None:
        """End the process that has the guest no longer, or has never had it."""
        if self._there is not None:
            _end(self._there[0])
            self._there = None

    def __exit__(self, *exc_info: object) -> None:
        self.end_other()
        _end(self._here[0])


def _end(process: Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _connected(path: Path) -> QmpClient:
    end = time.monotonic() + 10
    while True:
        try:
            return QmpClient(str(path), timeout=60)
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
