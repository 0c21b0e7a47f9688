"""Virtio devices under a driver that is out of its mind: one device, one transport (virtio-mmio or virtio-pci), one seed.

A case brings the device up as the specification says (virtio 1.2, section 3.1), fills its rings with nonsense that looks like
requests, kicks, and reads and writes registers at random: virtio-mmio's, or a PCI function's configuration space through the
ECAM, its BARs and its MSI-X table. A device may answer with DEVICE_NEEDS_RESET; it may not raise, hang, or fail to come up
again after a reset; and the state it saves must be one that it takes back. Used by devices.py.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Protocol

from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.net.backend import NetBackend
from qemu_user.backends.share.server import Server
from qemu_user.backends.vsock.unix import UnixVsock
from qemu_user.devices.device import StateError, decode_state, encode_state
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.pci import config_space
from qemu_user.devices.pci.host import IO, MEMORY32, MEMORY64, PciHost, Window
from qemu_user.devices.virtio import mmio, pci, transport
from qemu_user.devices.virtio.balloon import VirtioBalloon
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import F_VERSION_1, VirtioDevice
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.p9 import VirtioP9
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.vsock import VirtioVsock

RAM, RAM_SIZE = 0x80000000, 1 << 20
_RING = 0x8000
"""Bytes of RAM that each queue's rings take."""
_BUFFERS = RAM + 0x80000
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_LENGTHS = (0, 1, 4, 8, 12, 16, 44, 512, 4096, 65536, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)
_HIGH = 0x4_0000_0000

Builder = Callable[[Path, GuestMemory, ExitStack], VirtioDevice]
"""Directory for files, RAM, and what closes the back end when the case is over."""


def _disk(directory: Path, end: ExitStack) -> RawImage:
    path = directory / "disk"
    if not path.exists():
        path.write_bytes(bytes(1 << 20))
    image = RawImage(str(path))
    end.callback(image.close)
    return image


def _share(directory: Path, end: ExitStack) -> Server:
    server = Server(str(directory))
    end.callback(server.close)
    return server


def _vsock_host(directory: Path, end: ExitStack) -> UnixVsock:
    host = UnixVsock(str(directory / "vsock"))
    end.callback(host.close)
    return host


BUILDERS: dict[str, Builder] = {
    "blk": lambda d, m, e: VirtioBlk("disk", _disk(d, e), "serial", queues=2),
    "net": lambda d, m, e: VirtioNet("net", NetBackend("none"), b"\x52\x54\0\x12\x34\x56", pairs=2),
    "serial": lambda d, m, e: VirtioConsole("console", [(0, "", Chardev("a")), (1, "port", Chardev("b"))]),
    "rng": lambda d, m, e: VirtioRng("rng"),
    "9p": lambda d, m, e: VirtioP9("share", "tag", _share(d, e)),
    "vsock": lambda d, m, e: VirtioVsock("vsock", 3, _vsock_host(d, e)),
    "balloon": lambda d, m, e: VirtioBalloon("balloon", m),
}
"""Every virtio device, by its name in qemu_user.devices.virtio.catalogue.DEVICES."""


def _blk(rng: Random) -> bytes:
    """type, reserved, sector (section 5.2.6)."""
    sector = rng.choice((0, 1, 2047, 2048, 1 << 55, rng.getrandbits(64)))
    return struct.pack("<IIQ", rng.choice((0, 1, 4, 8, 11, 13, 99)), 0, sector)


def _net(rng: Random) -> bytes:
    """flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers (5.1.6), and a packet; or a command."""
    sizes = [rng.choice((0, 14, 54, 1500, 65535)) for _ in range(4)]
    return struct.pack("<BB5H", rng.choice((0, 1, 2, 255)), rng.choice((0, 1, 3, 4, 0x81)), *sizes, 0) + rng.randbytes(60)


def _9p(rng: Random) -> bytes:
    """size, type, tag, and the start of a T-message's body (9P2000.L)."""
    kind = rng.choice((8, 12, 14, 24, 26, 40, 72, 76, 100, 104, 108, 110, 116, 118, 120))
    body = rng.choice((
        struct.pack("<IH", 8192, 8) + b"9P2000.L",
        struct.pack("<IIHHII", 1, 0xFFFFFFFF, 0, 0, 0, 0),
        struct.pack("<IIH", 1, rng.choice((1, 2)), rng.choice((0, 1, 65535))) + rng.randbytes(16),
        rng.randbytes(24),
    ))  # fmt: skip
    return struct.pack("<IBH", rng.choice((7, 11, 19, 64, 0xFFFFFFFF)), kind, rng.getrandbits(16)) + body


