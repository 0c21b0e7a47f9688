"""NBD over TLS against nbdkit and qemu-nbd: who is trusted, and that data arrives as it was sent."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from qemu_user.backends.block.nbd.disk import NbdDisk
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.errors import BackendError
from tests.framework.disk_tools import needs_nbdkit, needs_qemu_nbd

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl: apt-get install openssl")
pytestmark = [needs_openssl, needs_nbdkit]
MIB = 1 << 20


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server called localhost and a client, named as QEMU and libnbd have them."""
    folder = tmp_path_factory.mktemp("pki")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=authority", "-days", "2")
    _openssl(folder, "req", "-x509", *key, *authority)
    for who, name in (("server", "localhost"), ("client", "somebody")):
        _openssl(folder, "req", *key, "-keyout", f"{who}-key.pem", "-out", f"{who}.csr", "-subj", f"/CN={name}")
        (folder / "names").write_text(f"subjectAltName=DNS:{name}")
        sign = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", "names")
        _openssl(folder, "x509", "-req", "-in", f"{who}.csr", "-out", f"{who}-cert.pem", *sign)
    return folder


Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path, certificates: Path) -> Iterator[Serve]:
    processes: list[subprocess.Popen[bytes]] = []

    def start(kind: str, image: Path, *more: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        if kind == "nbdkit":
            tls = ["--tls=require", f"--tls-certificates={certificates}", *more]
            command = ["nbdkit", "-f", "-t", "4", "-p", str(port), "-i", "127.0.0.1", *tls, "file", str(image)]
        else:
            creds = ["--object", f"tls-creds-x509,id=t,dir={certificates},endpoint=server,verify-peer=on", "--tls-creds", "t"]
            command = ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "-p", str(port), *creds, str(image)]
        processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return f"localhost:{port}"
            time.sleep(0.02)
        raise AssertionError(f"{command} does not listen")

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "d.raw"
    path.write_bytes(random.Random(3).randbytes(4 * MIB))
    return path


@needs_qemu_nbd
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd"])
def test_data_both_ways_by_several_threads(serve: Serve, certificates: Path, image: Path, kind: str) -> None:
    expected, dice = bytearray(image.read_bytes()), random.Random(4)
    with closing(open_disk(f"nbds://{serve(kind, image)}/?tls-certificates={certificates}")) as disk:
        pieces = [(MIB * part, dice.randbytes(700_001 // 512 * 512)) for part in range(4)]

        def work(offset: int, data: bytes) -> None:
            for _ in range(5):
                disk.write(offset, [memoryview(data)[:1000], memoryview(data)[1000:]])
                back = bytearray(len(data))
                disk.read(offset, [memoryview(back)[:77], memoryview(back)[77:]])
                assert back == data

        threads = [threading.Thread(target=work, args=piece, daemon=True) for piece in pieces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        disk.flush()
        for offset, data in pieces:
            expected[offset : offset + len(data)] = data
        whole = bytearray(disk.size)
        disk.read(0, [memoryview(whole)])
        assert whole == expected
    assert image.read_bytes() == expected


def test_a_server_that_nobody_vouches_for_is_refused(serve: Serve, image: Path) -> None:
    with pytest.raises(BackendError, match="certificate"):
        NbdDisk(f"nbds://{serve('nbdkit', image)}/")


def test_a_server_under_another_name_is_refused(serve: Serve, certificates: Path, image: Path) -> None:
    where = serve("nbdkit", image).replace("localhost", "127.0.0.1")
    with pytest.raises(BackendError, match=r"127\.0\.0\.1"):
        NbdDisk(f"nbds://{where}/?tls-certificates={certificates}")
    NbdDisk(f"nbds://{where}/?tls-certificates={certificates}&tls-hostname=localhost").close()


def test_a_client_without_a_certificate(serve: Serve, certificates: Path, image: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(certificates / "ca-cert.pem", bare)
    NbdDisk(f"nbds://{serve('nbdkit', image)}/?tls-certificates={bare}").close()
    with pytest.raises(BackendError, match=r"disk nbds://"):
        NbdDisk(f"nbds://{serve('nbdkit', image, '--tls-verify-peer')}/?tls-certificates={bare}")


def test_one_side_only(serve: Serve, certificates: Path, image: Path) -> None:
    where = serve("nbdkit", image)
    with pytest.raises(BackendError, match="TLS"):
        NbdDisk(f"nbd://{where}/")
    plain = serve("nbdkit", image, "--tls=off")
    with pytest.raises(BackendError, match="does not offer TLS"):
        NbdDisk(f"nbds://{plain}/?tls-certificates={certificates}")
