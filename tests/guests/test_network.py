"""Two guests on one cable: TCP with offloads done in software, and with virtio-net headers all the way."""

from __future__ import annotations

import json
import socket

import pytest

from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]


@pytest.mark.parametrize("header", ["off", "on"])
def test_tcp_between_two_guests(product: Product, header: str) -> None:
    path = product.runtime / "cable"
    cable = f"stream,id=n0,addr.type=unix,addr.path={path},vnet_hdr={header}"
    listen = "ip addr add 10.0.0.1/24 dev eth0; echo ready; nc -l -p 9 | md5sum"
    make = "dd if=/dev/urandom of=/f bs=64k count=40 2>/dev/null; md5sum </f"
    send = f"ip addr add 10.0.0.2/24 dev eth0; {make}; nc 10.0.0.1 9 </f"
    server = product.start("run", "--netdev", f"{cable},server=on", "--", "sh", "-c", listen)
    try:
        read_until(server, b"ready\n", 120)
        client = product.run("run", "--netdev", cable, "--", "sh", "-c", send)
        assert client.returncode == 0, client.stderr
        assert len(client.stdout.split()) == 2
        assert read_until(server, b"-\n", 120) == client.stdout
    finally:
        server.kill()
        server.communicate()


def test_the_cable_can_be_pulled(product: Product) -> None:
    path = product.runtime / "cable"
    script = "echo up; while read line; do cat /sys/class/net/eth0/carrier; done"
    cable = f"stream,id=n0,addr.type=unix,addr.path={path},server=on"
    running = product.start("run", "--name", "plug", "--netdev", cable, "--", "sh", "-c", script)
    unix = socket.AF_UNIX, socket.SOCK_STREAM
    assert running.stdin is not None
    try:
        read_until(running, b"up\n", 120)
        with socket.socket(*unix) as peer, socket.socket(*unix) as control:
            peer.connect(str(path))
            control.connect(str(next(product.runtime.rglob("control.sock"))))
            lines = control.makefile("rwb")
            lines.readline()

            def command(execute: str, **arguments: object) -> dict[str, object]:
                lines.write(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
                lines.flush()
                return dict(json.loads(lines.readline()))

            assert command("qmp_capabilities") == {"return": {}}
            for up, carrier in ((True, b"1\n"), (False, b"0\n"), (True, b"1\n")):
                assert command("set_link", name="n0", up=up) == {"return": {}}
                running.stdin.write(b"look\n")
                running.stdin.flush()
                read_until(running, carrier, 120)
            assert "DeviceNotFound" in str(command("set_link", name="nope", up=False))
    finally:
        running.kill()
        running.communicate()