def _vsock(rng: Random) -> bytes:
    """src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt (5.10.6)."""
    sizes = rng.choice((0, 8, 0xFFFFFFFF)), rng.choice((0, 4096, 0xFFFFFFFF))
    what = sizes[0], 1, rng.randrange(9), rng.randrange(4)
    return struct.pack("<QQIIIHHIII", 3, 2, rng.getrandbits(8), 1024, *what, 4096, sizes[1])


_HEADERS: dict[str, Callable[[Random], bytes]] = {
    "blk": _blk,
    "net": _net,
    "serial": lambda r: struct.pack("<IHH", r.choice((0, 1, 2, 0xFFFFFFFF)), r.randrange(9), r.choice((0, 1, 65535))),
    "9p": _9p,
    "vsock": _vsock,
    "balloon": lambda r: struct.pack("<II", r.choice((RAM >> 12, (RAM >> 12) + 5, 0, 0xFFFFFFFF)), r.getrandbits(32)),
}
"""What a request of the device begins with."""


class _Line:
    def assert_line(self) -> None:
        pass

    def release_line(self) -> None:
        pass


class _Vector:
    def route(self, address: int, data: int) -> None:
        pass

    def fire(self) -> None:
        pass

    def prepare(self) -> None:
        pass


class Port(Protocol):
    """What a driver does through its transport."""

    device: Any

    def status(self, value: int) -> None:
        """Write the device status."""

    def read_status(self) -> int: ...

    def accept(self, choose: Callable[[int], int]) -> None:
        """Feature negotiation: offered -> accepted."""

    def set_up(self, index: int, size: int, rings: tuple[int, int, int]) -> None:
        """A queue's size and the addresses of its descriptors, available and used rings; then it is ready."""

    def notify(self, index: int) -> None: ...

    def poke(self, rng: Random) -> None:
        """A register access at random."""


class MmioPort:
    """virtio-mmio (section 4.2)."""

    def __init__(self, memory: GuestMemory, virtio: VirtioDevice) -> None:
        self.device = mmio.VirtioMmio(virtio.name, _Line(), memory, virtio)

    def _write(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value & 0xFFFFFFFF)

    def status(self, value: int) -> None:
        self._write(mmio.STATUS, value)

    def read_status(self) -> int:
        return self.device.read(mmio.STATUS, 4)

    def accept(self, choose: Callable[[int], int]) -> None:
        offered = 0
        for half in (0, 1):
            self._write(mmio.DEVICE_FEATURES_SEL, half)
            offered |= self.device.read(mmio.DEVICE_FEATURES, 4) << 32 * half
        accepted = choose(offered)
        for half in (0, 1):
            self._write(mmio.DRIVER_FEATURES_SEL, half)
            self._write(mmio.DRIVER_FEATURES, accepted >> 32 * half)

    def set_up(self, index: int, size: int, rings: tuple[int, int, int]) -> None:
        self._write(mmio.QUEUE_SEL, index)
        self._write(mmio.QUEUE_NUM, size)
        for low, at in zip((mmio.QUEUE_DESC_LOW, mmio.QUEUE_DRIVER_LOW, mmio.QUEUE_DEVICE_LOW), rings, strict=True):
            self._write(low, at)
            self._write(low + 4, at >> 32)
        self._write(mmio.QUEUE_READY, 1)

    def notify(self, index: int) -> None:
        self._write(mmio.QUEUE_NOTIFY, index)

    def poke(self, rng: Random) -> None:
        size = rng.choice((1, 2, 4, 4, 8))
        if rng.random() < 0.5:
            self.device.read(rng.randrange(0x1000 - size), size)
            return
        offset = rng.choice((rng.randrange(0, 0x100, 4), 0x100 + rng.randrange(0x60), rng.randrange(0x1000)))
        self.device.write(min(offset, 0x1000 - size), size, _value(rng, size))


