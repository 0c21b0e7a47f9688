"""kill -9 of each process while VMs run: what should die dies, nothing is left, other VMs go on, the user
is told."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest

from tests.framework.product import Product, read_until

pytestmark = pytest.mark.net
ECHO = "echo up; while read line; do echo got $line; done"


def start(product: Product, name: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    """A VM that echoes its input, and its kvmcore process."""
    client = product.start("run", "--name", name, "busybox", "--", "sh", "-c", ECHO)
    read_until(client, b"up\n")
    (vm,) = product.named(f"kvmcore-vm {name}")
    return client, vm


def answers(client: subprocess.Popen[bytes], word: bytes) -> None:
    """The VM still does its work."""
    assert client.stdin is not None
    client.stdin.write(word + b"\n")
    client.stdin.flush()
    read_until(client, b"got " + word + b"\n")


def listed(product: Product) -> list[str]:
    """The names that softkvm ps shows."""
    lines = product.run("ps").stdout.decode().splitlines()[1:]
    return [line.split()[0] for line in lines]


def daemon_of(vm: psutil.Process) -> psutil.Process:
    """kvmcore: the zygote's parent."""
    zygote = vm.parent()
    assert zygote is not None
    daemon = zygote.parent()
    assert daemon is not None
    return daemon


def test_kill_of_the_client(product: Product, busybox: None) -> None:
    one, vm_one = start(product, "one")
    two, vm_two = start(product, "two")
    os.kill(one.pid, signal.SIGKILL)
    one.wait(60)
    assert product.wait_gone(vm_one.pid) == []
    answers(two, b"alive")
    assert listed(product) == ["two"]
    assert not (product.runtime / "softkvm" / "vms" / "one").exists()
    assert vm_two.is_running()
    again, _ = start(product, "one")
    answers(again, b"again")


def test_kill_of_the_vm_process(product: Product, busybox: None) -> None:
    one, vm_one = start(product, "one")
    two, _ = start(product, "two")
    os.kill(vm_one.pid, signal.SIGKILL)
    assert one.wait(60) != 0
    assert one.stderr is not None
    message = one.stderr.read().decode()
    assert "kvmcore" in message, message
    assert len(message.splitlines()) <= 3, message
    answers(two, b"alive")
    assert listed(product) == ["two"]
    again, _ = start(product, "one")
    answers(again, b"again")


def test_kill_of_the_daemon(product: Product, busybox: None) -> None:
    one, vm_one = start(product, "one")
    two, vm_two = start(product, "two")
    daemon = daemon_of(vm_one)
    zygote = vm_one.parent()
    assert zygote is not None
    os.kill(daemon.pid, signal.SIGKILL)
    for client in (one, two):
        assert client.wait(60) != 0
        assert client.stderr is not None
        message = client.stderr.read().decode()
        assert "kvmcore" in message, message
    assert product.wait_gone(vm_one.pid, vm_two.pid, zygote.pid, daemon.pid) == []
    assert listed(product) == []
    assert product.processes() == []
    again, _ = start(product, "one")
    answers(again, b"again")


def test_kill_of_the_zygote(product: Product, busybox: None) -> None:
    """The daemon cannot make VMs without it: it ends, or makes another; either way the next run works."""
    one, vm_one = start(product, "one")
    zygote = vm_one.parent()
    assert zygote is not None
    os.kill(zygote.pid, signal.SIGKILL)
    assert product.wait_gone(zygote.pid) == []
    again, _ = start(product, "two")
    answers(again, b"again")
    one.kill()
    one.wait(60)


def test_kill_of_qemu_user(product: Product, busybox: None) -> None:
    """python -m qemu_user as a process of its own, on a daemon that softkvm started."""
    two, vm_two = start(product, "two")
    endpoint = f"ipc://{product.runtime}/softkvm/kvmcore.sock"
    from qemu_user.images.store import Store

    image = Store().find("busybox")
    assert image is not None
    command = [product.command()[0], "-P", "-m", "qemu_user", "-accel", f"kvmcore,endpoint={endpoint}"]
    command += ["-nographic", "-name", "direct", "-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    process = subprocess.Popen(
        [*command, "-append", "console=ttyS0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=product.environment, cwd=product.runtime,
    )  # fmt: skip
    read_until(process, b"Linux version")
    (vm,) = product.named("kvmcore-vm direct")
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert product.wait_gone(vm.pid) == []
    assert vm_two.is_running()
    answers(two, b"alive")
    assert listed(product) == ["two"]


def test_nothing_is_left_after_an_ordinary_end(product: Product, busybox: None) -> None:
    before = set(os.listdir("/dev/shm"))
    client, vm = start(product, "one")
    daemon = daemon_of(vm)
    end = time.monotonic() + 60
    while not product.named("kvmcore-spare"):  # has its descriptors, too
        assert time.monotonic() < end, "no spare VM process"
        time.sleep(0.05)
    descriptors = daemon.num_fds()
    for _ in range(3):
        client, vm = start(product, "two")
        assert client.stdin is not None
        client.stdin.close()
        assert client.wait(60) == 0
        assert product.wait_gone(vm.pid) == []
    end = time.monotonic() + 60
    while daemon.num_fds() > descriptors:  # of a VM that has just gone
        assert time.monotonic() < end, f"{daemon.num_fds()} descriptors, {descriptors} before"
        time.sleep(0.05)
    assert set(os.listdir("/dev/shm")) - before == set()
    assert list((product.runtime / "softkvm" / "vms").iterdir()) == [product.runtime / "softkvm" / "vms" / "one"]
