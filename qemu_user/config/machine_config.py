"""MachineConfig: one validated tree that says everything about a VM, and does nothing.

Made by qemu_options.py or by the command line directly, read by machine/machine.py. validate() checks what
the types cannot: ranges, references between parts, files that must exist. Must never open a device or start
anything.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import msgspec

from qemu_user.config.errors import ConfigError

MIB = 1 << 20
MIN_MEMORY = 16 * MIB
MAX_MEMORY = 1 << 40
MAX_CPUS = 128
"""NR_CPUS of Debian's kernel, and enough for the map of the IMSIC."""
MAX_SOCKET_PATH = 107
"""sun_path without its NUL."""
MAX_VSOCK_PATH = 107 - len("_4294967295")
"""Room for a port behind it in a Unix socket's address."""
MAX_QUEUES = 64
"""Of a disk, and pairs of a network device."""
MAX_FLASH = 2
"""Banks of the parallel flash."""
MMIO_SLOTS, PCI_SLOTS = 8, 31
"""virtio-mmio slots 0 to 7; PCI slots 1 to 31, 0 being the bridge."""
DISK_FORMATS = ("raw", "qcow2")
DISK_CACHES = ("writeback", "none", "writethrough", "directsync", "unsafe")
_LIMITED = tuple(f"{what}-{which}" for what in ("iops", "bps") for which in ("total", "read", "write"))
DISK_LIMITS = (*_LIMITED, *(f"{kind}{more}" for kind in _LIMITED for more in ("-max", "-max-length")), "iops-size")
"""QEMU's throttling options."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
LOGIN = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the tree's parts."""


class Boot(Part, frozen=True, kw_only=True):
    """What runs first. Without `kernel` there is nothing to run."""

    kernel: str = ""
    """A flat Image, an ELF, or U-Boot's u-boot.bin."""
    initrd: str = ""
    initrd_files: tuple[str, ...] = ()
    """Files with cpio archives, put behind the initrd."""
    initrd_extra: bytes = b""
    """A cpio archive put behind them (or standing alone)."""
    append: str = ""
    dtb: str = ""
    """A device tree to use instead of ours."""


class Flash(Part, frozen=True, kw_only=True):
    """What a bank of the parallel flash holds: a file of the bank's size. With bank 0 and no kernel the VM boots from it."""

    file: str
    format: str = ""
    readonly: bool = False


class Slot(Part, frozen=True, kw_only=True):
    """Where a virtio device is plugged in; `number` None: the next free one."""

    bus: Literal["pci", "mmio"] = "pci"
    number: int | None = None


class Drive(Part, frozen=True, kw_only=True):
    """A disk image as a virtio block device."""

    id: str = ""
    file: str
    """A path, or the address of an NBD server's disk."""
    format: str = ""
    """"": qcow2 if its name says so, raw if its content does not say otherwise."""
    members: tuple[str, ...] = ()
    """The disks, named as `file` is, that make up a `layout`; `file` is then the first of them."""
    layout: Literal["", "mirror", "stripe"] = ""
    chunk: int = 64 << 10
    """stripe: bytes that go to one member before the next has its turn."""
    degraded: bool = False
    """mirror: starts without members that are not there."""
    cache: str = "writeback"
    detect_zeroes: str = "off"
    limits: dict[str, int] = {}
    """Of throttling, by QEMU's names: iops-total, bps-read-max..."""
    reconnect: float = 10
    """Seconds for which requests wait for an NBD server that has gone."""
    readonly: bool = False
    discard: bool = False
    serial: str = ""
    device: str = ""
    """The device's own id, if it has one beside the drive's."""
    queues: int | None = None
    """None: one per CPU on PCI, one on virtio-mmio."""
    queue_size: int = 256
    logical_block_size: int = 512
    physical_block_size: int = 4096
    slot: Slot = Slot()


NET_FEATURES = (
    "csum", "guest_csum", "guest_tso4", "guest_tso6", "guest_ecn", "host_tso4", "host_tso6", "host_ecn", "mrg_rxbuf",
    "ctrl_vq", "ctrl_rx", "ctrl_vlan", "ctrl_mac_addr", "guest_announce", "mq",
)  # fmt: skip
"""Features of virtio-net that can be switched off, by QEMU's names of them."""