class PciPort:
    """virtio-pci behind a host bridge (section 4.1): registers through the windows, configuration through the ECAM."""

    def __init__(self, memory: GuestMemory, virtio: VirtioDevice) -> None:
        self.device = pci.VirtioPci(virtio.name, memory, virtio, _Vector)
        self._windows = [
            Window("io", IO, 0x0300_0000, 0, 0x1_0000),
            Window("memory", MEMORY32, 0x4000_0000, 0x4000_0000, 0x4000_0000),
            Window("high", MEMORY64, _HIGH, _HIGH, _HIGH),
        ]
        self._host = PciHost("pcie", self._windows, [_Line() for _ in range(4)], [[32 + pin, 4] for pin in range(4)], 1, 2)
        self._host.attach(self.device, 1)

    def _write(self, offset: int, size: int, value: int) -> None:
        self.device.write_bar(pci.BAR, offset, size, value & (1 << 8 * size) - 1)

    def status(self, value: int) -> None:
        self._config(config_space.COMMAND, 2, config_space.MEMORY_ENABLE | config_space.BUS_MASTER)
        self._config(0x10 + 4 * pci.BAR, 4, 0)
        self._config(0x14 + 4 * pci.BAR, 4, _HIGH >> 32)
        self._write(pci.DEVICE_STATUS, 1, value)

    def _config(self, offset: int, size: int, value: int) -> None:
        self._host.write(1 << 15 | offset, size, value)

    def read_status(self) -> int:
        return self.device.read_bar(pci.BAR, pci.DEVICE_STATUS, 1)

    def accept(self, choose: Callable[[int], int]) -> None:
        offered = 0
        for half in (0, 1):
            self._write(pci.DEVICE_FEATURE_SELECT, 4, half)
            offered |= self.device.read_bar(pci.BAR, pci.DEVICE_FEATURE, 4) << 32 * half
        accepted = choose(offered)
        for half in (0, 1):
            self._write(pci.DRIVER_FEATURE_SELECT, 4, half)
            self._write(pci.DRIVER_FEATURE, 4, accepted >> 32 * half)

    def set_up(self, index: int, size: int, rings: tuple[int, int, int]) -> None:
        self._write(pci.QUEUE_SELECT, 2, index)
        self._write(pci.QUEUE_SIZE, 2, size)
        for offset, at in zip((pci.QUEUE_DESC, pci.QUEUE_DRIVER, pci.QUEUE_DEVICE), rings, strict=True):
            self._write(offset, 8, at)
        self._write(pci.QUEUE_MSIX_VECTOR, 2, index)
        self._write(pci.QUEUE_ENABLE, 2, 1)

    def notify(self, index: int) -> None:
        self._write(pci.NOTIFY + pci.NOTIFY_MULTIPLIER * index, 2, index)

    def poke(self, rng: Random) -> None:
        size, reads = rng.choice((1, 2, 4, 4, 8)), rng.random() < 0.4
        match rng.randrange(4):
            case 0:  # configuration space, of a slot that is there or not
                at = rng.choice((0, 1 << 15, 1 << 15, 1 << 15, 2 << 15, 1 << 15 | 1 << 12, 1 << 20))
                offset = at | rng.choice((rng.randrange(0x40), rng.randrange(0x100), rng.randrange(0x1000))) // size * size
                area: Any = self._host
            case 1:  # through a window, at where a BAR is now or anywhere
                area = rng.choice(self._windows)
                places = [place - area.bus_base for place in self.device.mapped.values() if place >= area.bus_base]
                offset = rng.choice((*places, 0, 0x1000)) + rng.randrange(0x4000)
                offset = min(offset, area.size - size)
            case _:
                bar = rng.choice((pci.BAR, pci.BAR, pci.BAR, 1))
                offset = rng.choice((rng.randrange(0x40), rng.randrange(0x40), rng.randrange(0x800))) // size * size
                if bar == pci.BAR:
                    offset += rng.choice((pci.COMMON, pci.COMMON, pci.ISR, pci.CONFIG, pci.NOTIFY))
                if reads:
                    self.device.read_bar(bar, offset, size)
                else:
                    self.device.write_bar(bar, offset, size, _value(rng, size))
                return
        if reads:
            area.read(offset, size)
        else:
            area.write(offset, size, _value(rng, size))


PORTS: dict[str, Callable[[GuestMemory, VirtioDevice], Port]] = {"mmio": MmioPort, "pci": PciPort}


def _value(rng: Random, size: int) -> int:
    return rng.choice((0, 1, 0xFF, 0x8000, (1 << 8 * size) - 1, rng.getrandbits(8 * size))) & (1 << 8 * size) - 1


