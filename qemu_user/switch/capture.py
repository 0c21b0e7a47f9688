"""Recording what crosses the switch as pcapng: of chosen ports both directions, of all ports each frame as it came in."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.codec import pcap
from qemu_user.backends.net.capture import DEFAULT_LONGEST, CaptureFile, now_ns
from qemu_user.devices.virtio.net_offload import SIZE as HEADER_SIZE
from qemu_user.switch.port import Piece, Port, split

FLUSH_SECONDS = 0.2


class Capture:
    """`ports`: names, none for all. The switch tells it of ports and flushes it now and then. BackendError."""

    def __init__(self, path: str, ports: Sequence[str] = ()) -> None:
        self.ports = tuple(ports)
        self.file = CaptureFile(path, pcap.pcapng_section(), "capture")
        self._interfaces: dict[str, int] = {}

    def wants(self, port: Port) -> bool:
        """Whether a port is recorded."""
        return not self.ports or port.name in self.ports

    def inbound(self, port: Port, span: memoryview) -> None:
        """Frames came from who is plugged in."""
        self._record(port, [span], pcap.INBOUND)

    def outbound(self, port: Port, pieces: Sequence[Piece]) -> None:
        """Frames go to who is plugged in."""
        if self.ports:
            self._record(port, pieces, pcap.OUTBOUND)

    def _record(self, port: Port, pieces: Sequence[Piece], direction: int) -> None:
        number = self._interfaces.get(port.name)
        if number is None:
            number = self._interfaces[port.name] = len(self._interfaces)
            self.file.write(pcap.pcapng_interface(port.name, DEFAULT_LONGEST))
            self.file.frames -= 1
        time = now_ns()
        skipped = HEADER_SIZE if port.header else 0
        for frame in split(pieces):
            data = b"".join(frame)[skipped:]
            self.file.write(pcap.pcapng_packet(number, time, data[:DEFAULT_LONGEST], len(data), direction))
