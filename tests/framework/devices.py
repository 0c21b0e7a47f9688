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
from qemu_user.backends.share.server import Server
from qemu_user.backends.vsock.unix import UnixVsock
from qemu_user.devices.device import Device
from qemu_user.devices.goldfish_rtc import GoldfishRtc
from qemu_user.devices.ns16550a import Ns16550a
from qemu_user.devices.pci.host import IO, MEMORY32, MEMORY64, PciHost, Window
from qemu_user.devices.pflash import BANK_SIZE, Bank, Pflash
from qemu_user.devices.plic import Plic
from qemu_user.devices.syscon import Syscon
from qemu_user.devices.virtio.balloon import VirtioBalloon
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.mmio import VirtioMmio
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.p9 import VirtioP9
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.vsock import VirtioVsock
from qemu_user.devices.vmgenid import VmGenId
from tests.framework.virtio_driver import Driver, Line, PciDriver, make_memory


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


class Vector:
    """An MSI that remembers."""

    def __init__(self) -> None:
        self.message = (0, 0)
        self.fired: list[tuple[int, int]] = []

    def route(self, address: int, data: int) -> None:
        self.message = address, data

    def fire(self) -> None:
        self.fired.append(self.message)

    def prepare(self) -> None:
        pass


class Bench:
    """What devices are wired to. `transport`: what virtio() puts before a device, "mmio" or "pci"."""

    def __init__(self, tmp_path: Path, transport: str = "mmio") -> None:
        self.tmp_path, self.transport = tmp_path, transport
        self.vectors: list[Vector] = []
        self.wires = [Line() for _ in range(4)]
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

    def host(self) -> PciHost:
        """A PCI host bridge with windows as the machine's."""
        windows = [
            Window("io", IO, 0x0300_0000, 0, 0x1_0000),
            Window("memory", MEMORY32, 0x4000_0000, 0x4000_0000, 0x4000_0000),
            Window("high", MEMORY64, 0x4_0000_0000, 0x4_0000_0000, 0x4_0000_0000),
        ]
        return PciHost("pcie", windows, list(self.wires), [[32 + pin, 4] for pin in range(4)], 1, 2)

    def vector(self) -> Vector:
        self.vectors.append(Vector())
        return self.vectors[-1]

    def virtio(self, device: VirtioDevice) -> VirtioMmio | VirtioPci:
        if self.transport == "pci":
            function = VirtioPci(device.name, self.memory, device, self.vector)
            self.bridge = self.host()
            self.bridge.attach(function, 1)
            return function
        return VirtioMmio(device.name, self.line, self.memory, device)

    def driver(self, transport: VirtioMmio | VirtioPci) -> Driver:
        if isinstance(transport, VirtioPci):
            return PciDriver(transport, self.memory, self.bridge)
        return Driver(transport, self.memory)

    @property
    def interrupts(self) -> int:
        """How often a virtio device has interrupted."""
        return self.line.asserted + sum(len(vector.fired) for vector in self.vectors)


def _plic(bench: Bench) -> Device:
    plic = Plic("plic", 2, bench.outputs.__setitem__, [1, 2])
    return plic


def _pflash(bench: Bench) -> Device:
    banks = [Bank(memoryview(bytearray(BANK_SIZE)), None), Bank(memoryview(bytearray(BANK_SIZE)), None)]
    return Pflash("flash", banks)


BUILDERS: dict[str, Callable[[Bench], Device]] = {
    "ns16550a": lambda b: Ns16550a("uart", b.line, Chardev("null")),
    "goldfish_rtc": lambda b: GoldfishRtc("rtc", b.line, b.timers, lambda: b.now),
    "syscon": lambda b: Syscon("test", lambda what, status: b.power.append((what, status))),
    "plic": _plic,
    "pflash": _pflash,
    "virtio_mmio": lambda b: VirtioMmio("empty", b.line, b.memory),
    "pci_host": lambda b: b.host(),
    "vmgenid": lambda b: VmGenId("vmgenid", b.line, bytes(range(16))),
    "virtio_pci": lambda b: VirtioPci("disk", b.memory, VirtioBlk("disk", b.image()), b.vector),
    "virtio-blk": lambda b: b.virtio(VirtioBlk("disk", b.image(), "serial-1")),
    "virtio-net": lambda b: b.virtio(VirtioNet("net", NetBackend("none"), b"\x52\x54\0\x12\x34\x56")),
    "virtio-9p": lambda b: b.virtio(VirtioP9("share", "tag", Server(str(b.tmp_path)))),
    "virtio-vsock": lambda b: b.virtio(VirtioVsock("vsock", 3, UnixVsock(str(b.tmp_path / "vsock")))),
    "virtio-balloon": lambda b: b.virtio(VirtioBalloon("balloon", b.memory)),
    "virtio-rng": lambda b: b.virtio(VirtioRng("rng")),
    "virtio-serial": lambda b: b.virtio(
        VirtioConsole("console", [(0, "", Chardev("a")), (1, "org.softkvm.stdin", Chardev("b"))])
    ),
}


@dataclass
class MemoryChardev(Chardev):
    """A chardev that keeps what it gets, takes as much as `takes` says, and is fed by hand."""

    takes: int = 1 << 20
    taken: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        super().__init__("memory")
        self.resumed = 0

    def room(self, last: bool = False) -> int:
        return 1 << 20 if last else self.takes

    def write(self, data: bytes | bytearray | memoryview, last: bool = False) -> int:
        count = len(data) if last else min(len(data), self.takes)
        self.taken += data[:count]
        self.takes = max(0, self.takes - count)
        return count

    def resume_input(self) -> None:
        self.resumed += 1

    def feed(self, data: bytes) -> int:
        """Offer input; returns how much the device took."""
        count = min(len(data), self.frontend.input_room())
        if count:
            self.frontend.receive(data[:count])
        return count
