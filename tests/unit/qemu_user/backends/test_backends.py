"""Back ends over real files, sockets, pipes, pseudo-terminals and children, driven by a real I/O loop."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.codec.ethernet_stream import FrameReader, StreamError, header
from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.chardev import console_log
from qemu_user.backends.chardev.attach import Attachment, FrameError, keys_frames, size_frame
from qemu_user.backends.chardev.attach import FrameReader as AttachReader
from qemu_user.backends.chardev.chardev import NoFrontend
from qemu_user.backends.chardev.console_log import ConsoleLog, Follower
from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.chardev.escape import EscapeFilter
from qemu_user.backends.chardev.hub import Hub
from qemu_user.backends.chardev.pty import PtyChardev
from qemu_user.backends.chardev.unix_socket import SocketChardev
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.capture import CaptureFile
from qemu_user.backends.net.dgram import DgramNet, MulticastNet
from qemu_user.backends.net.dump import DumpedNet
from qemu_user.backends.net.passt import Child, Forward, PasstNet
from qemu_user.backends.net.restrict import allowed
from qemu_user.backends.net.stream import StreamNet


class Loop(IoLoop):
    """A loop that is turned by hand."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        super().__init__(self.errors.append)

    def until(self, done: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "it did not happen"
            self.turn(0.05)
        assert not self.errors


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


class Front(NoFrontend):
    """A device's side that remembers."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room, self.data, self.log = room, b"", list[str]()

    def input_room(self) -> int:
        return self.room

    def receive(self, data: bytes) -> None:
        assert len(data) <= self.room
        self.room -= len(data)
        self.data += data

    def output_ready(self) -> None:
        self.log.append("ready")

    def opened(self) -> None:
        self.log.append("opened")

    def closed(self) -> None:
        self.log.append("closed")

    def resized(self, rows: int, columns: int) -> None:
        self.log.append(f"{rows}x{columns}")


# -- the loop --------------------------------------------------------------------------------------


def test_loop_calls_and_survives_errors(loop: Loop, tmp_path: Path) -> None:
    seen: list[str] = []
    cancel = loop.call_later(0.01, lambda: seen.append("cancelled"))
    cancel()
    loop.call_later(0.02, lambda: seen.append("later"))
    loop.call_soon(lambda: 1 / 0)
    loop.call_soon(lambda: seen.append("soon"))
    end = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < end:
        loop.turn(0.05)
    assert seen == ["soon", "later"]
    assert [type(error) for error in loop.errors] == [ZeroDivisionError]
    loop.errors.clear()
    with (tmp_path / "f").open("w+b") as file:  # a regular file is always ready
        loop.add_reader(file.fileno(), lambda: (seen.append("file"), loop.remove(file.fileno())))
        loop.until(lambda: "file" in seen)


# -- disks -----------------------------------------------------------------------------------------


def test_raw_image(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"a" * 1000)
    disk = RawImage(str(path))
    assert disk.size == 1024
    buffer = bytearray(1024)
    disk.read(0, [memoryview(buffer)[:100], memoryview(buffer)[100:]])
    assert bytes(buffer) == b"a" * 1000 + bytes(24)
    disk.write(512, [memoryview(b"b" * 500), memoryview(b"c" * 12)])
    disk.zero(0, 512, unmap=True)
    disk.flush()
    assert path.read_bytes() == bytes(512) + b"b" * 500 + b"c" * 12
    with pytest.raises(BackendError, match="in use by another VM"):
        RawImage(str(path))
    with pytest.raises(BackendError, match="being written"):
        RawImage(str(path), readonly=True)
    disk.close()
    readers = [RawImage(str(path), readonly=True) for _ in range(2)]
    with pytest.raises(BackendError, match="in use"):
        RawImage(str(path))
    for reader in readers:
        reader.close()
    assert not os.get_inheritable(RawImage(str(path))._fd)


def test_punching_frees_space(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.write_bytes(b"x" * (4 << 20))
    disk = RawImage(str(path))
    before = path.stat().st_blocks
    disk.punch(0, 2 << 20)
    disk.close()
    assert path.stat().st_size == 4 << 20
    assert path.stat().st_blocks < before or not disk.discard


@pytest.mark.parametrize("what", ["missing", "directory", "empty"])
def test_bad_images(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "empty":
        path.touch()
    with pytest.raises(BackendError, match=str(path)):
        RawImage(str(path))


# -- characters ------------------------------------------------------------------------------------


def test_pipe_with_flow_control_and_end(loop: Loop) -> None:
    (input_read, input_write), (output_read, output_write) = os.pipe(), os.pipe()
    front = Front(room=3)
    chardev = DescriptorChardev("fd", input_read, output_write)
    chardev.connect(front)
    chardev.start(loop)
    os.write(input_write, b"abcdef")
    loop.until(lambda: front.data == b"abc")
    front.room = 100
    chardev.resume_input()
    loop.until(lambda: front.data == b"abcdef")
    os.close(input_write)
    loop.until(lambda: front.log == ["closed"])
    written = 0
    while taken := chardev.write(b"z" * 10000):  # the end of input does not end output
        written += taken
    loop.until(lambda: not loop.turn(0.01) and chardev.pending < 64 * 1024)
    while chardev.pending:
        os.read(output_read, 65536)
        loop.turn(0.01)
    assert "ready" in front.log
    hung: list[int] = []
    chardev.hung_up = lambda: hung.append(1)
    os.close(output_read)
    chardev.write(b"x")
    loop.until(lambda: hung)
    chardev.close()
    os.close(output_write)
    os.close(input_read)


def test_socket_server_takes_one_peer_after_another(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    front = Front()
    chardev = SocketChardev("s", path, server=True)
    chardev.connect(front)
    chardev.start(loop)
    for _ in range(2):
        front.log.clear()
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(path)
            loop.until(lambda: "opened" in front.log)
            peer.sendall(b"in")
            chardev.write(b"out")
            loop.until(lambda: front.data.endswith(b"in") and not chardev.pending)
            assert peer.recv(10) == b"out"
        loop.until(lambda: "closed" in front.log)
    chardev.close()
    assert not os.path.exists(path)
    with pytest.raises(BackendError, match="cannot connect"):
        SocketChardev("c", path, server=False)


def test_pty(loop: Loop) -> None:
    front = Front()
    chardev = PtyChardev("p")
    chardev.connect(front)
    chardev.start(loop)
    assert not chardev.is_open
    fd = os.open(chardev.path, os.O_RDWR | os.O_NOCTTY)
    loop.until(lambda: "opened" in front.log)
    os.write(fd, b"keys")
    loop.until(lambda: front.data == b"keys")
    chardev.write(b"shown")
    loop.until(lambda: not chardev.pending)
    assert os.read(fd, 100) == b"shown"
    os.close(fd)
    loop.until(lambda: "closed" in front.log)
    chardev.close()


def test_hub_shares_a_console(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "console.sock")
    hub = Hub("console", None, path)
    first, second = Front(), Front(room=2)
    for front, name in ((first, "ttyS0"), (second, "hvc0")):
        hub.channel(name).connect(front)
    hub.start(loop)
    serial, virtual = hub._channels
    serial.write(b"boot\n")
    attachment = Attachment(path)
    attachment.resize(40, 132)
    attachment.send(b"to serial")
    loop.until(lambda: first.data == b"to serial" and first.log == ["40x132"])
    assert attachment.receive() == b"boot\n"
    virtual.write(b"prompt$ ")
    attachment.send(b"long")
    loop.until(lambda: second.data == b"lo")
    second.room = 10
    virtual.resume_input()
    loop.until(lambda: second.data == b"long")
    loop.until(lambda: not hub._attached[0].pending)
    assert attachment.receive() == b"prompt$ "
    other = Attachment(path)
    loop.until(lambda: len(hub._attached) == 2)
    loop.until(lambda: not hub._attached[1].pending)
    assert other.receive() == b"boot\nprompt$ "
    other._socket.sendall(b"\xff\xff\xff nonsense")
    loop.until(lambda: len(hub._attached) == 1)
    hub.close()
    assert attachment.receive() == b""
    assert not os.path.exists(path)


def test_a_slow_terminal_holds_the_guest_back_a_stopped_one_is_dropped(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu_user.backends.chardev.hub.STALL_SECONDS", 0.4)
    hub = Hub("console", None, str(tmp_path / "console.sock"))
    front = Front()
    hub.channel("hvc0").connect(front)
    hub.start(loop)
    (channel,) = hub._channels
    slow, stopped = (Attachment(str(tmp_path / "console.sock")) for _ in range(2))
    loop.until(lambda: len(hub._attached) == 2)
    data = bytes(range(256)) * 4096
    slow._socket.setblocking(False)
    got, sent = b"", 0
    end = time.monotonic() + 60
    while len(got) < len(data):
        assert time.monotonic() < end
        taken = channel.write(data[sent : sent + 50_000])
        sent += taken
        loop.turn(0.01)
        with contextlib.suppress(BlockingIOError):
            got += slow._socket.recv(20_000)
    assert got == data
    assert len(hub._attached) == 1, "the one that took nothing was dropped"
    assert "ready" in front.log
    hub.close()
    slow.close()
    stopped.close()


def test_console_log(loop: Loop, tmp_path: Path) -> None:
    path = console_log.begin(tmp_path / "logs", "vm", frozenset())
    hub = Hub("console")
    hub.log = ConsoleLog(str(path), limit=1000)
    channel = hub.channel("hvc0")
    hub.start(loop)
    assert not path.exists(), "no output, no file"
    channel.write(b"first\n")
    loop.until(path.exists)
    follower = Follower(path)
    assert follower.past() == b"first\n"
    for number in range(40):
        channel.write(b"%040d\n" % number)
        loop.until(lambda: not hub.log or not hub.log._pending)
    seen = b""
    while data := follower.more():
        seen += data
    assert seen.endswith(b"%040d\n" % 39)
    hub.close()
    past = Follower(path).past()
    assert past is not None
    assert past.endswith(b"%040d\n" % 39)
    assert 1000 < len(past) <= 2000
    assert path.stat().st_mode & 0o777 == 0o600
    for number in range(40):
        other = console_log.begin(tmp_path / "logs", f"other{number}", frozenset(("vm",)))
        other.write_text("x")
        os.utime(other, (time.time() - 100 + number,) * 2)
    left = {file.stem for file in (tmp_path / "logs").glob("*.console")}
    assert "vm" in left, "the log of a VM that runs stays"
    assert len(left) == 1 + console_log.KEPT
    assert "other0" not in left
    console_log.begin(tmp_path / "logs", "vm", frozenset(("vm",)))
    assert not path.exists(), "a new VM begins a new log"


def test_a_log_that_cannot_be_written_harms_nothing(loop: Loop, tmp_path: Path) -> None:
    hub = Hub("console")
    hub.log = ConsoleLog(str(tmp_path / "nowhere" / "x"))
    channel = hub.channel("hvc0")
    hub.start(loop)
    for _ in range(3):
        assert channel.write(b"x" * 300_000) == 300_000
    hub.close()


def test_attach_frames_in_pieces() -> None:
    reader = AttachReader()
    stream = keys_frames(b"k" * 70000) + size_frame(24, 80) + keys_frames(b"x")
    keys, sizes = b"", []
    for at in range(0, len(stream), 1000):
        got, size = reader.feed(stream[at : at + 1000])
        keys += got
        sizes += [size] if size else []
    assert keys == b"k" * 70000 + b"x"
    assert sizes == [(24, 80)]
    with pytest.raises(FrameError):
        reader.feed(b"\7\0\0")


def test_escape_keys() -> None:
    escape = EscapeFilter()
    assert escape.feed(b"plain\x03") == (b"plain\x03", "")
    assert escape.feed(b"\x01") == (b"", "")
    assert escape.feed(b"\x01b") == (b"\x01b", "")
    assert escape.feed(b"\x01h") == (b"", "help")
    assert escape.feed(b"a\x01xb") == (b"a", "quit")


# -- networks --------------------------------------------------------------------------------------


class NetFront:
    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.full = False
        self.log: list[str] = []

    def receive(self, frame: memoryview) -> bool:
        if self.full:
            return False
        self.frames.append(bytes(frame))
        return True

    def sent(self) -> None:
        self.log.append("sent")

    def link(self, up: bool) -> None:
        self.log.append("up" if up else "down")


def test_frame_reader_cuts_anywhere_and_refuses_nonsense() -> None:
    frames = [os.urandom(size) for size in (14, 1500, 65535, 60, 1)]
    stream = b"".join(header(len(frame)) + frame for frame in frames)
    reader, found = FrameReader(), []
    for at in range(0, len(stream), 777):
        reader.feed(stream[at : at + 777])
        found += [bytes(frame) for frame in reader.frames()]
    assert found == frames
    for bad in (0, 0xFFFFFFFF, 70000):
        reader = FrameReader()
        reader.feed(struct.pack(">I", bad))
        with pytest.raises(StreamError):
            list(reader.frames())


def test_two_streams_joined(loop: Loop, tmp_path: Path) -> None:
    path = str(tmp_path / "wire")
    server, client = StreamNet("a", path, server=True), StreamNet("b", path, server=False)
    one, two = NetFront(), NetFront()
    server.connect(one)
    client.connect(two)
    server.start(loop)
    client.start(loop)
    loop.until(lambda: server.is_up)
    frames = [os.urandom(9000) for _ in range(400)]
    waiting = list(frames)
    two.full = True
    while waiting and server.send([memoryview(waiting[0])[:14], memoryview(waiting[0])[14:]]):
        waiting.pop(0)
        loop.turn(0)
    two.full = False
    client.resume()
    while len(two.frames) < 400:
        loop.turn(0.01)
        while waiting and server.send([memoryview(waiting[0])]):
            waiting.pop(0)
        client.resume()
    assert two.frames == frames
    client.close()
    loop.until(lambda: one.log[-1] == "down")
    server.close()
    assert not os.path.exists(path)
    with pytest.raises(BackendError, match="nobody listens"):
        StreamNet("c", path, server=False).start(loop)


def test_streams_over_tcp_come_back(loop: Loop) -> None:
    """A client with reconnect= finds its server again; frames survive the byte stream's pieces."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    client = StreamNet("b", "", server=False, reconnect=0.1, inet=("127.0.0.1", port))
    two = NetFront()
    client.connect(two)
    client.start(loop)
    assert not client.is_up
    for _ in range(2):
        server = StreamNet("a", "", server=True, inet=("127.0.0.1", port))
        one = NetFront()
        server.connect(one)
        server.start(loop)
        loop.until(lambda server=server: client.is_up and server.is_up)  # type: ignore[misc]
        frame = os.urandom(65000)
        assert client.send([memoryview(frame)])
        loop.until(lambda one=one: one.frames)  # type: ignore[misc]
        assert one.frames == [frame]
        with pytest.raises(BackendError, match=f"cannot listen on 127.0.0.1:{port}"):
            StreamNet("c", "", server=True, inet=("127.0.0.1", port)).start(loop)
        server.close()
        loop.until(lambda: not client.is_up)
    client.close()
    with pytest.raises(BackendError, match=f"nobody listens on 127.0.0.1:{port}"):
        StreamNet("d", "", server=False, inet=("127.0.0.1", port)).start(loop)


def test_datagrams(loop: Loop, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    ports = []
    for _ in range(2):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(("127.0.0.1", int(probe.getsockname()[1])))
    for here, there in ((a, b), (ports[0], ports[1])):
        one, two = DgramNet("a", here, there), DgramNet("b", there, here)
        front, other = NetFront(), NetFront()
        one.connect(front)
        two.connect(other)
        one.start(loop)
        assert one.send([memoryview(b"lost: nobody is there")])
        two.start(loop)
        frames = [os.urandom(size) for size in (60, 1514, 9000)]
        for frame in frames:
            assert one.send([memoryview(frame)[:14], memoryview(frame)[14:]])
        loop.until(lambda other=other: len(other.frames) == 3)  # type: ignore[misc]
        assert other.frames == frames
        other.full = True
        two_sent = 0
        while one.send([memoryview(frames[2])]) and two_sent < 2000:
            two_sent += 1
            loop.turn(0)
        if two_sent < 2000:  # Unix: the sender is told; UDP drops
            loop.until(lambda front=front: "sent" in front.log)  # type: ignore[misc]
        one.close()
        two.close()
    assert not os.path.exists(a)
    with pytest.raises(BackendError, match="cannot bind"):
        DgramNet("x", "/nonexistent/a", a).start(loop)


def test_multicast_is_heard_by_others_only(loop: Loop) -> None:
    fronts, nets = [NetFront() for _ in range(3)], []
    for front in fronts:
        net = MulticastNet("m", ("230.17.3.9", 12345), "127.0.0.1")
        net.connect(front)
        try:
            net.start(loop)
        except BackendError as error:
            pytest.skip(str(error))
        nets.append(net)
    frame = os.urandom(100)
    nets[0].send([memoryview(frame)])
    loop.until(lambda: fronts[1].frames and fronts[2].frames)
    nets[1].send([memoryview(frame)])
    loop.until(lambda: fronts[0].frames)
    assert [front.frames for front in fronts[:2]] == [[frame], [frame]]
    for net in nets:
        net.close()


def test_filter_dump_records_both_ways(loop: Loop, tmp_path: Path) -> None:
    path, file = str(tmp_path / "wire"), tmp_path / "x.pcap"
    server = DumpedNet(StreamNet("a", path, server=True, virtio_header=True), str(file), 100)
    client = StreamNet("b", path, server=False)
    one, two = NetFront(), NetFront()
    server.connect(one)
    client.connect(two)
    server.start(loop)
    client.start(loop)
    loop.until(lambda: server.is_up)
    assert one.log == ["up"]
    sent, came = bytes(12) + os.urandom(60), bytes(12) + os.urandom(500)
    assert server.send([memoryview(sent)])
    one.full = True
    client.send([memoryview(came)])
    loop.turn(0.05)
    one.full = False
    server.resume()
    loop.until(lambda: one.frames and two.frames)
    server.close()
    client.close()
    records, at = [], 24
    data = file.read_bytes()
    assert data[:24] == struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 100, 1)
    while at < len(data):
        seconds, _, kept, length = struct.unpack_from("<IIII", data, at)
        assert abs(seconds - time.time()) < 60
        records.append((data[at + 16 : at + 16 + kept], length))
        at += 16 + kept
    assert records == [(sent[12:], 60), (came[12:112], 500)], "each frame once, its header left out"
    with pytest.raises(BackendError, match="cannot write"):
        DumpedNet(server, "/nonexistent/x", 100)


def test_a_capture_never_blocks(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    with pytest.raises(BackendError, match="cannot write"):  # nobody reads it
        CaptureFile(fifo, b"head", "test")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    capture, warnings = CaptureFile(fifo, b"head", "test"), list[str]()
    capture.warn = warnings.append
    for _ in range(3000):
        capture.write(b"r" * 1000)
    assert capture.dropped > 1000
    seen = os.read(reader, 1 << 20)
    assert seen.startswith(b"head")
    capture.flush()
    os.close(reader)
    capture.flush()
    assert not capture.is_open
    assert "has ended" in warnings[0]
    capture.write(b"more")
    capture.close()
    full = CaptureFile("/dev/full", b"", "test")
    full.warn = warnings.append
    full.write(b"x")
    full.flush()
    assert "No space" in warnings[-1]


def test_forwarding_rules() -> None:
    assert Forward.parse("tcp::2222-:22").option() == ["-t", "2222:22"]
    assert Forward.parse("udp:127.0.0.1:53-10.0.2.15:53").option() == ["-u", "127.0.0.1/53:53"]
    assert Forward.parse(":[::1]:80-:80").option() == ["-t", "::1/80:80"]
    for bad in ("2222:22", "tcp::0-:22", "tcp::1-:99999", "sctp::1-:1"):
        with pytest.raises(BackendError):
            Forward.parse(bad)


def test_missing_passt_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(BackendError, match="apt install passt"):
        PasstNet("n")


@pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)")
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_in_use_is_told(loop: Loop, kind: int) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        protocol, port = "tcp" if kind == socket.SOCK_STREAM else "udp", taken.getsockname()[1]
        net = PasstNet("n", (f"{protocol}:127.0.0.1:{port}-:22",))
        with pytest.raises(BackendError, match=f"netdev n: {protocol} port 127.0.0.1:{port} of the host is in use already"):
            net.start(loop)
        net.close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)")
