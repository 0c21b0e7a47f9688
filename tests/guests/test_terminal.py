"""Interactive `softkvm run` and `softkvm console` on a real terminal; VMs in the background."""

from __future__ import annotations

import json
import signal

import pytest

from tests.framework.product import Product
from tests.framework.terminal import Terminal

pytestmark = [pytest.mark.net, pytest.mark.usefixtures("busybox")]


def running(product: Product) -> list[str]:
    return [row["name"] for row in json.loads(product.run("ps", "--format", "json").stdout)]


def background(product: Product, name: str) -> None:
    done = product.run("run", "-d", "--name", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{name}\n".encode()


def test_a_shell_on_a_terminal(product: Product) -> None:
    with Terminal(product.command("run", "--name", "shell"), product.environment) as terminal:
        assert b"leave with Ctrl-A x" in terminal.expect(b"# ")
        terminal.type(b"stty size; tty\r")
        assert b"24 80" in terminal.expect(b"/dev/")
        terminal.resize(50, 132)
        terminal.type(b"sleep 1; stty size\r")
        terminal.expect(b"50 132")
        terminal.type(b"sh -c 'echo g''o; exec sleep 1000'\r")
        terminal.expect(b"\ngo\r")
        terminal.type(b"\x03")
        terminal.type(b"echo status $?\r")
        terminal.expect(b"\nstatus 130")
        terminal.type(b"sh -c 'echo a''gain; exec sleep 1000'\r")
        terminal.expect(b"\nagain\r")
        terminal.type(b"\x1a")  # job control of the guest's shell
        terminal.expect(b"Stopped")
        terminal.type(b"\x01h")
        terminal.expect(b"end the VM")
        assert not terminal.restored
        terminal.type(b"\x01x")
        terminal.process.wait(60)
        assert terminal.restored
    assert running(product) == []


def test_exit_status_of_the_shell(product: Product) -> None:
    with Terminal(product.command("run"), product.environment) as terminal:
        terminal.expect(b"# ")
        terminal.type(b"exit\r")
        assert terminal.process.wait(60) == 0
        assert terminal.restored


def test_console_comes_and_goes(product: Product) -> None:
    background(product, "bg")
    assert running(product) == ["bg"]
    with Terminal(product.command("console", "bg"), product.environment) as terminal:
        terminal.expect(b"Ctrl-A d")
        terminal.expect(b"# ")  # what is typed before the shell is there is thrown away by it
        terminal.type(b"x=left-behind\r")
        terminal.expect(b"# ")
        terminal.type(b"\x01?")
        terminal.expect(b"leave the console")
        terminal.type(b"\x01d")
        assert terminal.process.wait(60) == 0
        assert terminal.restored
    with Terminal(product.command("console", "bg"), product.environment) as terminal:
        terminal.expect(b"# ")
        terminal.type(b"echo $x\r")
        terminal.expect(b"\nleft-behind")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(60) == 128 + signal.SIGTERM
        assert terminal.restored
    with Terminal(product.command("console", "bg"), product.environment) as terminal:
        terminal.expect(b"# ")
        assert product.run("kill", "bg").returncode == 0
        terminal.expect(b"VM bg has ended")
        assert terminal.process.wait(60) == 0
        assert terminal.restored
    assert running(product) == []


def test_stop_of_a_vm_in_the_background(product: Product) -> None:
    background(product, "short")
    assert product.run("stop", "short").returncode == 0
    assert running(product) == []
    for verb in ("stop", "kill", "console"):
        done = product.run(verb, "short")
        assert done.returncode == 1
        assert b"no VM 'short'" in done.stderr


def test_kill_when_the_vm_process_is_gone_already(product: Product) -> None:
    background(product, "half")
    (row,) = json.loads(product.run("ps", "--format", "json").stdout)
    product.named("kvmcore-vm half")[0].suspend()
    assert product.run("kill", "half").returncode == 0
    assert running(product) == []
    assert product.wait_gone(row["pid"], row["vm_pid"]) == []


def test_a_vm_that_does_not_start_in_the_background(product: Product) -> None:
    done = product.run("run", "-d", "--drive", "file=/nowhere.img")
    assert done.returncode == 125
    assert b"/nowhere.img" in done.stderr
    assert done.stdout == b""


def test_a_wrong_option_is_our_failure(product: Product) -> None:
    done = product.run("run", "--nonsense", "--", "true")
    assert done.returncode == 125
    assert b"--nonsense" in done.stderr
