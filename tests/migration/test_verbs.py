"""The verbs on real guests: pause, resume, snapshot, restore, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.framework.product import Product, on_console, read_until

pytestmark = pytest.mark.net
TICK = "n=0; while :; do echo tick $n; n=$((n+1)); sleep 0.05; done"


@pytest.fixture
def user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Product() as product:
        yield product


def ok(product: Product, *words: str) -> str:
    done = product.run(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()


def statuses(product: Product) -> list[str]:
    return [row["name"] for row in json.loads(ok(product, "ps", "--format", "json"))]


def test_snapshot_and_restore_of_linux(user: Product, busybox: None) -> None:
    client = user.start("run", "--name", "web", "--memory", "256M", "busybox")
    read_until(client, b"# ")
    assert client.stdin is not None
    client.stdin.write(b"echo before > /tmp/state; cat /tmp/state\n")
    client.stdin.flush()
    read_until(client, b"before\r\n")
    assert "the guest stood" in ok(user, "snapshot", "web", "one")
    ok(user, "pause", "web")
    ok(user, "pause", "web")
    ok(user, "resume", "web")
    client.stdin.write(b"echo after > /tmp/state; cat /tmp/state\n")
    client.stdin.flush()
    read_until(client, b"after\r\n")
    assert "one" in ok(user, "snapshots", "web")
    assert b"no snapshot" in user.run("restore", "web", "two").stderr
    assert statuses(user) == ["web"]
    ok(user, "restore", "web", "one")
    client.wait(60)
    on_console(user, "web", b"cat /tmp/state\n", b"before\r\n")
    ok(user, "kill", "web")
    assert b"no VM" in user.run("pause", "web").stderr
    ok(user, "delete", "web", "one")
    assert user.run("delete", "web", "one").returncode == 1


def test_clones_and_templates_of_linux(user: Product, busybox: None) -> None:
    client = user.start("run", "--name", "web", "--memory", "256M", "busybox")
    read_until(client, b"# ")
    assert client.stdin is not None
    client.stdin.write(b"echo known > /tmp/state; cat /tmp/state\n")
    client.stdin.flush()
    read_until(client, b"known\r\n")
    assert "stood" in ok(user, "clone", "web", "copy", "--count", "3")
    assert statuses(user) == ["copy-1", "copy-2", "copy-3", "web"]
    for name in ("copy-3", "copy-1"):
        on_console(user, name, b"cat /tmp/state\n", b"known\r\n")
        on_console(user, name, f"echo of {name} > /tmp/state; cat /tmp/state\n".encode(), f"of {name}\r\n".encode())
        # Linux's driver of the generation id has seen it, and the image's agent has heard who we are.
        on_console(user, name, b"dmesg | grep -c 'crng reseeded due to virtual machine fork'\n", b"\n1\r\n")
        on_console(user, name, b"echo I am $(hostname)\n", f"I am {name}\r\n".encode())
    client.stdin.write(b"cat /tmp/state\n")
    client.stdin.flush()
    read_until(client, b"known\r\n")
    assert b"is running" in user.run("clone", "web", "copy", "--count", "2").stderr

    ok(user, "template", "create", "web", "golden")
    assert "golden" in ok(user, "template", "list")
    ok(user, "kill", "web")
    ok(user, "run", "golden", "--name", "new")
    on_console(user, "new", b"cat /tmp/state\n", b"known\r\n")
    ok(user, "template", "delete", "golden")
    on_console(user, "new", b"ls /bin | wc -l\n", b"\r\n")
    assert ok(user, "disks") == ""
    left = [path.name for path in (user.runtime / "softkvm").glob("clone-*")]
    assert left == []


def test_the_disk_of_a_clone_is_listed_and_deleted(user: Product, busybox: None, tmp_path: Path) -> None:
    ok(user, "image", "create", "-f", "qcow2", str(tmp_path / "base.qcow2"), "1M")
    ok(user, "image", "create", "-f", "qcow2", "-b", str(tmp_path / "base.qcow2"), "-F", "qcow2", str(tmp_path / "over.qcow2"))
    client = user.start("run", "--name", "web", "--memory", "256M", "--drive", f"file={tmp_path}/over.qcow2", "busybox")
    read_until(client, b"# ")
    assert client.stdin is not None
    client.stdin.write(b"echo first > /dev/vda; sync; head -c 5 /dev/vda; echo .\n")
    client.stdin.flush()
    read_until(client, b"first.\r\n")
    ok(user, "snapshot", "web", "one")
    client.stdin.write(b"echo later > /dev/vda; sync; head -c 5 /dev/vda; echo .\n")
    client.stdin.flush()
    read_until(client, b"later.\r\n")
    ok(user, "clone", "web", "copy")
    on_console(user, "copy", b"echo other > /dev/vda; sync; head -c 5 /dev/vda; echo .\n", b"other.\r\n")
    assert "copy" in ok(user, "disks")
    assert b"is running" in user.run("disks", "--delete", "copy").stderr
    ok(user, "restore", "web", "one")
    on_console(user, "web", b"echo 3 > /proc/sys/vm/drop_caches; head -c 5 /dev/vda; echo .\n", b"first.\r\n")
    on_console(user, "copy", b"echo 3 > /proc/sys/vm/drop_caches; head -c 5 /dev/vda; echo .\n", b"other.\r\n")
    ok(user, "kill", "copy")
    ok(user, "disks", "--delete", "copy")
    assert ok(user, "disks") == ""
    assert b"no VM" in user.run("disks", "--delete", "copy").stderr
