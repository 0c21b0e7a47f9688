"""The 9P2000.L server: what a client is answered, and that nothing outside the shared folder is ever reached."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_user.backends.errors import BackendError
from qemu_user.backends.share import messages as m
from qemu_user.backends.share.confined import ConfinedTree
from qemu_user.backends.share.server import Server


class Client:
    """Speaks to a server; calls return the reply's body, or raise OSError with the server's errno."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.call(m.TVERSION, m.number(65536, 4) + m.text(m.VERSION))
        self.call(m.TATTACH, struct.pack("<II", 0, m.NO_FID) + m.text("u") + m.text("") + m.number(0, 4))

    def raw(self, request: bytes, room: int = 70000) -> bytes:
        buffer = bytearray(room)
        answer = self.server.serve(request, [memoryview(buffer)[:5], memoryview(buffer)[5:]])
        return bytes(buffer[:answer]) if isinstance(answer, int) else answer

    def call(self, kind: int, body: bytes) -> bytes:
        answer = self.raw(m.reply(kind, 7, body))
        size, got, tag = m.HEADER.unpack_from(answer)
        assert (size, tag) == (len(answer), 7)
        if got == m.RLERROR:
            raise OSError(int.from_bytes(answer[7:], "little"), "9P")
        assert got == kind + 1
        return answer[7:]

    def walk(self, fid: int, new: int, *names: str) -> int:
        body = struct.pack("<IIH", fid, new, len(names)) + b"".join(m.text(name) for name in names)
        return int.from_bytes(self.call(m.TWALK, body)[:2], "little")

    def open(self, fid: int, flags: int = os.O_RDONLY) -> None:
        self.call(m.TLOPEN, struct.pack("<II", fid, flags))

    def read(self, fid: int, count: int = 60000, offset: int = 0) -> bytes:
        return self.call(m.TREAD, struct.pack("<IQI", fid, offset, count))[4:]

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        return int.from_bytes(self.call(m.TWRITE, struct.pack("<IQI", fid, offset, len(data)) + data), "little")

    def mode(self, fid: int) -> int:
        return int(struct.unpack_from("<I", self.call(m.TGETATTR, struct.pack("<IQ", fid, m.GETATTR_BASIC)), 21)[0])

    def names(self, fid: int, room: int = 60000) -> list[str]:
        found, offset = [], 0
        while True:
            data = self.call(m.TREADDIR, struct.pack("<IQI", fid, offset, room))[4:]
            if not data:
                return found
            while data:
                offset, _, length = struct.unpack_from("<QBH", data, 13)
                found.append(data[24 : 24 + length].decode())
                data = data[24 + length :]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("outside")
    root = tmp_path / "root"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "file").write_text("inside")
    (root / "sub" / "other").write_text("below")
    (root / "out").symlink_to("../secret")
    (root / "up").symlink_to("..")
    return root


