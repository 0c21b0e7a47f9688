"""Building the devices of a machine from its configuration: back ends, devices, wires, places on the bus.

Called once by machine/machine.py. Explicit on purpose: what is wired to what can be read here from top to
bottom. Opens files, sockets and children only through the back ends; whatever fails is a BackendError for the
user. What most VMs do not have is imported when it is wanted: imports are a good part of a small VM's start.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qemu_user.backends.chardev.chardev import Chardev
from qemu_user.backends.chardev.console_log import ConsoleLog
from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.chardev.hub import Hub
from qemu_user.backends.chardev.last_words import LastWords
from qemu_user.backends.chardev.null import NullChardev
from qemu_user.backends.chardev.stdio import StdioChardev
from qemu_user.backends.errors import BackendError
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.io_threads import IoThreads
from qemu_user.config.machine_config import MAX_QUEUES, Drive, MachineConfig, Slot
from qemu_user.config.machine_config import Chardev as ChardevConfig
from qemu_user.devices.device import Device, FdtNode, Place
from qemu_user.devices.goldfish_rtc import GoldfishRtc
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.ns16550a import Ns16550a
from qemu_user.devices.syscon import Syscon
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.pci import VirtioPci
from qemu_user.devices.virtio.transport import VirtioTransport
from qemu_user.devices.vmgenid import VmGenId
from qemu_user.machine import virt
from qemu_user.machine.bus import Bus
from qemu_user.machine.debug_console import DebugConsole
from qemu_user.machine.irq import PHANDLE_CONTROLLER, PHANDLE_TEST, Interrupts
from qemu_user.machine.kicks import Kicks
from qemu_user.machine.pci import assign, make_host

if TYPE_CHECKING:
    from qemu_user.backends.block.logged import LoggedDisk
    from qemu_user.backends.block.raw import BlockBackend
    from qemu_user.backends.net.backend import NetBackend
    from qemu_user.backends.share.server import Server
    from qemu_user.backends.vsock.unix import UnixVsock
    from qemu_user.devices.pflash import Bank
    from qemu_user.devices.virtio.balloon import VirtioBalloon
    from qemu_user.devices.virtio.blk import VirtioBlk
    from qemu_user.devices.virtio.net import VirtioNet

Power = Callable[[str, int], None]


class Parts:
    """The devices and back ends of one machine."""

    def __init__(self, config: MachineConfig, threads: IoThreads, console_path: str, log_path: str = "") -> None:
        self.config, self.loop = config, threads.main
        self._threads = threads
        self._loops: dict[str, IoLoop] = {}
        """Of disks, NICs and shared folders, by the device's name."""
        self.bus = Bus()
        self.devices: list[Device] = []
        self.transports: list[VirtioTransport] = []
        self.nodes: list[FdtNode] = []
        self.disks: list[LoggedDisk] = []
        self.flash: list[BlockBackend] = []
        """What the banks of the flash hold."""
        self.blocks: list[VirtioBlk] = []
        """The disks' devices, in the same order."""
        self.nets: list[NetBackend] = []
        self.cards: list[VirtioNet] = []
        """The networks' devices, in the same order."""
        self.shares: list[Server] = []
        self.vsock: UnixVsock | None = None
        self.balloon: VirtioBalloon | None = None
        self.vmgenid: VmGenId | None = None
        self.chardevs: dict[str, Chardev] = {}
        self.last_words: LastWords | None = None
        """Of hvc0, if a panic is to end the VM."""
        self.debug_console: DebugConsole
        self.arriving = False
        """Whether the VM comes from elsewhere: set before build()."""
        self._console_path, self._log_path = console_path, log_path
        self._directory = os.path.dirname(console_path)

    @property
    def images(self) -> list[BlockBackend]:
        """Everything that is locked while the VM is ours: disks and what the flash holds."""
        return [*self.disks, *self.flash]

    # -- back ends, before kvmcore is asked for anything -------------------------------------------

    def open_backends(self, lock_disks: bool = True) -> None:
        """BackendError if something that the user named cannot be had."""
        for chardev in self.config.chardevs:
            self.chardevs[chardev.id] = self._logged(self._open_chardev(chardev), chardev)
        if self.config.panic_ends and self.config.console:
            self.last_words = self.chardevs[self.config.console].last_words = LastWords()
        for drive in self.config.drives:
            from qemu_user.backends.block.logged import LoggedDisk
            from qemu_user.machine.drives import open_drive

            self.disks.append(LoggedDisk(open_drive(drive, lock_disks)))
        for flash in self.config.flash:
            from qemu_user.backends.block.opening import open_disk

            self.flash.append(open_disk(flash.file, flash.format, flash.readonly, False, lock_disks))
        for net in self.config.nets:
            from qemu_user.machine.networks import open_net

            self.nets.append(open_net(net, self.config.name))
        if self.config.vsock is not None:
            from qemu_user.backends.vsock.unix import UnixVsock

            self.vsock = UnixVsock(self._vsock_path(self.config.vsock.path))
        for share in self.config.shares:
            from qemu_user.backends.share.server import Server

            self.shares.append(Server(share.folder, share.readonly))

    def _vsock_path(self, path: str) -> str:
        if path:
            return path
        if not self._directory:
            raise BackendError("vsock: needs path=SOCKET")
        return os.path.join(self._directory, "vsock.sock")

    def _logged(self, chardev: Chardev, config: ChardevConfig) -> Chardev:
        if config.logfile and chardev.log is None:
            chardev.log = ConsoleLog(config.logfile, 0, config.logappend)
        return chardev

    def _open_chardev(self, config: ChardevConfig) -> Chardev:
        name = config.id
        if config.kind == "hub":
            terminal: Chardev | None = None
            if config.stdio:
                terminal = _stdio(name, config.escape)
            path, self._console_path = self._console_path, ""
            hub = Hub(name, terminal, path)
            if self._log_path and not config.logfile:
                hub.log = ConsoleLog(self._log_path)
                self._log_path = ""
            return hub
        if config.kind == "stdio":
            return _stdio(name, config.escape)
        if config.kind == "fd":
            return DescriptorChardev(name, config.input, config.output)
        if config.kind == "pty":
            from qemu_user.backends.chardev.pty import PtyChardev

            return PtyChardev(name)
        if config.kind == "socket":
            from qemu_user.backends.chardev.unix_socket import SocketChardev

            return SocketChardev(name, config.path, config.server, config.wait)
        if config.kind == "file":
            from qemu_user.backends.chardev.file import FileChardev

            return FileChardev(name, config.path, config.append)
        return NullChardev(name)

    def _channel(self, chardev: str, label: str) -> Chardev:
        """What a device is connected to."""
        found = self.chardevs.get(chardev)
        if found is None:
            return NullChardev(label)
        return found.channel(label) if isinstance(found, Hub) else found

    # -- devices -----------------------------------------------------------------------------------

    def build(
        self, interrupts: Interrupts, memory: GuestMemory, power: Power, kicks: Kicks, banks: list[Bank]
    ) -> None:
        """Make every device and put it in its place. `banks`: of the flash, [] without one."""
        places = virt.PLACES
        plic = places["plic"]
        here = Place(plic.base, plic.size, [], 0, PHANDLE_CONTROLLER)
        self._put(interrupts.plic, plic, here, in_tree=interrupts.in_tree)
        test = places["test"]
        self._put(Syscon("test", power), test, Place(test.base, test.size, [], 0, PHANDLE_TEST))
        self._put_wired(
            Ns16550a(
                "uart", interrupts.level(places["uart"].irq), self._channel(self.config.serial, "ttyS0")
            ),
            places["uart"],
            interrupts,
        )
        offset = self.config.rtc_offset * 1_000_000_000
        rtc = GoldfishRtc("rtc", interrupts.level(places["rtc"].irq), self.loop, _clock(offset))
        self._put_wired(rtc, places["rtc"], interrupts)
        if banks:
            from qemu_user.devices.pflash import Pflash

            flash = places["flash"]
            self._put(Pflash("flash", banks), flash, Place(flash.base, flash.size, [], 0))
        if self.config.vmgenid:
            generation = uuid.UUID(self.config.uuid or str(uuid.uuid4())).bytes_le
            self.vmgenid = VmGenId("vmgenid", interrupts.edge(places["vmgenid"].irq), generation)
            self._put_wired(self.vmgenid, places["vmgenid"], interrupts, edge=True)
        self._put_virtio(interrupts, memory, kicks)
        self._make_debug_console()

    def _put_virtio(self, interrupts: Interrupts, memory: GuestMemory, kicks: Kicks) -> None:
        entry = virt.PLACES["pcie"]
        host = make_host(interrupts, memory.size)
        self._put(host, entry, Place(entry.base, entry.size, [], 0))
        for window in host.windows:
            self.bus.add(window.base, window.size, window)
        if self.config.balloon is not None:
            from qemu_user.devices.virtio.balloon import VirtioBalloon

            self.balloon = VirtioBalloon(
                "balloon", memory, self.config.balloon.reporting, self.config.balloon.deflate_on_oom
            )
        for bus, number, device in assign(self._virtio_devices()):
            loop = self.loop
            if device.own_thread:
                loop = self._loops[device.name] = self._threads.add(f"io-{device.name}")
            for block in self.blocks:
                if block is device:
                    block.workers = self._threads.workers(block.name)
            if bus == "pci":
                function = VirtioPci(device.name, memory, device, interrupts.msi, partial(kicks.make, loop))
                host.attach(function, number)
                self.devices.append(function)
                transport = function.transport
            else:
                from qemu_user.devices.virtio.mmio import QUEUE_NOTIFY, VirtioMmio

                entry = virt.PLACES[f"virtio{number}"]
                slot = VirtioMmio(device.name, interrupts.edge(entry.irq), memory, device)
                self._put_wired(slot, entry, interrupts, edge=True)
                assert slot.transport is not None
                transport = slot.transport
                for queue in device.queues:
                    kick = kicks.make(loop, partial(transport.kicked, queue.index), 4, queue.index)
                    kick.place(entry.base + QUEUE_NOTIFY)
            transport.defer, transport.delay, transport.watch = loop.call_soon, loop.call_later, loop.watch
            self.transports.append(transport)

    def _put(self, device: Device, entry: virt.Entry, place: Place, in_tree: bool = True) -> None:
        self.bus.add(entry.base, entry.size, device)
        self.devices.append(device)
        if in_tree:
            self.nodes.append(device.fdt_node(place))

    def _put_wired(
        self, device: Device, entry: virt.Entry, interrupts: Interrupts, edge: bool = False
    ) -> None:
        cells = interrupts.cells(entry.irq, edge)
        self._put(device, entry, Place(entry.base, entry.size, cells, PHANDLE_CONTROLLER))

    def _make_debug_console(self) -> None:
        hub = next((c for c in self.chardevs.values() if isinstance(c, Hub)), None)
        self.debug_console = DebugConsole(hub.channel("sbi") if hub else NullChardev("sbi"))

    def _virtio_devices(self) -> list[tuple[Slot, VirtioDevice]]:
        """(where, device): disks first, so that the first -drive is vda."""
        wanted: list[tuple[Slot, VirtioDevice]] = []
        for number, (drive, disk) in enumerate(zip(self.config.drives, self.disks, strict=True)):
            from qemu_user.devices.virtio.blk import VirtioBlk

            blk = VirtioBlk(
                _label(drive, number),
                disk,
                drive.serial,
                self._queues(drive.queues, drive.slot),
                drive.queue_size,
                drive.logical_block_size,
                drive.physical_block_size,
            )
            self.blocks.append(blk)
            wanted.append((drive.slot, blk))
        for number, (net, backend) in enumerate(zip(self.config.nets, self.nets, strict=True)):
            from qemu_user.devices.virtio.net import VirtioNet

            mac = (
                bytes.fromhex(net.mac.replace(":", "")) if net.mac else default_mac(self.config.name, number)
            )
            card = VirtioNet(net.id, backend, mac, net.queues, net.mtu, net.without)
            self.cards.append(card)
            wanted.append((net.slot, card))
        for share, server in zip(self.config.shares, self.shares, strict=True):
            from qemu_user.devices.virtio.p9 import VirtioP9

            wanted.append((share.slot, VirtioP9(f"share-{share.tag}", share.tag, server)))
        if self.config.vsock is not None and self.vsock is not None:
            from qemu_user.devices.virtio.vsock import VirtioVsock

            wanted.append((self.config.vsock.slot, VirtioVsock("vsock", self.config.vsock.cid, self.vsock)))
        if self.config.balloon is not None and self.balloon is not None:
            wanted.append((self.config.balloon.slot, self.balloon))
        ports = [(port.id, port.name, self._channel(port.chardev, port.name)) for port in self.config.ports]
        if self.config.console:
            ports.insert(0, (0, "", self._channel(self.config.console, "hvc0")))
        if ports:
            from qemu_user.devices.virtio.console import VirtioConsole

            wanted.append((self.config.console_slot, VirtioConsole("console", ports)))
        if self.config.rng:
            from qemu_user.devices.virtio.rng import VirtioRng

            wanted.append((self.config.rng_slot, VirtioRng("rng")))
        return wanted

    def _queues(self, asked: int | None, slot: Slot) -> int:
        """Queues (or pairs) of a device: one per CPU where each has a vector of its own, as QEMU does."""
        if asked is not None:
            return asked
        return min(self.config.cpus, MAX_QUEUES) if slot.bus == "pci" else 1

    # -- life --------------------------------------------------------------------------------------

    def start_backends(
        self, warn: Callable[[str], None], quit_now: Callable[[int], None], disk_news: Callable[[str, str, str], None]
    ) -> None:
        """Begin to talk to the host; `disk_news` is called with (drive, QMP event, text for the user). BackendError."""
        for number, (drive, disk) in enumerate(zip(self.config.drives, self.disks, strict=True)):
            disk.report = partial(disk_news, _label(drive, number))
        for config in self.config.chardevs:
            chardev = self.chardevs[config.id]
            leaf = chardev.terminal if isinstance(chardev, Hub) else chardev
            if isinstance(leaf, StdioChardev):
                leaf.quit = lambda: quit_now(0)
            if config.quit_on_hangup and isinstance(chardev, DescriptorChardev):
                chardev.hung_up = lambda: quit_now(141)  # 128 + SIGPIPE, as a shell has it
            chardev.start(self.loop)
        for transport in self.transports:
            transport.warn = warn
        for net, card in zip(self.nets, self.cards, strict=True):
            from qemu_user.machine.networks import start_net

            net.warn = warn
            start_net(net, self._loops[card.name], self.arriving)
        if self.vsock is not None:
            self.vsock.start(self.loop)

    def refresh_size(self) -> None:
        """Tell the guest our terminal's size again."""
        for chardev in self.chardevs.values():
            leaf = chardev.terminal if isinstance(chardev, Hub) else chardev
            if isinstance(leaf, StdioChardev):
                leaf.refresh_size()

    def finish_output(self, seconds: float) -> None:
        """The machine is at its end: what the guest has written reaches the host."""
        from qemu_user.devices.virtio.console import VirtioConsole

        for transport in self.transports:
            if isinstance(transport.virtio, VirtioConsole):
                transport.virtio.finish(seconds)
        self.drain_output(seconds)

    def drain_output(self, seconds: float) -> None:
        """What devices have handed to their back ends reaches the host."""
        for chardev in self.chardevs.values():
            chardev.drain(seconds)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        closing: list[Any] = [*self.nets, *self.chardevs.values(), *self.images, *self.shares]
        if self.vsock is not None:
            closing.append(self.vsock)
        for backend in closing:
            backend.close()


def _stdio(name: str, escape: bool) -> Chardev:
    return StdioChardev(name, escape)


def _label(drive: Drive, number: int) -> str:
    return drive.id or f"drive{number}"


def _clock(offset: int) -> Callable[[], int]:
    import time

    return lambda: time.time_ns() + offset


def default_mac(name: str, number: int) -> bytes:
    """A locally administered address that differs between VMs and stays with the name."""
    import hashlib

    digest = hashlib.blake2b(f"{name}/{number}".encode(), digest_size=3).digest()
    return b"\x52\x54\x00" + digest
