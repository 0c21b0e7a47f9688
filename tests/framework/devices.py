"""Every device of the machine, built and wired as in the machine but to wires that remember: for the
contract tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.net.backend import NetBackend
from qemu_user.devices.device import Device
from qemu_user.devices.goldfish_rtc import GoldfishRtc
from qemu_user.devices.ns16550a import Ns16550a
from qemu_user.devices.plic import Plic
from qemu_user.devices.syscon import Syscon
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.mmio import VirtioMmio
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.rng import VirtioRng
from tests.framework.virtio_driver import Driver, Line, make_memory


class StoppedTimers:
    """Timers that never fire by themselves; what is armed is remembered."""

    def __init__(self) -> None:
        self.armed: list[list[Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        cell = [callback]
        self.armed.append(cell)
        return cell.clear

    def fire(self) -> None:
        armed, self.armed = self.armed, []
        for cell in armed:
            for callback in cell:
                callback()


class Bench:
    """What devices are wired to."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.line = Line()
        self.timers = StoppedTimers()
        self.memory, self.mapping = make_memory()
        self.power: list[tuple[str, int]] = []
        self.outputs: dict[int, bool] = {}
        self._open: dict[str, RawImage] = {}
        self.now = 1_700_000_000_123_456_789

    def image(self, name: str = "disk", size: int = 1 << 20, **options: Any) -> RawImage:
        if name in self._open:
            self._open[name].close()  # its lock would be in the way
        path = self.tmp_path / name
        if not path.exists():
            path.write_bytes(bytes(range(256)) * (size // 256))
        self._open[name] = RawImage(str(path), **options)
        return self._open[name]

    def virtio(self, device: VirtioDevice) -> VirtioMmio:
        return VirtioMmio(device.name, self.line, self.memory, device)

    def driver(self, transport: VirtioMmio) -> Driver:
        return Driver(transport, self.memory)


def _plic(bench: Bench) -> Device:
    plic = Plic("plic", 2, bench.outputs.__setitem__, [1, 2])
    return plic


BUILDERS: dict[str, Callable[[Bench], Device]] = {
    "ns16550a": lambda b: Ns16550a("uart", b.line, Chardev("null")),
    "goldfish_rtc": lambda b: GoldfishRtc("rtc", b.line, b.timers, lambda: b.now),
    "syscon": lambda b: Syscon("test", lambda what, status: b.power.append((what, status))),
    "plic": _plic,
    "virtio_mmio": lambda b: VirtioMmio("empty", b.line, b.memory),
    "virtio-blk": lambda b: b.virtio(VirtioBlk("disk", b.image(), "serial-1")),
    "virtio-net": lambda b: b.virtio(VirtioNet("net", NetBackend("none"), b"\x52\x54\0\x12\x34\x56")),
    "virtio-rng": lambda b: b.virtio(VirtioRng("rng")),
    "virtio-serial": lambda b: b.virtio(
        VirtioConsole("console", [(0, "", Chardev("a")), (1, "org.softkvm.stdin", Chardev("b"))])
    ),
}


@dataclass
class MemoryChardev(Chardev):
    """A chardev that keeps what it gets, takes as much as `room` says, and is fed by hand."""

    room: int = 1 << 20
    taken: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        super().__init__("memory")
        self.resumed = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        count = min(len(data), self.room)
        self.taken += data[:count]
        self.room -= count
        return count

    def resume_input(self) -> None:
        self.resumed += 1

    def feed(self, data: bytes) -> int:
        """Offer input; returns how much the device took."""
        count = min(len(data), self.frontend.input_room())
        if count:
            self.frontend.receive(data[:count])
        return count