@pytest.fixture(params=["openat2", "by name"])
def client(folder: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    server = Server(str(folder))
    server._tree._has_openat2 = request.param == "openat2"
    yield Client(server)
    server.close()


def _errno(call: Callable[..., Any], *arguments: Any) -> int:
    """The errno that a call fails with, 0 if it does not."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0


def test_files_are_read_and_written(client: Client, folder: Path) -> None:
    assert client.walk(0, 1, "file") == 1
    client.open(1, os.O_RDWR)
    assert client.read(1) == b"inside"
    assert client.read(1, 3, 2) == b"sid"
    assert client.read(1, 10, 100) == b""
    assert client.write(1, b"OUT", 0) == 3
    assert (folder / "file").read_text() == "OUTide"
    client.call(m.TFSYNC, struct.pack("<II", 1, 0))
    client.call(m.TCLUNK, m.number(1, 4))
    assert _errno(client.read, 1) == errno.EBADF


def test_writes_go_where_they_say_even_when_appending(client: Client, folder: Path) -> None:
    client.walk(0, 1, "file")
    client.open(1, os.O_WRONLY | os.O_APPEND)
    client.write(1, b"inside+", 0)
    client.write(1, b"inside++", 0)
    assert (folder / "file").read_text() == "inside++"


def test_folders_are_listed_in_pieces(client: Client, folder: Path) -> None:
    for number in range(100):
        (folder / f"n{number}").touch()
    client.walk(0, 1)
    client.open(1, os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(client.names(1, 200)) == sorted([".", "..", *os.listdir(folder)])


def test_files_are_made_moved_and_removed(client: Client, folder: Path) -> None:
    client.walk(0, 1)
    client.call(m.TLCREATE, m.number(1, 4) + m.text("new") + struct.pack("<III", os.O_RDWR, 0o666, 0))
    assert client.write(1, b"data") == 4
    assert (folder / "new").stat().st_mode & 0o777 == 0o666, "our umask is not the guest's"
    client.call(m.TMKDIR, m.number(0, 4) + m.text("made") + struct.pack("<II", 0o777, 0))
    assert (folder / "made").stat().st_mode & 0o777 == 0o777
    client.walk(0, 2, "sub", "deep")
    client.call(m.TRENAMEAT, m.number(0, 4) + m.text("sub") + m.number(0, 4) + m.text("moved"))
    client.walk(2, 3, "..", "other")
    client.open(3)
    assert client.read(3) == b"below", "a fid follows what it names"
    client.call(m.TSYMLINK, m.number(0, 4) + m.text("sym") + m.text("/etc/passwd") + m.number(0, 4))
    client.walk(0, 4, "sym")
    assert client.call(m.TREADLINK, m.number(4, 4)) == m.text("/etc/passwd")
    client.call(m.TLINK, m.number(0, 4) + m.number(1, 4) + m.text("hard"))
    assert (folder / "hard").stat().st_nlink == 2
    client.call(m.TUNLINKAT, m.number(0, 4) + m.text("made") + m.number(m.NAME_AT_REMOVEDIR, 4))
    client.call(m.TREMOVE, m.number(4, 4))
    assert not (folder / "sym").is_symlink()
    full = m.number(0, 4) + m.text("moved") + m.number(m.NAME_AT_REMOVEDIR, 4)
    assert _errno(client.call, m.TUNLINKAT, full) == errno.ENOTEMPTY


def test_attributes(client: Client, folder: Path) -> None:
    client.walk(0, 1, "file")
    valid, when = 0x1 | 0x8 | 0x20 | 0x100, (1_600_000_000, 123_456_789)
    client.call(m.TSETATTR, struct.pack("<IIIIIQQQQQ", 1, valid, 0o640, 0, 0, 3, 0, 0, *when))
    status = (folder / "file").stat()
    assert (status.st_mode & 0o777, status.st_size, status.st_mtime_ns) == (0o640, 3, 1_600_000_000_123_456_789)
    assert client.mode(1) & 0o777 == 0o640
    block, names = struct.unpack("<I48xI", client.call(m.TSTATFS, m.number(0, 4))[4:])
    assert block > 0
    assert names == 255


def test_locks_of_two_opens_exclude_each_other(client: Client) -> None:
    for fid in (1, 2):
        client.walk(0, fid, "file")
        client.open(fid, os.O_RDWR)

    def lock(fid: int, kind: int) -> int:
        return client.call(m.TLOCK, struct.pack("<IBIQQI", fid, kind, 0, 0, 0, 1) + m.text("guest"))[0]

    assert lock(1, 1) == 0
    assert lock(2, 1) == 1, "blocked"
    held = client.call(m.TGETLOCK, struct.pack("<IBQQI", 2, 1, 0, 0, 9) + m.text("guest"))
    assert held[0] == 1
    assert lock(1, 2) == 0
    assert lock(2, 1) == 0


# -- confinement -----------------------------------------------------------------------------------


def test_the_root_has_no_parent(client: Client, folder: Path) -> None:
    assert client.walk(0, 1, "..", "..", "..", "sub", "..") == 5
    client.open(1)
    assert "file" in client.names(1)


@pytest.mark.parametrize("name", ["../secret", "sub/other", "", "a\0b", "x" * 300])
def test_names_are_names(client: Client, name: str) -> None:
    assert _errno(client.walk, 0, 1, name) in (errno.EINVAL, errno.ENOENT, errno.ENAMETOOLONG)
    for kind, rest in ((m.TMKDIR, struct.pack("<II", 0o755, 0)), (m.TUNLINKAT, m.number(0, 4))):
        assert _errno(client.call, kind, m.number(0, 4) + m.text(name) + rest) in (
            errno.EINVAL, errno.ENOENT, errno.ENAMETOOLONG,
        )  # fmt: skip


@pytest.mark.parametrize("name", [".", ".."])
def test_dots_cannot_be_made_or_removed(client: Client, folder: Path, name: str) -> None:
    assert _errno(client.call, m.TUNLINKAT, m.number(0, 4) + m.text(name) + m.number(m.NAME_AT_REMOVEDIR, 4)) == errno.EINVAL
    assert _errno(client.call, m.TRENAMEAT, m.number(0, 4) + m.text("file") + m.number(0, 4) + m.text(name)) == errno.EINVAL
    assert _errno(client.call, m.TLCREATE, m.number(0, 4) + m.text(name) + struct.pack("<III", 2, 0o600, 0)) == errno.EINVAL
    assert (folder / "file").exists()


def test_links_are_not_followed(client: Client, folder: Path) -> None:
    client.walk(0, 1, "out")
    assert _errno(client.open, 1) == errno.ELOOP
    assert client.mode(1) >> 12 == 0o12
    with pytest.raises(OSError, match="9P"):
        client.open(1, os.O_WRONLY | os.O_TRUNC)
    assert client.walk(0, 2, "up", "secret") == 1, "the walk ends at the link"
    assert _errno(client.call, m.TLCREATE, m.number(0, 4) + m.text("out") + struct.pack("<III", 2, 0o600, 0)) == errno.ELOOP
    assert _errno(client.call, m.TSETATTR, struct.pack("<IIIIIQQQQQ", 1, 8, 0, 0, 0, 0, 0, 0, 0, 0)) == errno.ELOOP
    assert (folder.parent / "secret").read_text() == "outside"


def test_special_files_of_the_host_are_not_opened(client: Client, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    client.walk(0, 1, "pipe")
    assert _errno(client.open, 1, os.O_RDWR) == errno.ENXIO
    device = m.number(0, 4) + m.text("null") + struct.pack("<IIII", 0o020666, 1, 3, 0)
    assert _errno(client.call, m.TMKNOD, device) == errno.EPERM


def test_a_folder_swapped_for_a_link_leads_nowhere(folder: Path) -> None:
    """The host (or another guest) exchanges a folder and a link while names are resolved."""
    tree, stop = ConfinedTree(str(folder)), threading.Event()
    (folder / "trap").mkdir()
    (folder / "trap" / "secret").write_text("inside")

    def swap() -> None:
        while not stop.is_set():
            os.rename(folder / "trap", folder / "kept")
            os.symlink("..", folder / "trap")
            os.unlink(folder / "trap")
            os.rename(folder / "kept", folder / "trap")

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    try:
        seen = tries = 0
        while tries < 3000 or (seen == 0 and tries < 1_000_000):
            tries += 1
            try:
                fd = tree.open(("trap", "secret"), os.O_RDONLY)
            except OSError:
                continue
            assert os.read(fd, 10) == b"inside"
            os.close(fd)
            seen += 1
    finally:
        stop.set()
        thread.join()
        tree.close()
    assert seen > 0


def test_a_readonly_share_is(folder: Path) -> None:
    server = Server(str(folder), readonly=True)
    client = Client(server)
    client.walk(0, 1, "file")
    assert _errno(client.open, 1, os.O_RDWR) == errno.EROFS
    assert _errno(client.call, m.TMKDIR, m.number(0, 4) + m.text("x") + struct.pack("<II", 0o755, 0)) == errno.EROFS
    assert _errno(client.call, m.TUNLINKAT, m.number(0, 4) + m.text("file") + m.number(0, 4)) == errno.EROFS
    client.open(1)
    assert client.read(1) == b"inside"
    server.close()


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    with pytest.raises(BackendError, match="shared folder"):
        Server(str(folder / "file"))
    with pytest.raises(BackendError, match="nowhere"):
        Server("/nowhere")


# -- bad clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_answered(client: Client, folder: Path, seed: int) -> None:
    choice = random.Random(seed)
    kinds = [*client.server._handlers, m.TREAD, m.TXATTRWALK, 255]
    for _ in range(3000):
        fields = b"".join(
            choice.choice((m.number(choice.randrange(4), 4), m.number(choice.getrandbits(64), 8), m.text("sub"), b"\0"))
            for _ in range(choice.randrange(6))
        )
        message = m.reply(choice.choice(kinds), 1, fields)
        if choice.random() < 0.1:
            message = message[: choice.randrange(len(message))]
        answer = client.raw(message)
        assert m.HEADER.unpack_from(answer)[0] == len(answer)
    assert (folder.parent / "secret").read_text() == "outside"
    client.server.close()


def test_fids_have_rules(client: Client) -> None:
    client.walk(0, 1, "file")
    assert _errno(client.walk, 0, 1, "sub") == errno.EINVAL, "in use"
    assert _errno(client.walk, 9, 10) == errno.EBADF
    client.open(1)
    assert _errno(client.open, 1) == errno.EBUSY
    assert _errno(client.walk, 1, 2) == errno.EBUSY
    client.call(m.TVERSION, m.number(8192, 4) + m.text(m.VERSION))
    assert _errno(client.read, 1) == errno.EBADF, "a new session has no fids"
    assert client.call(m.TVERSION, m.number(8192, 4) + m.text("9P2001.X"))[4:] == m.text("unknown")


def test_a_session_moves_with_its_state(client: Client, folder: Path) -> None:
    client.walk(0, 1, "sub", "other")
    client.open(1)
    client.walk(0, 2, "sub")
    copy = Server(str(folder))
    copy.restore(client.server.msize, client.server.save())
    moved = Client.__new__(Client)
    moved.server = copy
    assert moved.read(1) == b"below"
    assert moved.walk(2, 3, "deep") == 1
    copy.close()
