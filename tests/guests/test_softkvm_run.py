"""`softkvm run` as a user meets it, on the whole stack: output, status, signals, and what is left after
kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qemu_user.images.errors import ImageError
from qemu_user.images.store import Store

ROOT = Path(__file__).parent.parent.parent
SOFTKVM = [sys.executable, "-P", "-m", "qemu_user.cli.main"]
LIMIT = 120

pytestmark = [pytest.mark.net, pytest.mark.timeout(LIMIT + 60)]


@pytest.fixture(scope="module", autouse=True)
def image() -> None:
    """The image is fetched once, before any clock runs."""
    try:
        Store().ensure("busybox", lambda *_: None)
    except ImageError as error:
        pytest.skip(f"no busybox image and no way to get one: {error}")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a user with a runtime directory, hence a daemon, of their own."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("SOFTKVM_ENDPOINT", None)
    yield environment
    for process in belonging(tmp_path):
        with contextlib.suppress(psutil.NoSuchProcess):  # some end with the daemon
            process.kill()


def belonging(runtime: Path) -> list[psutil.Process]:
    """Daemons and VMs of this runtime directory, by their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("XDG_RUNTIME_DIR") == str(runtime):
                found.append(process)
        except psutil.Error:
            continue
    return found


def run(host: dict[str, str], *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*SOFTKVM, "run", *words], env=host, input=stdin, capture_output=True, timeout=LIMIT, check=False)


def start(host: dict[str, str], name: str, script: str) -> subprocess.Popen[bytes]:
    """A VM whose command has said "up"."""
    command = [*SOFTKVM, "run", "--name", name, "--", "sh", "-c", f"echo up; {script}"]
    process = subprocess.Popen(command, env=host, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


def listed(host: dict[str, str]) -> dict[str, dict[str, int]]:
    result = subprocess.run([*SOFTKVM, "ps", "--format", "json"], env=host, capture_output=True, check=True)
    return {row["name"]: row for row in json.loads(result.stdout)}


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_output_status_and_input(host: dict[str, str]) -> None:
    result = run(host, "--", "sh", "-c", "echo out; echo err >&2; cat; exit 7", stdin=b"typed\n")
    assert (result.stdout, result.stderr, result.returncode) == (b"out\ntyped\n", b"err\n", 7)
    assert run(host, "--", "uname", "-m").stdout == b"riscv64\n"


def test_a_panic_ends_the_vm(host: dict[str, str]) -> None:
    result = run(host, "--name", "broken", "--", "sh", "-c", "echo up; sync; echo c >/proc/sysrq-trigger")
    assert (result.stdout, result.returncode) == (b"up\n", 125)
    assert result.stderr == b"softkvm: VM broken: its kernel has panicked: sysrq triggered crash\n"
    assert "broken" not in listed(host)


def test_a_panic_without_a_command(host: dict[str, str]) -> None:
    """The kernel finds no /init; nobody reads the console but the log."""
    result = run(host, "--append", "rdinit=/nowhere root=/dev/nothing")
    assert result.returncode == 125
    assert b": its kernel has panicked: VFS: Unable to mount root fs" in result.stderr


def test_a_command_that_reboots_is_not_run_again(host: dict[str, str]) -> None:
    result = run(host, "--", "sh", "-c", "echo up; reboot -f")
    assert (result.stdout, result.returncode) == (b"up\n", 125)
    assert b"ended before the command did" in result.stderr


def test_two_vcpus(host: dict[str, str]) -> None:
    assert run(host, "--smp", "2", "--", "nproc").stdout == b"2\n"


def test_builtin_guest_needs_no_image(host: dict[str, str]) -> None:
    result = run(host, "hello")
    assert result.stdout.replace(b"\r", b"") == b"Hello from S-mode, on a software vCPU.\n"
    assert result.returncode == 0


def test_disk_keeps_what_was_written(host: dict[str, str], tmp_path: Path) -> None:
    disk = tmp_path / "d.img"
    disk.write_bytes(bytes(1 << 20))
    script = "echo written | dd of=/dev/vda bs=512 seek=3 conv=sync 2>/dev/null; sync"
    assert run(host, "--drive", f"file={disk}", "--", "sh", "-c", script).returncode == 0
    assert disk.read_bytes()[3 * 512 :].startswith(b"written\n")


def test_our_failures_are_125(host: dict[str, str]) -> None:
    result = run(host, "--drive", "file=/nowhere.img", "--", "true")
    assert result.returncode == 125
    assert b"/nowhere.img" in result.stderr


def test_signals_reach_the_command(host: dict[str, str]) -> None:
    process = start(host, "signals", "trap 'echo got; exit 9' TERM; echo ready; while :; do sleep 0.1; done")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"  # a signal before that ends the shell
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 9


def test_killed_vm_process(host: dict[str, str]) -> None:
    victim, bystander = start(host, "victim", "sleep 100"), start(host, "bystander", "read line; exit 3")
    os.kill(listed(host)["victim"]["vm_pid"], signal.SIGKILL)
    assert victim.wait(60) == 125
    assert victim.stderr is not None
    assert b"victim" in (told := victim.stderr.read())
    assert re.search(rb"its kvmcore process( \(\d+\))? is gone", told)
    assert bystander.wait(LIMIT) == 3  # its stdin is at its end: it reads nothing, and ends by itself
    assert listed(host) == {}


def test_killed_device_process(host: dict[str, str]) -> None:
    process = start(host, "lone", "sleep 100")
    vm_pid = listed(host)["lone"]["vm_pid"]
    process.kill()
    assert gone(vm_pid)
    assert listed(host) == {}


def test_killed_daemon(host: dict[str, str], tmp_path: Path) -> None:
    process = start(host, "orphan", "sleep 100")
    vm_pid = listed(host)["orphan"]["vm_pid"]
    daemon = next(p for p in belonging(tmp_path) if "kvmcore" in p.cmdline() and "--listen" in p.cmdline())
    daemon.kill()
    assert process.wait(60) == 125
    assert process.stderr is not None
    assert re.search(rb"its kvmcore process( \(\d+\))? is gone", process.stderr.read())
    assert gone(vm_pid)
    assert run(host, "--", "true").returncode == 0  # the next one starts a new daemon


@pytest.mark.parametrize("accel", ["translator", "interpreter"])
def test_accel_of_a_vm(host: dict[str, str], accel: str) -> None:
    assert run(host, "--accel", accel, "--", "sh", "-c", "exit 5").returncode == 5


def test_the_reference_runs_a_guest(host: dict[str, str]) -> None:
    result = run(host, "hello", "--accel", "reference")
    assert result.returncode == 0
    assert b"Hello from S-mode" in result.stdout


def test_an_accelerator_that_does_not_exist(host: dict[str, str]) -> None:
    result = run(host, "--accel", "warp", "hello")
    assert result.returncode == 125
    assert b"warp" in result.stderr
