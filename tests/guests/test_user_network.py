"""The user network as its user sees it: published ports, an address plan of one's own, restrict=on, passt killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from protocol.channel.confinement import landlock_version
from tests.framework.product import Product, read_until

pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("busybox"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)"),
]

SERVE = "while :; do echo hello from $(hostname) | nc -w 5 -l -p 80 2>/dev/null; done"
"""-w: a connection whose other end was killed does not stay for ever."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def ask(port: int, seconds: float = 60) -> bytes:
    """What the guest's server says through a forwarded port."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                client.sendall(b"hello\n")  # Debian 12's passt completes the guest's connection with the first data
                if data := client.recv(100):
                    return data
        except OSError:
            pass
        assert time.monotonic() < end, "no answer through the forwarded port"
        time.sleep(0.2)


@pytest.mark.parametrize("how", [[], ["--only-files"]], ids=["", "only-files"])
def test_published_and_restarted(product: Product, how: list[str]) -> None:
    """-p reaches the guest; it still does when passt was killed, and the user is told. --only-files: a launcher starts it."""
    if how and not landlock_version():
        pytest.skip("needs Landlock (Linux 5.13)")
    port = free_port()
    guest = product.start("run", *how, "--name", "web", "-p", f"127.0.0.1:{port}:80", "--", "sh", "-c", f"echo up; {SERVE}")
    read_until(guest, b"up\n", 120)
    assert ask(port) == b"hello from web\n"
    second = product.run("run", *how, "-p", f"127.0.0.1:{port}:80", "--", "true")
    assert second.returncode == 125
    assert b"of the host is in use already" in second.stderr
    (passt,) = product.named("passt")
    passt.send_signal(signal.SIGKILL)
    product.wait_gone(passt.pid)
    assert ask(port) == b"hello from web\n"
    (again,) = product.named("passt")
    guest.kill()
    _, errors = guest.communicate()
    assert b"passt ended; it is started again" in errors
    assert product.wait_gone(again.pid) == []


def test_restarted_behind_a_guest_that_says_nothing(product: Product) -> None:
    """A new passt has to hear of the guest's MAC: an idle guest without IPv6 sends nothing when its link comes back."""
    port = free_port()
    quiet = "echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6"
    guest = product.start("run", "--name", "web", "-p", f"127.0.0.1:{port}:80", "--", "sh", "-c", f"{quiet}; echo up; {SERVE}")
    read_until(guest, b"up\n", 120)
    assert ask(port) == b"hello from web\n"
    time.sleep(5)  # what the guest still had to say about that connection has been said
    (passt,) = product.named("passt")
    passt.send_signal(signal.SIGKILL)
    product.wait_gone(passt.pid)
    assert ask(port) == b"hello from web\n"
    guest.kill()
    guest.communicate()


def test_a_plan_of_ones_own_and_restricted(product: Product) -> None:
    """net=, dns= as the guest gets them; restrict=on: forwarded ports answer, the host cannot be reached."""
    port, file = free_port(), product.runtime / "x.pcap"
    with socket.create_server(("0.0.0.0", 0)) as listener:
        host = listener.getsockname()[1]
        netdev = f"user,id=n0,net=10.0.2.0/24,dns=10.0.2.3,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-:80"
        reach = f"nc -w 3 10.0.2.2 {host} </dev/null && echo reached || echo not reached"
        script = f"ip -4 addr show eth0 | grep -o 'inet [0-9./]*'; cat /etc/resolv.conf; {reach}; echo up; {SERVE}"
        guest = product.start("run", "--name", "web", "--netdev", netdev, "--", "sh", "-c", script)
        said = read_until(guest, b"up\n", 120)
        assert b"inet 10.0.2.15/24" in said
        assert b"nameserver 10.0.2.3" in said
        assert b"not reached" in said
        assert ask(port) == b"hello from web\n"
        guest.kill()
        guest.communicate()
        assert not file.exists()


def test_without_passt_the_message_says_what_to_install(product: Product, tmp_path: Path) -> None:
    product.environment["PATH"] = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not os.path.exists(os.path.join(folder, "passt"))
    )
    done = product.run("run", "-p", "8080:80", "--", "true")
    assert done.returncode == 125
    assert b"apt install passt" in done.stderr


def test_published_ports_move_with_the_vm(product: Product) -> None:
    """A hand-over on one host: the port leads to the VM before and after."""
    port = free_port()
    guest = product.start("run", "--name", "web", "-p", f"127.0.0.1:{port}:80", "--", "sh", "-c", f"echo up; {SERVE}")
    read_until(guest, b"up\n", 120)
    assert ask(port) == b"hello from web\n"
    host = product.start("host", "serve")
    assert host.stderr is not None
    uri = host.stderr.readline().decode().split()[-1]
    moved = product.run("migrate", "web", uri)
    assert moved.returncode == 0, moved.stderr
    assert ask(port) == b"hello from web\n"
    host.kill()
    host.communicate()
    guest.kill()
    guest.communicate()
