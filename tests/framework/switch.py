"""A running `softkvm switch` for tests, and clients on it that speak with plain sockets."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from protocol.codec import switch_hello
from protocol.codec.switch_hello import Hello, Welcome
from qemu_user.switch.control import ask
from tests.framework.product import Product


class RunningSwitch:
    """`softkvm switch run NAME ARGUMENTS`, ready when made. A context manager."""

    def __init__(self, product: Product, *arguments: str, name: str = "lan") -> None:
        self.product, self.name = product, name
        self.process = product.start("switch", "run", name, *arguments)
        self.directory = product.runtime / "softkvm" / "switches" / name
        assert self.process.stderr is not None
        self.said = self.process.stderr.readline().decode()
        assert " runs" in self.said, self.said + self.process.stderr.read().decode()

    def __enter__(self) -> RunningSwitch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> int:
        """Its exit status."""
        self.process.terminate()
        return self.process.wait(60)

    def verb(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """softkvm switch ARGUMENTS."""
        return self.product.run("switch", *arguments)

    def show(self) -> dict[str, Any]:
        """What `softkvm switch show --json` prints, without starting it."""
        return dict(ask(str(self.directory / "control.sock"), "show", table=True))

    def port(self, name: str) -> dict[str, Any]:
        """A port's row in show."""
        return next(port for port in self.show()["ports"] if port["name"] == name)

    def until(self, port: str, seconds: float = 60, **wanted: object) -> dict[str, Any]:
        """Wait until a port is there whose row has these values."""
        end = time.monotonic() + seconds
        while True:
            rows = [row for row in self.show()["ports"] if row["name"] == port]
            if rows and all(rows[0][key] == value for key, value in wanted.items()):
                return dict(rows[0])
            assert time.monotonic() < end, f"port {port} is not {wanted}: {rows}"
            time.sleep(0.1)


class Client:
    """Somebody plugged in: on qemu.sock, or on port.sock under a name."""

    def __init__(self, switch: RunningSwitch, name: str = "", settings: str = "", path: str | Path = "") -> None:
        self.header = bool(name)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(60)
        self.socket.connect(str(path or switch.directory / ("port.sock" if name else "qemu.sock")))
        self.welcome = Welcome()
        if name:
            self.socket.sendall(switch_hello.pack(Hello(name=name, settings=settings)))
            head = self._exactly(8)
            welcome = switch_hello.unpack(head + self._exactly(struct.unpack(">I", head[4:])[0]), Welcome)
            assert welcome is not None
            self.welcome = welcome

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self.socket.recv(count - len(data))
            assert part, "hung up"
            data += part
        return data

    def send(self, *frames: bytes) -> None:
        """Frames without headers; those that the port wants are put in front."""
        head = bytes(12) if self.header else b""
        self.socket.sendall(b"".join(struct.pack(">I", len(head) + len(each)) + head + each for each in frames))

    def receive(self) -> bytes:
        """The next frame, without header."""
        (length,) = struct.unpack(">I", self._exactly(4))
        frame = self._exactly(length)
        return frame[12:] if self.header else frame

    def frames(self, count: int) -> Iterator[bytes]:
        return (self.receive() for _ in range(count))

    def hears_nothing(self, seconds: float = 0.3) -> bool:
        self.socket.settimeout(seconds)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(60)
