"""Guests on the virtual switch: several of ours and one of QEMU's, VLANs, a tap in a network namespace, a hand-over."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.product import Product, read_until
from tests.framework.qemu_guest import QemuGuest
from tests.framework.switch import RunningSwitch

pytestmark = [pytest.mark.net, pytest.mark.timeout(280), pytest.mark.usefixtures("busybox")]

NETDEV = ["--netdev", "switch,id=n0,name=lan"]
PING = "i=0; until ping -c 1 -W 1 {0} >/dev/null || [ $i = 40 ]; do i=$((i+1)); done; ping -c 2 {0} && echo reached {0}"


def on(address: str, script: str) -> list[str]:
    """The guest's command: an address, then a script."""
    return ["sh", "-c", f"ip addr add {address}/24 dev eth0; {script}"]


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace of our own; tests that change the host's network do it there."""
    name = f"softkvm{os.getpid()}"
    if os.geteuid() or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None:
        pytest.skip("needs root, /dev/net/tun and ip (apt install iproute2)")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.decode().strip()}")
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def test_vms_of_both_kinds_and_vlans(product: Product) -> None:
    """Ours and QEMU's in one VLAN reach each other; one in another VLAN hears nothing."""
    with RunningSwitch(product) as switch:
        listen = "nc -l -p 9 | md5sum; cat"
        server = product.start("run", "--name", "a", *NETDEV, "--", *on("10.0.0.1", f"echo up; {listen}"))
        read_until(server, b"up\n", 120)
        assert switch.port("a/n0")["virtio_header"]
        other = product.run(
            "run", "--name", "c", "--netdev", "switch,name=lan,vlan=2", "--",
            *on("10.0.0.3", "ping -c 2 -W 1 10.0.0.1 || echo alone"),
        )  # fmt: skip
        assert other.stdout.endswith(b"alone\n")
        make = "dd if=/dev/urandom of=/f bs=64k count=32 2>/dev/null; md5sum </f; nc 10.0.0.1 9 </f"
        client = product.run("run", "--name", "b", *NETDEV, "--", *on("10.0.0.2", make))
        assert client.returncode == 0, client.stderr
        assert read_until(server, b"-\n", 120).split()[0] == client.stdout.split()[0]
        if shutil.which("qemu-system-riscv64") is None:
            pytest.skip("needs qemu-system-riscv64 (apt install qemu-system-misc)")
        with tempfile.TemporaryDirectory() as folder:
            netdev = f"stream,id=n,server=off,addr.type=unix,addr.path={switch.directory}/qemu.sock"
            qemu = QemuGuest(Path(folder), netdev, on("10.0.0.4", PING.format("10.0.0.1")))
            assert "reached 10.0.0.1" in qemu.run(120)
        server.kill()
        server.communicate()