class Dump(Part, frozen=True, kw_only=True):
    """A pcap file of what crosses a network, as QEMU's filter-dump."""

    id: str
    file: str
    longest: int = 65536


class Net(Part, frozen=True, kw_only=True):
    """A virtio network device and what it is plugged into."""

    id: str = "net0"
    kind: Literal["user", "tap", "stream", "dgram", "switch", "none"] = "user"
    mac: str = ""
    forwards: tuple[str, ...] = ()
    """user: QEMU's hostfwd rules."""
    network: str = ""
    """user: the guest's IPv4 network, with `gateway` (which is the host) and `address` (the guest's); "": the host's own."""
    gateway: str = ""
    address: str = ""
    dns: str = ""
    """user: address at which the guest finds the host's resolver; "": those that the host uses."""
    search: tuple[str, ...] = ()
    restrict: bool = False
    """user: the guest answers to forwarded ports and reaches nobody."""
    ipv4: bool = True
    ipv6: bool = True
    ifname: str = "tap0"
    vhost: bool = False
    """tap: was asked for, and is not there."""
    path: str = ""
    """stream, dgram: the Unix socket; switch: its port.sock, "" for that of the switch called `switch`."""
    inet: str = ""
    """stream, dgram: HOST:PORT instead; dgram: "multicast" or the interface's address when `remote` is a group."""
    remote: str = ""
    """dgram: where frames go, a path or HOST:PORT."""
    switch: str = "default"
    settings: str = ""
    """switch: what the port is to be, in the words of qemu_user/switch/settings.py."""
    dumps: tuple[Dump, ...] = ()
    server: bool = False
    reconnect: float = 0
    virtio_header: bool = False
    """stream: frames carry virtio-net headers (vnet_hdr=on; the peer has to do the same)."""
    device: str = ""
    """The device's own id, if it has one beside the netdev's."""
    queues: int = 1
    mtu: int = 0
    """What the guest is told; 0: what the back end takes."""
    without: tuple[str, ...] = ()
    """Names of NET_FEATURES that the device does not offer."""
    slot: Slot = Slot()


class Share(Part, frozen=True, kw_only=True):
    """A folder of the host that the guest mounts as `tag` (9P)."""

    id: str = ""
    folder: str
    tag: str
    readonly: bool = False
    slot: Slot = Slot()


class Vsock(Part, frozen=True, kw_only=True):
    """Stream connections with the host: its side is the Unix socket `path`, and `path`_PORT for the guest's calls. "":
    vsock.sock in the VM's runtime directory, so that VMs which are made of one another do not meet there.
    """

    cid: int = 3
    path: str = ""
    slot: Slot = Slot()


class Balloon(Part, frozen=True, kw_only=True):
    """A memory balloon; `reporting`: free pages of the guest go back to the host by themselves."""

    reporting: bool = True
    deflate_on_oom: bool = True
    slot: Slot = Slot()


class Chardev(Part, frozen=True, kw_only=True):
    """Where the bytes of a serial port or console port go. `hub`: a console shared with those who attach."""

    id: str
    kind: Literal["stdio", "pty", "socket", "file", "null", "fd", "hub"]
    path: str = ""
    server: bool = False
    wait: bool = False
    append: bool = False
    logfile: str = ""
    """Gets all output as well."""
    logappend: bool = False
    input: int = -1
    output: int = -1
    """fd: descriptors of this process, left open at the end."""
    stdio: bool = False
    """hub: our own terminal takes part."""
    escape: bool = True
    """stdio, or a hub with stdio on a terminal: Ctrl-A x leaves."""
    quit_on_hangup: bool = False
    """fd: the VM ends (status 141) when nobody reads the output any more."""


class ConsolePort(Part, frozen=True, kw_only=True):
    """A virtio console port beside the console: a named byte channel."""

    id: int
    name: str
    chardev: str


class Qmp(Part, frozen=True, kw_only=True):
    """An additional QMP socket (every VM with a name in the registry has control.sock)."""

    path: str
    wait: bool = False


