"""The network around a guest that is moved: a learning switch for `-netdev stream` plugs, with a host on it that answers ARP
and ICMP echo and calls the guest, so that it is known how long the guest was out of reach.

A thread of its own. Plugs come and go as VMs move: where a frame comes from is where its sender is.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

from protocol.codec.ethernet_stream import FrameReader, StreamError, header

HOST, GUEST = "10.77.0.1", "10.77.0.2"
_MAC = b"\x02\x00\x0a\x4d\x00\x01"
_BROADCAST = b"\xff" * 6
_ARP, _IP, _ICMP = 0x0806, 0x0800, 1


def _sum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Wire:
    """Listens on a Unix socket at `path`. close() ends it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._wake, theirs = socket.socketpair()
        self._selector.register(theirs, selectors.EVENT_READ, "end")
        self._end = theirs
        self._plugs: dict[socket.socket, FrameReader] = {}
        self._where: dict[bytes, socket.socket] = {}
        self._lock = threading.Lock()
        self.moves: list[tuple[float, bytes]] = []
        """(when, who): an address was heard from another plug than before."""
        self.replies: list[float] = []
        """When each answer to our calls came."""
        self._guest = b""
        self._calling = 0.0
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def _plug(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._plugs[sock] = FrameReader()
        self._selector.register(sock, selectors.EVENT_READ, "plug")

    def _unplug(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._plugs[sock]
        self._where = {mac: plug for mac, plug in self._where.items() if plug is not sock}
        sock.close()

    def _run(self) -> None:
        following = 0.0
        while True:
            timeout = None
            if self._calling:
                following = max(following, time.monotonic() - 0.1)
                timeout = max(0.0, following - time.monotonic())
            for key, _ in self._selector.select(timeout):
                if key.data == "end":
                    if not self._end.recv(64):
                        return
                elif key.data is None:
                    self._plug(self._listener.accept()[0])
                else:
                    self._hear(key.fileobj)  # type: ignore[arg-type]
            if self._calling and time.monotonic() >= following:
                following += self._calling
                self._call()

    def _hear(self, sock: socket.socket) -> None:
        reader = self._plugs[sock]
        try:
            count = sock.recv_into(reader.room())
            reader.received(count)
            if not count:
                raise ConnectionResetError
            for frame in reader.frames():
                self._frame(sock, bytes(frame))
        except (OSError, StreamError):
            self._unplug(sock)

    def _frame(self, sock: socket.socket, frame: bytes) -> None:
        target, sender = frame[:6], frame[6:12]
        if self._where.get(sender) is not sock:
            if sender in self._where or sender == self._guest:
                self.moves.append((time.monotonic(), sender))
            self._where[sender] = sock
        if target == _MAC or target[0] & 1:
            self._serve(sock, frame)
        if target[0] & 1:
            for other in [plug for plug in self._plugs if plug is not sock]:
                self._send(other, frame)
        elif (known := self._where.get(target)) is not None and known is not sock:
            self._send(known, frame)

    def _send(self, sock: socket.socket, frame: bytes) -> None:
        data = header(len(frame)) + frame
        with contextlib.suppress(OSError):  # who takes nothing loses it, as on any wire
            sent = sock.send(data)
            if sent < len(data):
                sock.settimeout(1)
                sock.sendall(data[sent:])
                sock.setblocking(False)

    # -- the host ----------------------------------------------------------------------------------

    def _serve(self, sock: socket.socket, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14], "big")
        ours = socket.inet_aton(HOST)
        if kind == _ARP and frame[20:22] == b"\0\1" and frame[38:42] == ours:
            reply = frame[6:12] + _MAC + frame[12:20] + b"\0\2" + _MAC + ours + frame[22:32]
            self._send(sock, reply.ljust(60, b"\0"))
        elif kind == _IP and frame[23] == _ICMP and frame[30:34] == ours:
            length = int.from_bytes(frame[16:18], "big")
            icmp = frame[34 : 14 + length]
            if icmp[0] == 8:
                body = b"\0\0\0\0" + icmp[4:]
                body = body[:2] + _sum(body).to_bytes(2, "big") + body[4:]
                packet = frame[14:26] + ours + frame[26:30]
                self._send(sock, frame[6:12] + _MAC + frame[12:14] + packet + body)
                self._guest = self._guest or frame[6:12]
            elif icmp[0] == 0:
                self.replies.append(time.monotonic())

    def _call(self) -> None:
        """An echo request to the guest, which has called us before."""
        plug = self._where.get(self._guest)
        if plug is None:
            return
        body = struct.pack(">BBHHH", 8, 0, 0, 7, len(self.replies) & 0xFFFF) + b"softkvm!"
        body = body[:2] + _sum(body).to_bytes(2, "big") + body[4:]
        packet = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, _ICMP, 0)
        packet += socket.inet_aton(HOST) + socket.inet_aton(GUEST)
        packet = packet[:10] + _sum(packet).to_bytes(2, "big") + packet[12:]
        self._send(plug, self._guest + _MAC + _IP.to_bytes(2, "big") + packet + body)

    def call_guest(self, interval: float) -> None:
        """Call it every `interval` seconds from now on; 0: no more. It has to have called us once."""
        self._calling = interval
        if interval:
            self.replies.clear()
        self._wake.send(b"x")

    @property
    def known(self) -> bool:
        """Whether the guest has called us."""
        return bool(self._guest)

    def longest_silence(self) -> float:
        """Seconds between two answers, the most there were since call_guest()."""
        times = list(self.replies)
        return max((later - earlier for earlier, later in pairwise(times)), default=0.0)

    def close(self) -> None:
        self._wake.shutdown(socket.SHUT_WR)
        self._thread.join(5)
        for sock in [*self._plugs, self._listener, self._wake, self._end]:
            sock.close()
        self._selector.close()
        self.path.unlink(missing_ok=True)
