"""iperf3 and ping between a guest and its host through `softkvm switch` and a tap, beside QEMU's slirp, alternated.

The host's side is a network namespace of its own: root's, or a user namespace where /dev/net/tun may be opened in one. The
guest is that of `softkvm bench io`. Called by `softkvm bench switch`; asserts nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_user.bench import io, io_image
from qemu_user.images.store import Store

ROWS = ("iperf-out", "iperf-in", "ping")
_HOST, _GUEST, _PORT = "10.111.0.1", "10.111.0.2/24", 5201
_SERVE = (
    "ip link set lo up && ip tuntap add t0 mode tap && ip addr add {host}/24 dev t0 && ip link set t0 up && "
    "(iperf3 -s -p {port} >/dev/null 2>&1 </dev/null &) && "
    "exec {python} -P -m qemu_user.cli.main switch run {name} --port up,tap=t0"
)


def run(rounds: int, seconds: float, only: str, tell: Callable[[str], None]) -> io.Values:
    """ROWS (or those that `only` names), `rounds` times on each side. IoBenchError, ImageError."""
    missing = [program for program in ("unshare", "ip", "iperf3") if shutil.which(program) is None]
    if missing:
        raise io.IoBenchError(f"needs {', '.join(missing)} (apt install util-linux iproute2 iperf3)")
    wanted = [name for name in only.split(",") if name] or list(ROWS)
    image = Store().ensure("busybox", lambda *_: None)
    programs = io_image.ensure(lambda *_: None)
    values: io.Values = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # who ends us ends the switch and iperf3 as well
    with tempfile.TemporaryDirectory(prefix="softkvm-bench-") as name, _switch() as sock, io.iperf_server(False) as port:
        initrd, disk = Path(name) / "initrd", Path(name) / "disk.raw"
        initrd.write_bytes(image.initrd.read_bytes() + programs.read_bytes() + io_image.script())
        disk.write_bytes(bytes(1 << 20))
        guest = f"quiet bench.seconds={seconds:g} bench.only={','.join(wanted)}"
        here = f"{guest} bench.port={_PORT} bench.address={_GUEST} bench.gateway={_HOST}"
        sides = {"softkvm": _command(image.kernel, initrd, here, sock)}
        if shutil.which(io.QEMU) is not None:
            sides["qemu"] = io.qemu_command(image.kernel, initrd, disk, f"{guest} bench.port={port}")
        for number in range(rounds):
            for side, command in sides.items():
                tell(f"round {number + 1} of {rounds}, {side}")
                for row, value in io.boot(side, command, tell).items():
                    values.setdefault(row, {}).setdefault(side, []).append(value)
    return values


def _command(kernel: Path, initrd: Path, append: str, sock: str) -> list[str]:
    command = [sys.executable, "-P", "-m", "qemu_user", "-m", "1024M", "-kernel", str(kernel), "-initrd", str(initrd)]
    command += ["-no-reboot", "-nic", f"switch,path={sock}", "-chardev", "stdio,id=out,signal=off"]
    command += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=out"]
    return [*command, "-append", f"console=hvc0 bench.console=hvc0 {append}"]


@contextmanager
def _switch() -> Iterator[str]:
    """The path of the port.sock of a switch in a namespace, with an iperf3 behind its tap."""
    name = f"bench-{os.getpid()}"
    script = _SERVE.format(host=_HOST, port=_PORT, python=sys.executable, name=name)
    command = ["unshare", "--net", *(["--map-root-user"] if os.geteuid() else []), "sh", "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline().decode(errors="replace")
        if " runs" not in said:
            raise io.IoBenchError(f"no switch with a tap in a network namespace here: {said.strip()}")
        from qemu_user.switch.process import socket_of

        yield socket_of(name)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        process.stderr.close()
