"""A real QEMU at the other end of the cable: -netdev stream over TCP and Unix, socket, dgram."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.framework.product import Product, read_until
from tests.framework.qemu_guest import QemuGuest

pytestmark = [
    pytest.mark.net,
    pytest.mark.qemu,
    pytest.mark.timeout(280),
    pytest.mark.usefixtures("busybox"),
    pytest.mark.skipif(shutil.which("qemu-system-riscv64") is None, reason="needs QEMU (apt install qemu-system-misc)"),
]

CABLES = {
    "stream-inet": (
        "stream,id=n0,server=on,addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
        "stream,id=n,server=off,addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
    ),
    "dgram-unix": (
        "dgram,id=n0,local.type=unix,local.path={a},remote.type=unix,remote.path={b}",
        "dgram,id=n,local.type=unix,local.path={b},remote.type=unix,remote.path={a}",
    ),
    "stream-unix": (
        "stream,id=n0,addr.type=unix,addr.path={a},reconnect=1", "stream,id=n,server=on,addr.type=unix,addr.path={a}",
    ),
    "socket": ("socket,id=n0,listen=127.0.0.1:{port}", "socket,id=n,connect=127.0.0.1:{port}"),
    "dgram-inet": (
        "dgram,id=n0,local.type=inet,local.host=127.0.0.1,local.port={port},remote.type=inet,remote.host=127.0.0.1,remote.port={other}",
        "dgram,id=n,local.type=inet,local.host=127.0.0.1,local.port={other},remote.type=inet,remote.host=127.0.0.1,remote.port={port}",
    ),
    "mcast": (
        "socket,id=n0,mcast=230.0.0.9:{port},localaddr=127.0.0.1", "socket,id=n,mcast=230.0.0.9:{port},localaddr=127.0.0.1",
    ),
}  # fmt: skip
QUICK = ("stream-inet", "dgram-unix")


@pytest.mark.parametrize("cable", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CABLES])
def test_tcp_to_qemu(product: Product, tmp_path: Path, cable: str) -> None:
    """Half a megabyte from QEMU's guest to ours, and its sum back."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        port, other = one.getsockname()[1], two.getsockname()[1]
    ours, theirs = (text.format(port=port, other=other, a=tmp_path / "a", b=tmp_path / "b") for text in CABLES[cable])
    script = "ip addr add 10.0.0.1/24 dev eth0; echo up; nc -l -p 9 | md5sum; cat"
    server = product.start("run", "--name", "a", "--netdev", ours, "--", "sh", "-c", script)
    read_until(server, b"up\n", 120)
    make = "dd if=/dev/urandom of=/f bs=64k count=8 2>/dev/null; md5sum </f"
    wait = "i=0; until ping -c 1 -W 1 10.0.0.1 >/dev/null || [ $i = 40 ]; do i=$((i+1)); done"
    script = f"ip addr add 10.0.0.2/24 dev eth0; {wait}; {make}; nc 10.0.0.1 9 </f"
    said = QemuGuest(tmp_path, theirs, ["sh", "-c", script]).run(150)
    assert read_until(server, b"-\n", 120).decode().split()[0] in said
    server.kill()
    server.communicate()
