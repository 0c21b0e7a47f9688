"""The image `debian` as its user has it: commands, a system that boots, ssh, cp, a disk that is kept, grown and cloned."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.framework.product import Product, have_image

pytestmark = [
    pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(1500), pytest.mark.usefixtures("debian"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)"),
]  # fmt: skip
needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs ssh (apt install openssh-client)")
BOOT = 600


@pytest.fixture(scope="module")
def debian() -> None:
    if not have_image("debian"):
        with Product() as fetching:
            done = fetching.run("pull", "debian", seconds=1400)
        assert done.returncode == 0, done.stderr.decode(errors="replace")


@pytest.fixture
def host() -> Iterator[Product]:
    """A product whose kept VMs are its own."""
    with Product() as product:
        product.environment["XDG_DATA_HOME"] = str(product.runtime / "data")
        yield product


def ssh(host: Product, *words: str) -> str:
    done = host.run("ssh", *words, seconds=BOOT)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode().strip()


def test_a_command_has_a_network_and_leaves_nothing(host: Product) -> None:
    # A mirror that lacks a side archive (update fails then) need not have `hello` in it.
    script = "cat; apt-get update >&2; apt-get install -y hello >&2 && hello; df --output=target / | tail -1; exit 7"
    done = host.run("run", "debian", "--", "sh", "-c", script, stdin=b"from stdin\n", seconds=BOOT)
    assert (done.stdout, done.returncode) == (b"from stdin\nHello, world!\n/\n", 7), done.stderr.decode(errors="replace")
    assert host.run("disks").stdout == b""
    scratch = os.path.expanduser("~/.cache/softkvm/scratch")
    assert not [name for name in os.listdir(scratch) if name.startswith(f"{os.getpid()}-")]


def test_a_command_that_is_not_there(host: Product) -> None:
    assert host.run("run", "debian", "--nic", "none", "--", "no-such-command", seconds=BOOT).returncode == 127


@needs_ssh
def test_a_system_that_is_kept(host: Product) -> None:
    words = ["run", "debian", "-d", "--name", "web", "--hostname", "web.example", "--user", "ada", "--disk-size", "9G"]
    started = host.run(*words, seconds=BOOT)
    assert (started.returncode, started.stdout) == (0, b"web\n"), started.stderr
    assert ssh(host, "web", "hostname; whoami; sudo whoami").split() == ["web.example", "ada", "root"]
    assert ssh(host, "root@web", "systemctl is-system-running --wait; systemctl --failed --no-legend") == "running"
    size = int(ssh(host, "web", "df --output=size -B1 / | tail -1"))
    assert 8.5e9 < size < 9 << 30
    assert ssh(host, "web", "systemctl is-active serial-getty@hvc0") == "active"
    identity = ssh(host, "web", "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub")

    (host.runtime / "file").write_bytes(b"x" * 100_000)
    assert host.run("cp", "file", "web:/tmp/there", seconds=60).returncode == 0
    assert host.run("cp", "web:/tmp/there", "back", seconds=60).returncode == 0
    assert (host.runtime / "back").read_bytes() == b"x" * 100_000
    ssh(host, "root@web", "apt-get update -q; apt-get install -qy hello && sync")

    assert host.run("stop", "-t", "120", "web", seconds=150).returncode == 0
    assert b"web" in host.run("disks").stdout
    assert host.run("run", "-d", "--name", "web", "--nic", "none", seconds=BOOT).returncode == 0
    assert ssh(host, "web", "whoami; hello").splitlines() == ["ada", "Hello, world!"]
    assert ssh(host, "root@web", "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key.pub") == identity
    refused = host.run("disks", "--delete", "web")
    assert refused.returncode == 1
    assert b"VM web: is running" in refused.stderr
    assert host.run("kill", "web").returncode == 0
    time.sleep(1)
    assert host.run("disks", "--delete", "web").returncode == 0
    assert host.run("disks").stdout == b""


@needs_ssh
def test_two_vms_differ_and_a_forwarded_port_answers(host: Product) -> None:
    forward = ["--netdev", "user,id=n0,hostfwd=tcp:127.0.0.1:22422-:22"]
    assert host.run("run", "debian", "-d", "--name", "a", "--ephemeral", *forward, seconds=BOOT).returncode == 0
    assert host.run("run", "debian", "-d", "--name", "b", "--ephemeral", "--nic", "none", seconds=BOOT).returncode == 0
    look = "cat /etc/machine-id; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub; hostname"
    first, second = ssh(host, "a", look).split(), ssh(host, "b", look).split()
    assert (first[2], second[2]) == ("a", "b")
    assert not set(first) & set(second)
    import socket

    ssh(host, "a", "systemctl is-system-running --wait")
    with socket.create_connection(("127.0.0.1", 22422), 60) as connection:
        connection.settimeout(60)
        connection.sendall(b"SSH-2.0-test\r\n")  # as ssh does; Debian 12's passt wants the client to speak first
        assert connection.recv(20).startswith(b"SSH-2.0-OpenSSH")


@needs_ssh
def test_clones_are_machines_of_their_own_and_let_in_all_the_while(host: Product) -> None:
    words = ["run", "debian", "-d", "--name", "first", "--user", "ada", "--ephemeral", "--nic", "none"]
    assert host.run(*words, seconds=BOOT).returncode == 0
    look = "cat /etc/machine-id; hostname; cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub"
    parent = ssh(host, "first", look).split()
    done = host.run("clone", "first", "other", "--count", "2", seconds=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    end = time.monotonic() + BOOT
    while True:  # the guest makes its keys anew meanwhile: nobody is turned away
        found = [ssh(host, f"other-{number}", look).split() for number in (1, 2)]
        if not set(parent) & {word for words in found for word in words} or time.monotonic() > end:
            break
    assert [words[1] for words in found] == ["other-1", "other-2"]
    assert len({*parent, *found[0], *found[1]}) == 9
    assert ssh(host, "first", look).split() == parent
    assert ssh(host, "other-2", "whoami") == "ada"