class MachineConfig(Part, frozen=True, kw_only=True):
    """A VM."""

    name: str = "vm"
    uuid: str = ""
    """Of the VM, wherever it runs; "": the machine gives itself one."""
    aia: Literal["none", "aplic-imsic"] = "aplic-imsic"
    memory: int = 512 * MIB
    cpus: int = 1
    accel: Literal["kvmcore", "translator", "interpreter", "reference"] = "kvmcore"
    """How kvmcore runs the vCPUs; "kvmcore": as its daemon was told."""
    boot: Boot = Boot()
    drives: tuple[Drive, ...] = ()
    flash: tuple[Flash, ...] = ()
    """Banks 0 and 1."""
    nets: tuple[Net, ...] = ()
    shares: tuple[Share, ...] = ()
    vsock: Vsock | None = None
    balloon: Balloon | None = None
    chardevs: tuple[Chardev, ...] = (Chardev(id="console", kind="hub", stdio=True),)
    serial: str = "console"
    """chardev of the UART; "" for none connected."""
    console: str = "console"
    """chardev of hvc0; "" for no console port 0."""
    ports: tuple[ConsolePort, ...] = ()
    console_slot: Slot = Slot()
    vmgenid: bool = False
    """A generation id, which tells the guest that it has become another VM (devices/vmgenid.py)."""
    rng: bool = True
    rng_slot: Slot = Slot()
    no_reboot: bool = False
    panic_ends: bool = False
    """A reset after the kernel has said on the console that it panics is the VM's failure, and no reset."""
    keep: bool = False
    """The VM outlives its device process: when that is killed it waits for another one (softkvm attach)."""
    login: str = "root"
    """Whom `softkvm ssh` logs in as, wherever the VM is."""
    no_shutdown: bool = False
    paused: bool = False
    """-S: do not start the vCPUs before `cont`."""
    qmp: tuple[Qmp, ...] = ()
    rtc_offset: int = 0
    """Seconds that the guest's clock is ahead of the host's."""

    def validate(self, files: bool = True) -> MachineConfig:
        """self; ConfigError if it cannot be built. Without `files`, what it boots from need not be on this host: the
        machine has booted elsewhere.
        """
        _check_basics(self)
        if files:
            _check_boot(self.boot, self.memory, bool(self.flash))
        _check_devices(self)
        _check_chardevs(self)
        return self

    def chardev(self, name: str) -> Chardev:
        """The chardev of that id."""
        return next(chardev for chardev in self.chardevs if chardev.id == name)


