"""`--vsock`: connections both ways between the host's Unix sockets and programs in a guest."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from tests.framework.product import Product, read_until

COMPILER = "riscv64-linux-gnu-gcc"
pytestmark = [
    pytest.mark.net,
    pytest.mark.timeout(240),
    pytest.mark.usefixtures("busybox"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs apt install gcc-riscv64-linux-gnu"),
]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the guest's program."""
    folder = tmp_path_factory.mktemp("tools")
    source = Path(__file__).parent / "vsock.c"
    subprocess.run([COMPILER, "-static", "-O1", "-o", folder / "vsock", source], check=True)
    return folder


def test_the_host_calls_the_guest(product: Product, tools: Path) -> None:
    path = product.runtime / "vsock"
    script = "/mnt/tools/vsock listen 7000"
    running = product.start("run", "--vsock", str(path), "--share", f"{tools}:tools:ro", "--", "sh", "-c", script)
    data = os.urandom(1_000_000)
    try:
        read_until(running, b"listening\n", 120)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(60)
            sock.connect(str(path))
            sock.sendall(b"CONNECT 7000\n")
            stream = sock.makefile("rb")
            assert stream.readline().startswith(b"OK ")
            sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)), daemon=True)
            sender.start()
            assert stream.read() == data
            sender.join()
        assert running.wait(60) == 0
    finally:
        running.kill()
        running.communicate()


def test_the_guest_calls_the_host(product: Product, tools: Path) -> None:
    path = product.runtime / "vsock"
    received: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{path}_99")
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock, sock.makefile("rwb") as stream:
                received.append(stream.read())
                stream.write(b"answer " * 20000)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        script = "/mnt/tools/vsock connect 98; dd if=/dev/zero bs=1000 count=500 2>/dev/null | /mnt/tools/vsock connect 99"
        done = product.run("run", "--vsock", str(path), "--share", f"{tools}:tools:ro", "--", "sh", "-c", script)
        server.join(60)
    assert received == [bytes(500_000)]
    assert done.stdout == b"answer " * 20000
    assert b"connect: Connection reset" in done.stderr, "nobody listens on port 98"
    assert not path.exists(), "the socket goes with the VM"
