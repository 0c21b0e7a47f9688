"""`-object filter-dump`: a network's frames into a pcap file, both ways, without virtio-net headers. Stands between the device
and the back end; neither notices.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.codec.pcap import pcap_packet
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.net.backend import NetBackend, NetFrontend
from qemu_user.backends.net.capture import now_ns, pcap_file

_HEADER = 12
_FLUSH_SECONDS = 0.2


class DumpedNet(NetBackend):
    """`inner`: the back end; `longest`: bytes kept of a frame. BackendError if the file cannot be made."""

    def __init__(self, inner: NetBackend, path: str, longest: int) -> None:
        self._inner, self._longest = inner, longest
        self._file = pcap_file(path, f"netdev {inner.name}", longest)
        self._skipped = _HEADER if inner.virtio_header else 0
        self._loop: IoLoop | None = None
        self._waits = False
        super().__init__(inner.name)
        self.mtu, self.virtio_header, self.trusted = inner.mtu, inner.virtio_header, inner.trusted

    @property
    def is_up(self) -> bool:  # type: ignore[override]
        return self._inner.is_up

    @property
    def warn(self) -> Callable[[str], None]:
        return self._inner.warn

    @warn.setter
    def warn(self, tell: Callable[[str], None]) -> None:
        self._inner.warn = self._file.warn = tell

    def connect(self, frontend: NetFrontend) -> None:
        self.frontend = frontend
        self._inner.connect(self)

    def start(self, loop: IoLoop) -> None:
        self._loop = loop
        self._inner.arriving = self.arriving
        self._inner.start(loop)

    # -- the device's side -------------------------------------------------------------------------

    def send(self, frame: list[memoryview]) -> bool:
        taken = self._inner.send(frame)
        if taken:
            self._record(b"".join(frame))
        return taken

    def set_offloads(self, features: int) -> None:
        self._inner.set_offloads(features)

    def resume(self) -> None:
        self._inner.resume()

    # -- the back end's side -----------------------------------------------------------------------

    def receive(self, frame: memoryview) -> bool:
        taken = self.frontend.receive(frame)
        if taken:
            self._record(bytes(frame))
        return taken

    def sent(self) -> None:
        self.frontend.sent()

    def link(self, up: bool) -> None:
        self.frontend.link(up)

    def _record(self, frame: bytes) -> None:
        data = frame[self._skipped :]
        self._file.write(pcap_packet(now_ns(), data[: self._longest], len(data)))
        if not self._waits and self._loop is not None:
            self._waits = True
            self._loop.call_later(_FLUSH_SECONDS, self._flush)

    def _flush(self) -> None:
        self._waits = False
        self._file.flush()

    def close(self) -> None:
        self._inner.close()
        self._file.close()