def _demand(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _check_basics(config: MachineConfig) -> None:
    _demand(
        _NAME.match(config.name) is not None,
        f"name {config.name!r}: 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit",
    )
    _demand(not config.uuid or _UUID.match(config.uuid) is not None, f"uuid {config.uuid!r}: is none")
    _demand(LOGIN.match(config.login) is not None, f"login {config.login!r}: no name that a user can have")
    _demand(
        MIN_MEMORY <= config.memory <= MAX_MEMORY,
        f"memory of {config.memory / MIB:g} MiB: between {MIN_MEMORY // MIB} MiB and {MAX_MEMORY // MIB} MiB",
    )
    _demand(config.memory % (2 * MIB) == 0, f"memory of {config.memory} bytes: must be a multiple of 2 MiB")
    _demand(1 <= config.cpus <= MAX_CPUS, f"{config.cpus} CPUs: between 1 and {MAX_CPUS}")


def _check_boot(boot: Boot, memory: int, flash: bool) -> None:
    more = (("initrd", path) for path in boot.initrd_files)
    for what, path in (("kernel", boot.kernel), ("initrd", boot.initrd), *more, ("dtb", boot.dtb)):
        if not path:
            continue
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise ConfigError(f"{what} {path}: {error.strerror}") from error
        _demand(os.path.isfile(path), f"{what} {path}: is not a file")
        _demand(size > 0, f"{what} {path}: is empty")
        _demand(
            size < memory, f"{what} {path}: {size >> 20} MiB do not fit {memory >> 20} MiB of memory (-m)"
        )
    _demand(bool(boot.kernel) or flash, "nothing to boot: give a kernel, an ELF or U-Boot with -kernel FILE")
    _demand(bool(boot.kernel) or not (boot.initrd or boot.append), "-initrd and -append go with -kernel")
    _demand(len(boot.append.encode()) < 2048, "append: a kernel command line has at most 2047 bytes")
    _demand("\0" not in boot.append, "append: a NUL in the kernel command line")


def _check_slots(slots: list[Slot]) -> None:
    for bus, first, count in (("pci", 1, PCI_SLOTS), ("mmio", 0, MMIO_SLOTS)):
        mine = [slot for slot in slots if slot.bus == bus]
        _demand(len(mine) <= count, f"{len(mine)} virtio devices on {bus}: the machine has {count} slots there")
        numbers = [slot.number for slot in mine if slot.number is not None]
        what = "addr=N: a PCI slot is 1 to 0x1f" if bus == "pci" else f"bus=virtio-mmio-bus.N: N is 0 to {count - 1}"
        _demand(all(first <= number < first + count for number in numbers), what)
        _demand(len(numbers) == len(set(numbers)), f"two devices in one {bus} slot")


def _check_devices(config: MachineConfig) -> None:
    slots = [drive.slot for drive in config.drives] + [net.slot for net in config.nets]
    slots += [share.slot for share in config.shares]
    if config.balloon is not None:
        slots.append(config.balloon.slot)
    if config.vsock is not None:
        slots.append(config.vsock.slot)
        _demand(2 < config.vsock.cid < 0xFFFFFFFF, f"guest-cid={config.vsock.cid}: 3 to {0xFFFFFFFE}")
        _demand(
            len(os.fsencode(config.vsock.path)) <= MAX_VSOCK_PATH,
            f"vsock {config.vsock.path}: the socket's path has at most {MAX_VSOCK_PATH} bytes",
        )
    if config.rng:
        slots.append(config.rng_slot)
    if config.console or config.ports:
        slots.append(config.console_slot)
    _check_slots(slots)
    for net in config.nets:
        _demand(
            not net.mac or _MAC.match(net.mac) is not None, f"mac={net.mac}: expected six pairs of hex digits"
        )
        _demand(
            not net.mac or not int(net.mac[:2], 16) & 1,
            f"mac={net.mac}: is a multicast address (first byte odd)",
        )
        _demand(0 < net.queues <= MAX_QUEUES, f"queues={net.queues}: 1 to {MAX_QUEUES}")
        unknown = sorted(set(net.without) - set(NET_FEATURES))
        _demand(not unknown, f"network {net.id}: no feature {unknown[:1]}")
        _demand(net.mtu == 0 or 68 <= net.mtu <= 65535, f"host_mtu={net.mtu}: 68 to 65535")
        _demand(net.kind != "stream" or bool(net.path or net.inet), f"netdev {net.id}: stream needs addr.path=SOCKET")
        _demand(len(os.fsencode(net.path)) <= MAX_SOCKET_PATH, f"netdev {net.id}: {net.path}: too long for a socket's path")
    _demand(len(config.flash) <= MAX_FLASH, f"if=pflash: the machine has {MAX_FLASH} banks, unit=0 and unit=1")
    _demand(all(flash.file for flash in config.flash), "if=pflash: needs file=IMAGE, and unit=0 before unit=1")
    tags = [share.tag for share in config.shares]
    _demand(len(tags) == len(set(tags)), "two shared folders of one tag")
    for share in config.shares:
        _demand(
            _NAME.match(share.tag) is not None and len(share.tag) < 32,
            f"shared folder {share.folder}: its tag {share.tag!r} has to be 1 to 31 letters, digits, '.', '_' and '-'",
        )
        _demand(bool(share.folder), f"shared folder {share.tag}: needs a path")
    for drive in config.drives:
        _demand(bool(drive.file), "drive: needs file=IMAGE")
        _check_drive(drive)
        _demand(drive.format in ("", *DISK_FORMATS), f"format={drive.format}: one of {', '.join(DISK_FORMATS)}")
        _demand(drive.queues is None or 0 < drive.queues <= MAX_QUEUES, f"num-queues={drive.queues}: 1 to {MAX_QUEUES}")
        for what, number, least, most in (
            ("queue-size", drive.queue_size, 4, 1024),
            ("logical_block_size", drive.logical_block_size, 512, 1 << 15),
            ("physical_block_size", drive.physical_block_size, 512, 1 << 20),
        ):
            power = number & (number - 1) == 0
            _demand(power and least <= number <= most, f"{what}={number}: a power of two from {least} to {most}")
        _demand(len(drive.serial.encode()) <= 20, f"serial={drive.serial}: at most 20 bytes")


def _check_drive(drive: Drive) -> None:
    name = drive.id or drive.file
    _demand(drive.cache in DISK_CACHES, f"cache={drive.cache}: one of {', '.join(DISK_CACHES)}")
    _demand(drive.detect_zeroes in ("off", "on", "unmap"), f"detect-zeroes={drive.detect_zeroes}: off, on or unmap")
    _demand(drive.detect_zeroes != "unmap" or drive.discard, f"drive {name}: detect-zeroes=unmap needs discard=unmap")
    _demand(bool(drive.layout) == bool(drive.members), f"drive {name}: several files need driver=mirror or driver=stripe")
    if drive.layout:
        _demand(len(drive.members) >= 2, f"driver={drive.layout}: needs file=IMAGE twice or more")
        _demand(len(set(drive.members)) == len(drive.members), f"driver={drive.layout}: two members are the same")
        power = drive.chunk & (drive.chunk - 1) == 0
        _demand(power and 4096 <= drive.chunk <= 16 * MIB, f"chunk={drive.chunk}: a power of two from 4K to 16M")
    for what, value in drive.limits.items():
        _demand(what in DISK_LIMITS, f"throttling.{what}: there is {', '.join(DISK_LIMITS)}")
        _demand(0 <= value < 1 << 50, f"throttling.{what}={value}: 0 to 2^50")
        average = what.removesuffix("-length").removesuffix("-max")
        if average != what:
            _demand(drive.limits.get(average, 0) > 0, f"throttling.{what}: needs throttling.{average}")
        if what.endswith("-max") and value:
            _demand(value >= drive.limits[average], f"throttling.{what}={value}: less than throttling.{average}")
        if what.endswith("-length"):
            _demand(value > 0, f"throttling.{what}: at least 1 second")
            _demand(drive.limits.get(f"{average}-max", 0) > 0, f"throttling.{what}: needs throttling.{average}-max")
    for unit in ("iops", "bps"):
        both = [part for part in ("read", "write") if drive.limits.get(f"{unit}-{part}")]
        _demand(not (both and drive.limits.get(f"{unit}-total")), f"throttling.{unit}-total and -{both[:1]}: one or the other")
    _demand(0 <= drive.reconnect <= 3600, f"reconnect-delay={drive.reconnect}: 0 to 3600 seconds")


def _check_chardevs(config: MachineConfig) -> None:
    ids = [chardev.id for chardev in config.chardevs]
    _demand(len(ids) == len(set(ids)), f"two chardevs of one id among {', '.join(ids)}")
    uses = [
        name for name in (config.serial, config.console, *(port.chardev for port in config.ports)) if name
    ]
    for name in uses:
        _demand(name in ids, f"chardev {name}: there is none of that id")
        shared = uses.count(name) > 1 and config.chardev(name).kind != "hub"
        _demand(not shared, f"chardev {name}: two devices cannot share it (mux=on makes it a hub)")
    stdio = [chardev for chardev in config.chardevs if chardev.kind == "stdio" or chardev.stdio]
    _demand(len(stdio) <= 1, "two character devices on stdio (mux=on on one of them makes it shared)")
    for chardev in config.chardevs:
        _demand(
            chardev.kind not in ("socket", "file") or bool(chardev.path),
            f"chardev {chardev.id}: needs path=PATH",
        )
    numbers = [port.id for port in config.ports]
    _demand(all(0 < number < 16 for number in numbers), "console ports have ids 1 to 15")
    _demand(len(numbers) == len(set(numbers)), "two console ports of one id")
    for port in config.ports:
        _demand(0 < len(port.name.encode()) < 64, f"console port {port.id}: needs a name of at most 63 bytes")