def test_who_arrives_waits_for_its_sources_ports(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_user.backends.net.passt._PORTS_SECONDS", 0.5)
    front, warnings = NetFront(), list[str]()
    with socket.create_server(("127.0.0.1", 0)) as source:
        port = source.getsockname()[1]
        net, other = (PasstNet("n", (f"tcp:127.0.0.1:{port}-:22",)) for _ in range(2))
        for each in (net, other):
            each.arriving = True
            each.warn = warnings.append
            each.start(loop)
        net.connect(front)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            loop.turn(0.05)
        assert not net.is_up
        assert net.send([memoryview(bytes(60))]), "it runs here now"
        loop.until(lambda: net.is_up)
        assert len(warnings) == 1
        assert f"port 127.0.0.1:{port} of the host is in use already" in warnings[0]
        assert not other.is_up
    loop.until(lambda: other.is_up)  # the source is gone
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < end
            loop.turn(0.05)
    assert len(warnings) == 1
    net.close()
    other.close()


@pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)")
def test_passt_is_started_again(loop: Loop) -> None:
    front, warnings = NetFront(), list[str]()
    net = PasstNet("n")
    net.warn = warnings.append
    net.connect(front)
    net.start(loop)
    for death in range(1, 5):
        assert isinstance(net._child, Child)
        child = net._child.pid
        os.kill(child, signal.SIGKILL)
        loop.until(lambda death=death: len(warnings) == death)  # type: ignore[misc]
        assert front.log[-1] == "down"
        assert not os.path.exists(f"/proc/{child}")
        if death < 4:
            assert "it is started again" in warnings[-1]
            loop.until(lambda: front.log[-1] == "up")
            assert net.is_up
    assert warnings[-1].endswith("the guest has no network any more"), "not for ever"
    net.close()
    assert net._child is None


