"""The NBD client against nbdkit and qemu-nbd, over tcp and Unix sockets; servers that go and come back, or lie."""

from __future__ import annotations

import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from qemu_user.backends.block.nbd import disk as nbd_disk
from qemu_user.backends.block.nbd.disk import NbdDisk
from qemu_user.backends.block.opening import open_disk
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.errors import BackendError
from tests.framework.disk_tools import check, compare, needs_nbdkit, needs_qemu_img, needs_qemu_nbd

MIB = 1 << 20


class Server:
    """A server's process, on a Unix socket or a tcp port."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.socket = folder / "nbd.sock"
        self.command = command
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with suppress(BackendError):
                NbdDisk(self.uri, readonly=True).close()
                return
            assert self.process.poll() is None, f"{self.command} has ended"
            time.sleep(0.02)
        raise AssertionError(f"{self.command} does not listen")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def uri(self) -> str:
        return f"nbd://127.0.0.1:{self.port}/" if self.port else f"nbd+unix:///?socket={self.socket}"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(kind: str, image: Path, *more: str, tcp: bool = False, format: str = "raw") -> Server:
        server = Server(tmp_path, [])
        if tcp:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                server.port = probe.getsockname()[1]
        if kind == "nbdkit":
            where = ["-p", str(server.port), "-i", "127.0.0.1"] if tcp else ["-U", str(server.socket)]
            server.command = ["nbdkit", "-f", "-t", "4", *where, *more, "file", str(image)]
        else:
            where = ["-p", str(server.port), "-b", "127.0.0.1"] if tcp else ["-k", str(server.socket)]
            server.command = ["qemu-nbd", "-t", "-e", "4", "-f", format, *where, *more, str(image)]
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.kill()


KINDS = [
    pytest.param("nbdkit", False, marks=needs_nbdkit, id="nbdkit"),
    pytest.param("nbdkit", True, marks=needs_nbdkit, id="nbdkit-tcp"),
    pytest.param("qemu-nbd", False, marks=needs_qemu_nbd, id="qemu-nbd"),
    pytest.param("qemu-nbd", True, marks=needs_qemu_nbd, id="qemu-nbd-tcp"),
]


@pytest.mark.parametrize(("kind", "tcp"), KINDS)
def test_random_operations(tmp_path: Path, serve: Callable[..., Server], kind: str, tcp: bool) -> None:
    dice = random.Random(1)
    path = tmp_path / "d"
    content = bytearray(dice.randbytes(8 * MIB))
    path.write_bytes(content)
    server = serve(kind, path, tcp=tcp)
    with closing(open_disk(server.uri)) as disk:
        assert disk.size == 8 * MIB
        for _ in range(150):
            length = 512 * dice.choice([1, 8, 128, 1000])
            offset = 512 * dice.randrange((8 * MIB - length) // 512)
            what = dice.choice(["write", "read", "read", "zero", "discard", "flush"])
            if what == "write":
                data = memoryview(dice.randbytes(length))
                disk.write(offset, [data[:100], data[100:]])
                content[offset : offset + length] = data
            elif what == "zero":
                disk.zero(offset, length, unmap=dice.random() < 0.5)
                content[offset : offset + length] = bytes(length)
            elif what == "discard":
                disk.punch(offset, length)
                disk.read(offset, [memoryview(content)[offset : offset + length]])
            elif what == "flush":
                disk.flush()
            else:
                buffer = memoryview(bytearray(b"\xaa" * length))
                disk.read(offset, [buffer[:7], buffer[7:300], buffer[300:]])
                assert buffer == content[offset : offset + length]
        disk.flush()
    assert path.read_bytes() == content


@needs_qemu_nbd
@needs_qemu_img
def test_structured_replies_with_holes_and_qcow2_behind_the_server(tmp_path: Path, serve: Callable[..., Server]) -> None:
    path = tmp_path / "d.qcow2"
    create_qcow2(path, 4 * MIB)
    server = serve("qemu-nbd", path, format="qcow2")
    with closing(open_disk(server.uri)) as disk:
        disk.write(65536, [memoryview(b"x" * 65536)])
        buffer = bytearray(b"\xaa" * 262144)
        disk.read(0, [memoryview(buffer)])
        assert buffer == bytes(65536) + b"x" * 65536 + bytes(131072)
        with pytest.raises(OSError, match="the size that it has"):
            disk.resize(MIB)
    server.kill()
    check(path, leaks=True)


@needs_nbdkit
@needs_qemu_nbd
@needs_qemu_img
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "qcow2"])
def test_holes_are_known(tmp_path: Path, serve: Callable[..., Server], kind: str) -> None:
    image, marks = tmp_path / "sparse", {3, 17, 40}
    size = 64 * 65536 + 512
    if kind == "qcow2":
        create_qcow2(image, size)
        disk = open_disk(str(image), "qcow2")
    else:
        with image.open("wb") as file:
            file.truncate(size)
        disk = open_disk(str(image), "raw")
    for mark in marks:
        disk.write(65536 * mark, [memoryview(b"x" * 65536)])
    disk.flush()
    disk.close()
    server = serve("qemu-nbd", image, format="qcow2") if kind == "qcow2" else serve(kind, image)
    with closing(NbdDisk(server.uri)) as export:
        found = {index for index, mark in enumerate(export.with_data(65536)) if mark}
        assert marks <= found
        assert found <= marks | {64}, "the rest is holes, up to the last, odd sector"
        export.write(65536 * 50, [memoryview(b"y" * 512)])
        assert export.with_data(65536)[50]


@needs_nbdkit
def test_a_server_that_knows_nothing_of_holes(tmp_path: Path, serve: Callable[..., Server]) -> None:
    image = tmp_path / "sparse"
    image.write_bytes(bytes(65536 * 4))
    with closing(NbdDisk(serve("nbdkit", image, "--no-sr").uri)) as export:
        assert export.with_data(65536) == b"\1" * 4


@needs_nbdkit
def test_requests_of_several_threads(tmp_path: Path, serve: Callable[..., Server]) -> None:
    path = tmp_path / "d"
    path.write_bytes(bytes(4 * MIB))
    failures: list[BaseException] = []
    with closing(open_disk(serve("nbdkit", path).uri)) as disk:

        def work(number: int) -> None:
            dice = random.Random(number)
            try:
                for _ in range(200):
                    offset = MIB * number + 512 * dice.randrange(2000)
                    data = dice.randbytes(4096)
                    disk.write(offset, [memoryview(data)])
                    buffer = bytearray(4096)
                    disk.read(offset, [memoryview(buffer)])
                    assert buffer == data
                    if dice.random() < 0.1:
                        disk.flush()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@pytest.mark.parametrize(
    "kind", [pytest.param("nbdkit", marks=needs_nbdkit), pytest.param("qcow2", marks=[needs_qemu_nbd, needs_qemu_img])]
)
def test_a_server_that_is_killed_and_comes_back_loses_nothing(tmp_path: Path, serve: Callable[..., Server], kind: str) -> None:
    dice = random.Random(2)
    path = tmp_path / "d.qcow2"
    if kind == "qcow2":
        create_qcow2(path, 4 * MIB)  # qemu-nbd keeps its tables in memory until it is told to flush
        server = serve("qemu-nbd", path, format="qcow2")
    else:
        path.write_bytes(bytes(4 * MIB))
        server = serve("nbdkit", path)
    content = bytearray(4 * MIB)
    disk = NbdDisk(server.uri, reconnect=30)
    told: list[str] = []
    disk.report = lambda event, text: told.append(event)
    stop = threading.Event()
    failures: list[BaseException] = []

    def guest() -> None:
        number = 0
        try:
            while not stop.is_set() or number < 100:
                number += 1
                offset, data = 4096 * dice.randrange(1024), bytes([number % 256]) * 4096
                disk.write(offset, [memoryview(data)])
                content[offset : offset + 4096] = data
                if number % 50 == 0:
                    disk.flush()
                buffer = bytearray(4096)
                disk.read(offset, [memoryview(buffer)])
                assert buffer == data
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guest, daemon=True)
    thread.start()
    for _ in range(5):
        time.sleep(random.uniform(0.05, 0.2))
        server.kill()
        server.start()
    stop.set()
    thread.join()
    assert not failures
    disk.flush()
    disk.close()
    server.kill()
    assert told[0] == "BLOCK_CONNECTION_LOST"
    assert told.count("BLOCK_CONNECTION_RESTORED") >= 3
    if kind == "qcow2":
        check(path, leaks=True)
        compare(path, bytes(content), tmp_path)
    else:
        assert path.read_bytes() == content


@needs_nbdkit
def test_a_server_that_does_not_come_back_is_an_error_after_a_while(tmp_path: Path, serve: Callable[..., Server]) -> None:
    path = tmp_path / "d"
    path.write_bytes(bytes(MIB))
    server = serve("nbdkit", path)
    disk = NbdDisk(server.uri, reconnect=0.3)
    disk.write(0, [memoryview(b"x" * 512)])
    server.kill()
    path.write_bytes(bytes(2 * MIB))
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            disk.read(0, [memoryview(bytearray(512))])
    server.start()
    with pytest.raises(OSError, match="another one"):
        disk.flush()
    server.kill()
    path.write_bytes(bytes(MIB))
    server.start()
    disk.flush()
    disk.close()
    assert path.read_bytes()[:512] == b"x" * 512


@needs_nbdkit
def test_what_is_not_flushed_is_kept_within_bounds(
    tmp_path: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_disk, "_KEPT_BYTES", 100_000)
    path = tmp_path / "d"
    path.write_bytes(bytes(MIB))
    with closing(NbdDisk(serve("nbdkit", path).uri)) as disk:
        for index in range(50):
            disk.write(8192 * index, [memoryview(bytes(8192))])
            assert disk._kept_bytes <= 108_192


@needs_nbdkit
def test_reading_only_and_errors(tmp_path: Path, serve: Callable[..., Server]) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"r" * MIB)
    server = serve("nbdkit", path, "-r")
    with pytest.raises(BackendError, match="readonly=on"):
        open_disk(server.uri)
    with closing(open_disk(server.uri, readonly=True)) as disk:
        with pytest.raises(OSError, match="reading only"):
            disk.write(0, [memoryview(bytes(512))])
        disk.flush()
        assert not disk.discard
    with pytest.raises(BackendError, match="raw"):
        open_disk(server.uri, "qcow2")
    server.kill()
    with pytest.raises(BackendError, match=r"refused|No such file"):
        open_disk(server.uri)


@needs_nbdkit
@pytest.mark.skipif(not shutil.which("nbdkit"), reason="needs nbdkit")
def test_an_overlay_over_an_export(tmp_path: Path, serve: Callable[..., Server]) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"n" * MIB)
    server = serve("nbdkit", path, "-r")
    create_qcow2(tmp_path / "top.qcow2", 2 * MIB, server.uri, "raw")
    with closing(open_disk(str(tmp_path / "top.qcow2"))) as disk:
        disk.write(0, [memoryview(b"t" * 512)])
        buffer = bytearray(2 * MIB)
        disk.read(0, [memoryview(buffer)])
        assert buffer == b"t" * 512 + b"n" * (MIB - 512) + bytes(MIB)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nbds+x://host/x", "TLS"),
        ("nbds://host/x?tls-certificates=/does/not/exist", "certificates in /does/not/exist: No such file"),
        ("nbds://host/x?tls-psk-file=x", "tls-psk-file: not known"),
        ("nbd://", "expected"),
        ("nbd+unix:///x", "expected"),
        ("nbd://host:99999/x", "ort"),
        ("nbd://127.0.0.1:1/x", "refused"),
        ("nbd+unix:///x?socket=/does/not/exist", "No such file"),
    ],
)
def test_addresses(uri: str, says: str) -> None:
    with pytest.raises(BackendError, match=says):
        open_disk(uri)


# -- servers that lie ------------------------------------------------------------------------------

HELLO = b"NBDMAGICIHAVEOPT"


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


GREETING = HELLO + struct.pack(">H", 3)
STRUCTURED = _reply(8, 1) + _reply(10, 1 << 31 | 1)
ALLOCATION = _reply(8, 1) + _reply(10, 4, bytes(4) + b"base:allocation") + _reply(10, 1)
EXPORT = _reply(7, 3, struct.pack(">HQH", 0, MIB, 1 | 4 | 8))
BLOCKS = _reply(7, 3, struct.pack(">HIII", 3, 8192, 8192, MIB))
NEGOTIATED = GREETING + STRUCTURED + EXPORT + _reply(7, 1)

LIES = {
    "nothing": (b"", "closed"),
    "another protocol": (b"HTTP/1.1 400 Bad Request", "does not speak NBD"),
    "old": (HELLO + struct.pack(">H", 0), "too old"),
    "no export": (GREETING + STRUCTURED + _reply(7, 1 << 31 | 6, b"nope"), "has no such export .*nope"),
    "TLS": (GREETING + _reply(8, 1 << 31 | 5) + _reply(7, 1 << 31 | 5), "TLS"),
    "endless": (GREETING + _reply(8, 1)[:16] + b"\xff" * 4, "nonsense"),
    "other option": (GREETING + _reply(9, 1), "nonsense"),
    "no size": (GREETING + STRUCTURED + _reply(7, 1), "0 bytes"),
    "absurd size": (GREETING + STRUCTURED + _reply(7, 3, struct.pack(">HQH", 0, 1 << 63, 1)) + _reply(7, 1), "disk of"),
    "no contexts": (GREETING + _reply(8, 1) + _reply(10, 3), "answers with 3"),
    "blocks": (GREETING + STRUCTURED + EXPORT + BLOCKS + _reply(7, 1), "blocks"),
}


def _liar(folder: Path, script: bytes, then: Callable[[socket.socket], None] = lambda client: None) -> str:
    path = folder / "liar"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        with server, suppress(OSError):
            client, _ = server.accept()
            with client:
                client.sendall(script)
                then(client)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return f"nbd+unix:///x?socket={path}"


@pytest.mark.parametrize("lie", LIES)
def test_negotiations_that_make_no_sense(tmp_path: Path, lie: str) -> None:
    script, says = LIES[lie]
    with pytest.raises(BackendError, match=says):
        open_disk(_liar(tmp_path, script))


def _chunk(handle: int, kind: int, data: bytes, flags: int = 1) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, handle, len(data)) + data


ANSWERS: dict[str, Callable[[int], bytes]] = {
    "nonsense": lambda handle: b"\0" * 64,
    "unknown handle": lambda handle: struct.pack(">IIQ", 0x67446698, 0, handle + 1) + bytes(4096),
    "data elsewhere": lambda handle: _chunk(handle, 1, struct.pack(">Q", 1 << 40) + bytes(4096)),
    "data before": lambda handle: _chunk(handle, 1, struct.pack(">Q", 0) + bytes(4096)),
    "too much data": lambda handle: _chunk(handle, 1, struct.pack(">Q", 4096) + bytes(8192)),
    "too little": lambda handle: _chunk(handle, 1, struct.pack(">Q", 4096) + bytes(100)),
    "twice the same": lambda handle: 2 * _chunk(handle, 1, struct.pack(">Q", 4096) + bytes(3000), flags=0),
    "a hole of any size": lambda handle: _chunk(handle, 2, struct.pack(">QI", 4096, 0xFFFFFFFF)),
    "an endless error": lambda handle: struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, handle, 0xFFFFFFFF),
    "cut off": lambda handle: struct.pack(">IIQ", 0x67446698, 0, handle) + bytes(100),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_replies_that_make_no_sense_end_the_connection(tmp_path: Path, answer: str) -> None:
    def then(client: socket.socket) -> None:
        client.settimeout(60)
        data = b""
        while len(data) < 28 or data[-28:-24] != b"\x25\x60\x95\x13":
            data += client.recv(65536)
        (handle,) = struct.unpack_from(">Q", data, len(data) - 20)
        client.sendall(ANSWERS[answer](handle))

    disk = NbdDisk(_liar(tmp_path, NEGOTIATED, then), reconnect=0.05)
    buffer = bytearray(b"\xaa" * 8192)
    with pytest.raises(OSError, match="gone"):
        disk.read(4096, [memoryview(buffer)[:4096]])
    assert buffer[4096:] == b"\xaa" * 4096
    disk.close()


STATUS: dict[str, Callable[[int], bytes]] = {
    "all of it": lambda handle: _chunk(handle, 5, struct.pack(">III", 0, MIB, 3)),
    "more than there is": lambda handle: _chunk(handle, 5, struct.pack(">III", 0, 0xFFFFFFFF, 3)),
    "in pieces": lambda handle: _chunk(handle, 5, struct.pack(">IIIII", 0, 4096, 3, MIB - 4096, 2)),
    "nothing": lambda handle: _chunk(handle, 0, b""),
    "no length": lambda handle: _chunk(handle, 5, struct.pack(">III", 0, 0, 3)),
    "data": lambda handle: _chunk(handle, 5, struct.pack(">III", 0, MIB, 1)),
    "an error": lambda handle: _chunk(handle, 0x8001, struct.pack(">IH", 22, 0)),
    "half an extent": lambda handle: _chunk(handle, 5, bytes(9)),
    "endless": lambda handle: struct.pack(">IHHQI", 0x668E33EF, 1, 5, handle, 0xFFFFFFFC),
}


@pytest.mark.parametrize("answer", STATUS)
def test_what_a_server_says_is_allocated(tmp_path: Path, answer: str) -> None:
    """What it says in order is believed, and nothing else: then all may hold data."""

    def then(client: socket.socket) -> None:
        data = b""
        while len(data) < 28 or data[-28:-24] != b"\x25\x60\x95\x13":
            data += client.recv(65536)
        kind, handle, offset, length = struct.unpack_from(">HQQI", data, len(data) - 22)
        assert (kind, offset, length) == (7, 0, MIB)
        client.sendall(STATUS[answer](handle))

    disk = NbdDisk(_liar(tmp_path, GREETING + ALLOCATION + EXPORT + _reply(7, 1), then), reconnect=0.05)
    holes = answer in ("all of it", "more than there is", "in pieces")
    assert disk.with_data(65536) == bytes([not holes]) * 16
    disk.close()


def test_errors_of_the_server_are_the_guests_errors(tmp_path: Path) -> None:
    def then(client: socket.socket) -> None:
        data = b""
        for error in (28, 5, 1000):
            while data.count(b"\x25\x60\x95\x13") < 1:
                data += client.recv(65536)
            (handle,) = struct.unpack_from(">Q", data, len(data) - 20)
            data = b""
            client.sendall(_chunk(handle, 0x8001, struct.pack(">IH", error, 0)))

    disk = NbdDisk(_liar(tmp_path, NEGOTIATED, then), reconnect=0.05)
    for number in (28, 5, 5):
        with pytest.raises(OSError, match=r".") as caught:
            disk.read(0, [memoryview(bytearray(512))])
        assert caught.value.errno == number
    disk.close()