class Case:
    """One device behind one transport, and its driver's RAM. A context manager. The same (name, port, seed) does the same."""

    def __init__(self, name: str, port: str, seed: str, directory: Path) -> None:
        self.name, self._rng = name, Random(f"{name}:{port}:{seed}")
        self._end = ExitStack()
        fd = os.memfd_create("fuzz-ram")
        try:
            os.ftruncate(fd, RAM_SIZE)
            self._ram = mmap.mmap(fd, RAM_SIZE)
        finally:
            os.close(fd)
        memory = GuestMemory([(RAM, memoryview(self._ram))])
        self.virtio = BUILDERS[name](directory, memory, self._end)
        self.port = PORTS[port](memory, self.virtio)

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.close()

    def run(self) -> None:
        """Some lives of the device, from bring-up to reset. Raises what the device raises."""
        rng = self._rng
        for _ in range(rng.randrange(1, 4)):
            self._bring_up()
            for _ in range(rng.randrange(1, 30)):
                self._step()
            if rng.random() < 0.2:
                self._hostile_state()
            if rng.random() < 0.3:
                device = self.port.device
                device.restore(decode_state(type(device).State, encode_state(device.save())))
            self.port.status(0)
            if self.port.read_status() != 0:
                raise AssertionError("the status is not 0 after a reset")

    def _hostile_state(self) -> None:
        """A saved state that somebody has changed on its way: refused, or taken; then the device still works."""
        device = self.port.device
        data = bytearray(encode_state(device.save()))
        for _ in range(self._rng.randrange(1, 6)):
            data[self._rng.randrange(len(data))] = self._rng.choice((0, 0x7F, 0xC0, 0xCF, 0xFF, self._rng.getrandbits(8)))
        try:
            device.restore(decode_state(type(device).State, bytes(data)))
        except StateError:
            pass

    def _bring_up(self) -> None:
        rng, status = self._rng, transport.ACKNOWLEDGE | transport.DRIVER
        self.port.status(status)
        narrow = rng.random() < 0.5
        self.port.accept(lambda offered: F_VERSION_1 | (offered & rng.getrandbits(64) if narrow else offered))
        self.port.status(status | transport.FEATURES_OK)
        for index, queue in enumerate(self.virtio.queues[:8]):
            base = RAM + _RING * index
            self.port.set_up(index, min(queue.max_size, rng.choice((2, 8, 64))), (base, base + 0x4000, base + 0x5000))
        self.port.status(status | transport.FEATURES_OK | transport.DRIVER_OK)

    def _step(self) -> None:
        rng = self._rng
        if rng.random() < 0.7:
            queue = rng.randrange(min(len(self.virtio.queues), 8))
            self._fill(queue)
            self.port.notify(queue)
        else:
            self.port.poke(rng)

    def _fill(self, queue: int) -> None:
        """Descriptors and available entries: requests that are nearly right, and nonsense."""
        rng, base = self._rng, RAM + _RING * queue
        count = rng.choice((1, 2, 3, 8))
        for index in range(count):
            self._put(base + 16 * index, self._descriptor(index, count))
        idx = struct.unpack_from("<H", self._ram, base + 0x4002 - RAM)[0]
        for entry in range(8):
            self._put(base + 0x4004 + 2 * entry, struct.pack("<H", rng.choice((0, 0, 0, 1, count, 255, 65535))))
        self._put(
            base + 0x4000, struct.pack("<HH", rng.choice((0, 0, 1)), (idx + rng.choice((0, 1, 1, 1, 2, 200, 32768))) & 0xFFFF)
        )

    def _descriptor(self, index: int, count: int) -> bytes:
        rng = self._rng
        at = _BUFFERS + 0x2000 * index
        make = _HEADERS.get(self.name)
        header = make(rng) if make is not None else rng.randbytes(16)
        self._put(at, header + (struct.pack("<QIHH", at, 16, rng.randrange(8), 0) if rng.random() < 0.2 else b""))
        if rng.random() < 0.8:
            length, flags = (len(header), 0) if index == 0 else (rng.choice((1, 8, 512, 4096)), rng.choice((0, _WRITE, _WRITE)))
            flags |= _NEXT if index + 1 < count else 0
            return struct.pack("<QIHH", at, length, flags, index + 1)
        address = rng.choice((at, 0, RAM + RAM_SIZE - 4, RAM - 8, (1 << 64) - 8, rng.getrandbits(64)))
        return struct.pack(
            "<QIHH",
            address,
            rng.choice(_LENGTHS),
            rng.choice((0, _NEXT, _WRITE, _INDIRECT, rng.getrandbits(16))),
            rng.choice((0, 1, index, 65535)),
        )

    def _put(self, gpa: int, data: bytes) -> None:
        self._ram[gpa - RAM : gpa - RAM + len(data)] = data
