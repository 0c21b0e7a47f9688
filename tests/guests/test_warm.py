"""`softkvm` done by a warm process: whoever started the command must not see the difference."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.framework.merging import may_merge
from tests.framework.product import Product, have_image, read_until
from tests.framework.terminal import Terminal

pytestmark = [pytest.mark.net, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def product() -> Iterator[Product]:
    """With a daemon and a warm parent."""
    with Product() as running:
        if not have_image() and running.run("pull", "busybox", seconds=900).returncode:
            pytest.skip("no image")
        running.environment["XDG_DATA_HOME"] = str(running.runtime / "data")
        running.warm()
        yield running


def device_process(product: Product, name: str) -> psutil.Process:
    return psutil.Process(product.device_process(name))


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_warm(process: psutil.Process) -> bool:
    parent = process.parent()
    return parent is not None and parent.cmdline()[0] == "softkvm-warm"


def start(product: Product, name: str, script: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """The command, whose guest has said "up", and its VM's device process."""
    process = product.start("run", "--name", name, "--", "sh", "-c", script)
    read_until(process, b"up\n")
    device = device_process(product, name)
    assert is_warm(device)
    return process, device


def test_input_output_status_directory(product: Product, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    words = ("run", "--drive", "file=disk,format=raw", "--", "sh", "-c", "cat; echo err >&2; dd of=/dev/vda <&0; exit 3")
    command = ["sh", "-c", 'cd "$0" && exec "$@"', str(tmp_path), *product.command(*words)]
    done = subprocess.run(command, input=b"hello", capture_output=True, env=product.environment, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (3, b"hello")
    assert done.stderr.startswith(b"err\n")


def test_descriptors_that_are_inherited(product: Product) -> None:
    command = ["bash", "-c", 'exec "$@" --initrd <(echo no initrd)', "bash", *product.command("run", "--kernel", "/dev/null")]
    done = subprocess.run(command, capture_output=True, env=product.environment, timeout=60, check=False)
    assert done.returncode == 125
    assert b"/dev/null" in done.stderr, done.stderr  # of the kernel, not of /dev/fd/63


def test_signals_reach_the_command(product: Product) -> None:
    process, _ = start(product, "signals", "trap 'exit 7' TERM; trap 'echo usr1' USR1; echo up; while :; do sleep 0.1; done")
    process.send_signal(signal.SIGUSR1)
    read_until(process, b"usr1\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7


def test_the_end_of_one_is_that_of_the_other(product: Product) -> None:
    process, device = start(product, "one", "echo up; sleep 1000")
    vm = json.loads(product.run("ps", "--format", "json").stdout)[0]["vm_pid"]
    process.kill()
    assert product.wait_gone(device.pid, vm) == []
    process, device = start(product, "one", "echo up; sleep 1000")
    device.kill()
    assert process.wait(60) == -signal.SIGKILL


def test_a_vm_in_the_background(product: Product) -> None:
    done = product.run("run", "-d", "--name", "behind")
    assert done.stdout == b"behind\n", done.stderr
    device = device_process(product, "behind")
    assert is_warm(device)
    assert device.cmdline()[3:7] == ["qemu_user.cli.main", "run", "--name", "behind"]
    assert product.run("snapshot", "behind", "s").returncode == 0
    assert product.run("restore", "behind", "s").returncode == 0
    restored = device_process(product, "behind")
    assert is_warm(restored)
    assert restored.pid != device.pid
    assert product.run("kill", "behind").returncode == 0


def test_the_host_may_merge_equal_pages(product: Product) -> None:
    assert product.run("run", "-d", "--name", "equal").returncode == 0
    device = device_process(product, "equal")
    assert is_warm(device)
    assert may_merge(device.pid)
    assert product.run("kill", "equal").returncode == 0


def test_who_has_given_rights_up_is_not_given_them_back(product: Product) -> None:
    code = "import ctypes, os, sys; ctypes.CDLL(None).prctl(38, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
    command = product.command("run", "--name", "confined", "--", "sh", "-c", "echo up; cat")
    with subprocess.Popen(
        [sys.executable, "-c", code, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=product.environment
    ) as process:
        read_until(process, b"up\n")
        assert device_process(product, "confined").pid == process.pid
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_only_files_and_its_end(product: Product, tmp_path: Path) -> None:
    process = product.start("run", "--only-files", "--name", "files", "--", "sh", "-c", "echo up; sleep 1000")
    read_until(process, b"up\n")
    device = device_process(product, "files")
    assert is_warm(device)
    process.kill()
    assert product.wait_gone(device.pid) == []


def test_job_control(product: Product) -> None:
    words = product.command("run", "--name", "job", "--", "sh", "-c", "echo u''p; cat; exit 5")
    environment = {**product.environment, "PS1": "ready> ", "HISTFILE": "", "TERM": "dumb"}
    with Terminal(["bash", "--norc", "-i"], environment) as terminal:
        terminal.expect(b"ready> ")
        quoted = " ".join(f'"{word}"' for word in words)
        terminal.type(quoted.encode() + b"\r")
        terminal.expect(b"\nup\r")
        device = device_process(product, "job")
        assert is_warm(device)
        terminal.type(b"\x1a")
        terminal.expect(b"Stopped")
        wait_for(lambda: device.status() == psutil.STATUS_STOPPED)
        terminal.type(b"fg\r")
        terminal.expect(b"exit 5")
        wait_for(lambda: device.status() != psutil.STATUS_STOPPED)  # then the terminal is its again
        terminal.type(b"line\r")
        terminal.expect(b"line\r\nline\r")
        terminal.type(b"\x04")
        terminal.expect(b"ready> ")
        terminal.type(b"echo status $?\r")
        terminal.expect(b"\nstatus 5\r")
        terminal.type(quoted.encode() + b"\r")
        terminal.expect(b"\nup\r")
        terminal.type(b"line\r")  # a shell that forks may keep SIGINT to itself: this is cat
        terminal.expect(b"line\r\nline\r")
        terminal.type(b"\x03")
        terminal.expect(b"ready> ")
        terminal.type(b"echo status $?\r")
        terminal.expect(b"\nstatus 130\r")


def test_a_program_that_has_changed_is_not_run(product: Product, tmp_path: Path) -> None:
    """A parent that has imported a file which is another one now makes way."""
    module = tmp_path / "extra.py"
    module.write_text("")
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment = {**product.environment, "XDG_RUNTIME_DIR": str(runtime)}
    (runtime / "softkvm").mkdir(mode=0o700)
    os.symlink(product.runtime / "softkvm" / "kvmcore.sock", runtime / "softkvm" / "kvmcore.sock")
    lock = os.open(tmp_path, os.O_RDONLY)
    code = f"from qemu_user.warm import parent; parent._sources = lambda: parent._marks(['{module}'])"
    code += f"; import os; parent.main({lock}, os.pidfd_open(os.getppid()))"
    with subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[lock]) as process:
        socket = runtime / "softkvm" / "warm.sock"
        while not socket.exists():
            assert process.poll() is None
        asking = "import sys; from qemu_user.warm.process import start; p = start('softkvm', ['help'], {0: 0, 1: 1, 2: 2}, '/')"
        ask = [sys.executable, "-c", f"{asking}; sys.exit(9 if p is None else p.wait())"]
        assert subprocess.run(ask, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0
        module.write_text("changed")
        assert subprocess.run(ask, env=environment, check=False).returncode == 9
        assert process.wait(60) == 0
        assert not socket.exists()
    os.close(lock)