def test_restrict_lets_answers_out_only() -> None:
    def ipv4(protocol: int, rest: bytes, fragment: int = 0) -> bytes:
        return bytes(12) + b"\x08\0" + struct.pack(">BBHHHBBH8x", 0x45, 0, 20 + len(rest), 0, fragment, 64, protocol, 0) + rest

    def ipv6(protocol: int, rest: bytes) -> bytes:
        return bytes(12) + b"\x86\xdd" + struct.pack(">IHBB32x", 6 << 28, len(rest), protocol, 64) + rest

    def tcp(flags: int) -> bytes:
        return struct.pack(">HHIIBBHHH", 22, 5, 0, 0, 0x50, flags, 0, 0, 0)

    def udp(source: int, target: int) -> bytes:
        return struct.pack(">HHHH", source, target, 8, 0)

    good = [
        bytes(12) + b"\x08\x06" + bytes(28), bytes(12) + b"\x80\x35" + bytes(46),
        ipv4(6, tcp(0x12)), ipv4(6, tcp(0x10)), ipv4(6, tcp(0x04)), ipv6(6, tcp(0x12)),
        ipv4(17, udp(68, 67)), ipv4(17, udp(53, 999)), ipv6(17, udp(546, 547)), ipv4(1, bytes(8)), ipv6(58, b"\x87" + bytes(8)),
        ipv6(0, b"\x3a\0\x05\x02\0\0\x01\0" + b"\x8f" + bytes(8)),
    ]  # fmt: skip
    bad = [
        ipv4(6, tcp(0x02)), ipv6(6, tcp(0xC2)), ipv4(17, udp(999, 53)), ipv4(17, udp(67, 68)), ipv4(1, b"\x08" + bytes(8)),
        ipv6(58, b"\x80" + bytes(8)), ipv4(6, tcp(0x10), 100), ipv4(47, bytes(20)), bytes(12) + b"\x81\0" + bytes(50),
        ipv4(6, b"short"), b"", bytes(20), ipv6(44, bytes(20)),
    ]  # fmt: skip
    assert [allowed(frame, frozenset((53,))) for frame in good] == [True] * len(good)
    assert [allowed(frame, frozenset((53,))) for frame in bad] == [False] * len(bad)


@pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt (apt install passt)")
def test_passt_answers_dhcp_and_is_reaped(loop: Loop) -> None:
    front = NetFront()
    net = PasstNet("n")
    net.connect(front)
    net.start(loop)
    assert isinstance(net._child, Child)
    child = net._child.pid
    mac = b"\x52\x54\0\0\0\1"
    discover = struct.pack("!BBBBIHHIIII16s64s128sI", 1, 1, 6, 0, 7, 0, 0x8000, 0, 0, 0, 0, mac, b"", b"", 0x63825363)
    discover += b"\x35\1\1\xff"
    udp = struct.pack("!HHHH", 68, 67, 8 + len(discover), 0) + discover
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:]
    frame = b"\xff" * 6 + mac + b"\x08\0" + head + udp
    assert net.send([memoryview(frame)])
    with contextlib.suppress(AssertionError):
        loop.until(lambda: any(f[23:24] == b"\x11" and f[36:38] == b"\0\x44" for f in front.frames), 3)
    net.close()
    assert any(f[36:38] == b"\0\x44" for f in front.frames), "no DHCP offer"
    assert not os.path.exists(f"/proc/{child}")
