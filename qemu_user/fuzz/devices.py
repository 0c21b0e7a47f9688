"""The device side: a driver that is out of its mind, against every virtio device of qemu_user, in this process.

A case brings one device up as the specification says (virtio 1.2, section 3.1), fills its rings with nonsense that looks like
requests, kicks, and reads and writes registers at random. A device may answer with DEVICE_NEEDS_RESET; it may not raise,
hang, or fail to come up again after a reset; and the state it saves must be one that it takes back.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType

from qemu_user.backends.block.raw import RawImage
from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.net.backend import NetBackend
from qemu_user.backends.share.server import Server
from qemu_user.backends.vsock.unix import UnixVsock
from qemu_user.devices.device import StateError, decode_state, encode_state
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio import mmio, transport
from qemu_user.devices.virtio.balloon import VirtioBalloon
from qemu_user.devices.virtio.blk import VirtioBlk
from qemu_user.devices.virtio.console import VirtioConsole
from qemu_user.devices.virtio.device import F_VERSION_1, VirtioDevice
from qemu_user.devices.virtio.net import VirtioNet
from qemu_user.devices.virtio.p9 import VirtioP9
from qemu_user.devices.virtio.rng import VirtioRng
from qemu_user.devices.virtio.vsock import VirtioVsock
from qemu_user.fuzz.campaign import Figures
from qemu_user.fuzz.sequence import Finding, Op, save
from qemu_user.migration import sections

RAM, RAM_SIZE = 0x80000000, 1 << 20
_RING = 0x8000
"""Bytes of RAM that each queue's rings take."""
_BUFFERS = RAM + 0x80000
_SECONDS = 10
STREAM = "migration-stream"
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_LENGTHS = (0, 1, 4, 8, 12, 16, 44, 512, 4096, 65536, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF)

Builder = Callable[[Path, GuestMemory], VirtioDevice]

_open: list[RawImage] = []


def _disk(directory: Path) -> RawImage:
    path = directory / "disk"
    if not path.exists():
        path.write_bytes(bytes(1 << 20))
    while _open:
        _open.pop().close()  # the last case's, whose lock would be in the way
    _open.append(RawImage(str(path)))
    return _open[0]


BUILDERS: dict[str, Builder] = {
    "blk": lambda d, m: VirtioBlk("disk", _disk(d), "serial", queues=2),
    "net": lambda d, m: VirtioNet("net", NetBackend("none"), b"\x52\x54\0\x12\x34\x56", pairs=2),
    "serial": lambda d, m: VirtioConsole("console", [(0, "", Chardev("a")), (1, "port", Chardev("b"))]),
    "rng": lambda d, m: VirtioRng("rng"),
    "9p": lambda d, m: VirtioP9("share", "tag", Server(str(d))),
    "vsock": lambda d, m: VirtioVsock("vsock", 3, UnixVsock(str(d / "vsock"))),
    "balloon": lambda d, m: VirtioBalloon("balloon", m),
}
"""Every virtio device, by its name in qemu_user.devices.virtio.DEVICES."""

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