@pytest.mark.parametrize("offloads", ["on", pytest.param("off", marks=pytest.mark.slow)])
def test_the_host_through_a_tap(namespace: str, offloads: str) -> None:
    """A switch in a namespace with a tap port: TCP both ways between a guest and the namespace."""
    inside = ["ip", "netns", "exec", namespace]
    with Product() as product:
        subprocess.run([*inside, "ip", "tuntap", "add", "t0", "mode", "tap"], check=True)
        for words in ("addr add 10.1.0.1/24 dev t0", "link set t0 up", "link set lo up"):
            subprocess.run([*inside, "ip", *words.split()], check=True)
        plain = product.command
        product.command = lambda *arguments: [*inside, *plain(*arguments)]  # type: ignore[method-assign]
        switch = RunningSwitch(product, "--port", "up,tap=t0")
        product.command = plain  # type: ignore[method-assign]
        with switch:
            features = ("guest_tso4", "host_tso4", "csum", "guest_csum")
            device = ",".join(("virtio-net-pci,netdev=n0", *(f"{feature}={offloads}" for feature in features)))
            script = "nc -l -p 9 >/f; md5sum </f; nc 10.1.0.1 9 </f"
            command = on("10.1.0.2", f"echo up; {script}")
            guest = product.start("run", "--name", "a", *NETDEV, "--device", device, "--", *command)
            read_until(guest, b"up\n", 120)
            program = (
                "import socket,sys,os,hashlib,time\n"
                "data=os.urandom(4<<20)\n"
                "listener=socket.create_server(('10.1.0.1',9))\n"
                "for _ in range(100):\n"
                "    try: s=socket.create_connection(('10.1.0.2',9),timeout=5); break\n"
                "    except OSError: time.sleep(0.1)\n"
                "s.settimeout(60); s.sendall(data); s.shutdown(socket.SHUT_WR); s.recv(1); s.close()\n"
                "c,_=listener.accept(); got=c.makefile('rb').read()\n"
                "assert got==data; print(hashlib.md5(data).hexdigest())\n"
            )
            done = subprocess.run([*inside, "python3", "-c", program], capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            assert read_until(guest, b"-\n", 120).decode().split()[0] == done.stdout.strip()
            assert guest.wait(60) == 0
            subprocess.run([*inside, "ip", "link", "del", "t0"], check=True)
            end = [port["name"] for port in switch.show()["ports"]]
            assert "up" not in end
            assert switch.process.poll() is None


def test_a_tap_of_the_vm_itself(namespace: str) -> None:
    """-netdev tap inside the namespace: the host's kernel at the other end; vhost=on is told to be ignored."""
    inside = ["ip", "netns", "exec", namespace]
    with Product() as product:
        for words in ("tuntap add t1 mode tap", "addr add 10.2.0.1/24 dev t1", "link set t1 up"):
            subprocess.run([*inside, "ip", *words.split()], check=True)
        netdev = "tap,id=n0,ifname=t1,script=no,downscript=no,vhost=on"
        ran = subprocess.run(
            [*inside, *product.command("run", "--netdev", netdev, "--", *on("10.2.0.2", PING.format("10.2.0.1")))],
            capture_output=True, timeout=120, check=False, env=product.environment, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert b"reached 10.2.0.1" in ran.stdout, ran.stderr
        assert b"vhost=on is ignored" in ran.stderr
        missing = product.run("run", "--netdev", "tap,ifname=averyveryverylongname", "--", "true")
        assert missing.returncode == 125
        assert b"is not an interface name" in missing.stderr


@pytest.mark.slow
@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-system-riscv64") is None, reason="needs QEMU (apt install qemu-system-misc)")
@pytest.mark.parametrize(
    ("port", "netdev"),
    [
        ("q,listen={a}", "stream,id=n,server=off,addr.type=unix,addr.path={a}"),
        ("q,connect={a}", "stream,id=n,server=on,addr.type=unix,addr.path={a}"),
        ("q,local={a},remote={b}", "dgram,id=n,local.type=unix,local.path={b},remote.type=unix,remote.path={a}"),
    ],
    ids=["listen", "connect", "dgram"],
)
def test_places_for_qemu(product: Product, tmp_path: Path, port: str, netdev: str) -> None:
    port, netdev = (text.format(a=tmp_path / "a", b=tmp_path / "b") for text in (port, netdev))
    with RunningSwitch(product, "--port", f"{port},vlan=3"):
        ours = ["--netdev", "switch,id=n0,name=lan,vlan=3"]
        server = product.start("run", "--name", "a", *ours, "--", *on("10.0.0.1", "echo up; nc -l -p 9 | md5sum; cat"))
        read_until(server, b"up\n", 120)
        make = "dd if=/dev/urandom of=/f bs=64k count=8 2>/dev/null; md5sum </f; nc 10.0.0.1 9 </f"
        said = QemuGuest(tmp_path, netdev, on("10.0.0.2", f"{PING.format('10.0.0.1')}; {make}")).run(150)
        assert "reached 10.0.0.1" in said
        assert read_until(server, b"-\n", 120).decode().split()[0] in said
        server.kill()
        server.communicate()


def test_a_vm_is_handed_over_and_found_again(product: Product) -> None:
    """Live migration on one host: the switch learns the new port from the announcement, TCP goes on."""
    with RunningSwitch(product) as switch:
        host = product.start("host", "serve")
        assert host.stderr is not None
        uri = host.stderr.readline().decode().split()[-1]
        listen = "echo up; nc -l -p 9 | md5sum; cat"
        server = product.start("run", "--name", "mover", *NETDEV, "--", *on("10.0.0.1", listen))
        read_until(server, b"up\n", 120)
        script = "i=0; (while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); usleep 20000; done) | nc 10.0.0.1 9; echo sent; cat"
        client = product.start("run", "--name", "b", *NETDEV, "--", *on("10.0.0.2", "echo up; " + script))
        read_until(client, b"up\n", 120)
        before = switch.port("mover/n0")["peer"]
        moved = product.run("migrate", "mover", uri)
        assert moved.returncode == 0, moved.stderr
        read_until(client, b"sent\n", 120)
        row = switch.until("mover/n0#2", addresses=1)
        assert row["peer"] != before
        assert row["rx_frames"] > 0
        for process in (client, server, host):
            process.kill()
            process.communicate()


def test_a_switch_that_comes_back(product: Product) -> None:
    """kill -9 of the switch: the guest's link goes down, and up again with the next one."""
    script = "echo up; while read line; do cat /sys/class/net/eth0/carrier; done"
    with RunningSwitch(product) as switch:
        running = product.start("run", "--name", "a", *NETDEV, "--", "sh", "-c", script)
        assert running.stdin is not None
        read_until(running, b"up\n", 120)

        def carrier(wanted: bytes) -> None:
            """The guest looks until the link is so: it is told of it a moment after the switch has gone or come."""
            assert running.stdin is not None
            for looks_left in reversed(range(30)):
                running.stdin.write(b"look\n")
                running.stdin.flush()
                try:
                    read_until(running, wanted, 1)
                except AssertionError:
                    if not looks_left:
                        raise
                else:
                    return

        carrier(b"1\n")
        switch.process.kill()
        switch.process.wait()
        carrier(b"0\n")
        with RunningSwitch(product) as back:
            back.until("a/n0", up=True)
            carrier(b"1\n")
        running.kill()
        _, errors = running.communicate()
        assert b"switch lan is gone" in errors


def test_what_users_get_wrong(product: Product) -> None:
    done = product.run("run", "--netdev", "switch,name=nope", "--", "true")
    assert done.returncode == 125
    assert b"softkvm switch run -d nope" in done.stderr
    with RunningSwitch(product, "--port", "a,vlan=3"):
        done = product.run("run", "--name", "a", "--netdev", "switch,name=lan,vlan=4", "--", "true")
        assert done.returncode == 125
        assert b"settings of its own for port a" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("iperf3") is None, reason="needs root and iperf3 (apt install iperf3)")
def test_bench_switch(product: Product) -> None:
    done = product.run("bench", "switch", "--rounds", "1", "--seconds", "1", "--only", "ping,iperf-out", seconds=270)
    assert done.returncode == 0, done.stderr
    assert b"iperf3 guest to host" in done.stdout
    assert not product.named("iperf3")