class Case:
    """One device and its driver's RAM. The same (name, seed) does the same."""

    def __init__(self, name: str, seed: str, directory: Path) -> None:
        self.name, self._rng = name, Random(f"{name}:{seed}")
        fd = os.memfd_create("fuzz-ram")
        os.ftruncate(fd, RAM_SIZE)
        self._ram = mmap.mmap(fd, RAM_SIZE)
        os.close(fd)
        memory = GuestMemory([(RAM, memoryview(self._ram))])
        self.virtio = BUILDERS[name](directory, memory)
        self.device = mmio.VirtioMmio(name, _Line(), memory, self.virtio)

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
                state = decode_state(type(self.device).State, encode_state(self.device.save()))
                self.device.restore(state)
            self._write(mmio.STATUS, 0)
            if self.device.read(mmio.STATUS, 4) != 0:
                raise AssertionError("the status is not 0 after a reset")

    def _hostile_state(self) -> None:
        """A saved state that somebody has changed on its way: refused, or taken; then the device still works."""
        data = bytearray(encode_state(self.device.save()))
        for _ in range(self._rng.randrange(1, 6)):
            data[self._rng.randrange(len(data))] = self._rng.choice((0, 0x7F, 0xC0, 0xCF, 0xFF, self._rng.getrandbits(8)))
        try:
            self.device.restore(decode_state(type(self.device).State, bytes(data)))
        except StateError:
            pass

    def _write(self, offset: int, value: int) -> None:
        self.device.write(offset, 4, value & 0xFFFFFFFF)

    def _bring_up(self) -> None:
        status = transport.ACKNOWLEDGE | transport.DRIVER
        self._write(mmio.STATUS, status)
        wanted = F_VERSION_1
        for half in (0, 1):
            self._write(mmio.DEVICE_FEATURES_SEL, half)
            wanted |= self.device.read(mmio.DEVICE_FEATURES, 4) << 32 * half
        if self._rng.random() < 0.5:
            wanted &= self._rng.getrandbits(64) | F_VERSION_1
        for half in (0, 1):
            self._write(mmio.DRIVER_FEATURES_SEL, half)
            self._write(mmio.DRIVER_FEATURES, wanted >> 32 * half)
        self._write(mmio.STATUS, status | transport.FEATURES_OK)
        for index, queue in enumerate(self.virtio.queues[:8]):
            self._write(mmio.QUEUE_SEL, index)
            self._write(mmio.QUEUE_NUM, min(queue.max_size, self._rng.choice((2, 8, 64))))
            base = RAM + _RING * index
            for low, at in (
                (mmio.QUEUE_DESC_LOW, base),
                (mmio.QUEUE_DRIVER_LOW, base + 0x4000),
                (mmio.QUEUE_DEVICE_LOW, base + 0x5000),
            ):
                self._write(low, at)
                self._write(low + 4, at >> 32)
            self._write(mmio.QUEUE_READY, 1)
        self._write(mmio.STATUS, status | transport.FEATURES_OK | transport.DRIVER_OK)

    def _step(self) -> None:
        rng = self._rng
        chance = rng.random()
        if chance < 0.7:
            queue = rng.randrange(min(len(self.virtio.queues), 8))
            self._fill(queue)
            self._write(mmio.QUEUE_NOTIFY, queue)
        elif chance < 0.85:
            size = rng.choice((1, 2, 4, 4, 8))
            offset = rng.choice((rng.randrange(0, 0x100, 4), 0x100 + rng.randrange(0x60), rng.randrange(0x1000)))
            self.device.write(
                min(offset, 0x1000 - size), size, rng.choice((0, 1, 0xFF, rng.getrandbits(8 * size))) & (1 << 8 * size) - 1
            )
        else:
            size = rng.choice((1, 2, 4, 8))
            self.device.read(rng.randrange(0x1000 - size), size)

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


def _stream(rng: Random) -> None:
    """A section of a migration stream with its body changed and its checksum right again: SectionError, or taken."""
    whole = sections.encode(
        [sections.Section(rng.choice(("vcpu/0", "x" * 40)), rng.getrandbits(16), rng.randbytes(rng.choice((0, 40, 3000))))]
    )
    head, body = whole[:16], bytearray(whole[20:-4])
    for _ in range(rng.randrange(1, 8)):
        body[rng.randrange(min(len(body), 64))] = rng.choice((0, 1, 0x7F, 0xFF, rng.getrandbits(8)))
    del body[rng.choice((len(body), rng.randrange(len(body) + 1))) :]
    try:
        sections.decode(head + struct.pack("<I", zlib.crc32(head)) + body + struct.pack("<I", zlib.crc32(body)))
    except sections.SectionError:
        pass


TARGETS = (*BUILDERS, STREAM)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLongError(f"the device has worked for {_SECONDS} s on one case")


class _TooLongError(Exception):
    """A case does not end."""


def perform_device(op: Op, directory: Path) -> Finding | None:
    """The case of an operation {"do": "device", "name": one of TARGETS, "extra": {"seed": SEED}}. Main thread only."""
    before = signal.signal(signal.SIGPROF, _too_long)
    try:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # of CPU time: a machine that is busy is no fault
        if op.name == STREAM:
            _stream(Random(str(op.extra["seed"])))
        else:
            Case(op.name, str(op.extra["seed"]), directory).run()
    except Exception as error:
        oracle = "hang" if isinstance(error, _TooLongError) else "device"
        return Finding(oracle, f"virtio-{op.name}: {''.join(traceback.format_exception(error)[-4:])}", 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None


def run(seed: int, seconds: float, output: Path, show: Callable[[Figures], None], most: int = 0) -> Figures:
    """Cases of every device in turn until the time is up, or `most` rounds; findings as files."""
    figures, end, kinds = Figures(seed), time.monotonic() + seconds, set[str]()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (output / "figures.jsonl").open("a") as log:
        while time.monotonic() < end and (not most or figures.sequences < most * len(TARGETS)):
            for name in TARGETS:
                op = Op("device", name=name, extra={"seed": f"{seed}:{figures.sequences}"})
                finding = perform_device(op, Path(scratch))
                figures.sequences += 1
                figures.operations += 1
                figures.reached[name] += 1
                kind = f"{name}-{finding.text.strip().splitlines()[-1]}" if finding else ""
                if finding is not None and kind not in kinds:
                    kinds.add(kind)
                    figures.findings += 1
                    save(output / "findings" / f"{finding.oracle}-{name}-{len(kinds)}.jsonl", [op], finding, seed=seed)
            if figures.sequences % (len(TARGETS) * 50) == 0:
                show(figures)
        log.write(json.dumps(figures.row()) + "\n")
    return figures
