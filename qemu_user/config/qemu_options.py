"""QEMU's command-line options into a MachineConfig: one table, OPTIONS, from which parser and help are made.

Used by `python -m qemu_user` and by `softkvm run`, which adds its own. Every option works with one dash and
two. What QEMU has and this machine has not is refused by name; what makes no difference here is accepted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues, parse_size
from qemu_user.config.machine_config import (
    DISK_LIMITS,
    NET_FEATURES,
    Balloon,
    Boot,
    Chardev,
    ConsolePort,
    Drive,
    Dump,
    Flash,
    MachineConfig,
    Net,
    Qmp,
    Share,
    Slot,
    Vsock,
)

if TYPE_CHECKING:
    from qemu_user.config.block_nodes import BlockNodes


class Option(NamedTuple):
    """A row: names without dashes, the value's name in help ("" for a switch), help, what it does to the
    builder.
    """

    names: tuple[str, ...]
    metavar: str
    help: str
    apply: Callable[[Builder, str], None]


_ENGINES = ("translator", "interpreter", "reference")


@dataclass
class ProcessOptions:
    """What concerns the process that the VM lives in, not the VM: it does not go along when the VM moves."""

    cgroup: str = ""
    """As qemu_user.cgroup.parse wants it; "": no limits."""
    only_files: bool = False
    allow_files: list[str] = field(default_factory=list)


class Builder:
    """What the options said so far; finish() joins drives, netdevs and chardevs with the devices that name
    them.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.boot: dict[str, Any] = {}
        self.drives: dict[str, Drive] = {}
        self.flash: dict[int, Flash] = {}
        self.unplugged: set[str] = set()
        self.nodes: BlockNodes | None = None
        self.nets: dict[str, Net] = {}
        self.plugged_nets: list[str] = []
        self.published: list[str] = []
        self.dumps: list[tuple[str, Dump]] = []
        self.folders: dict[str, Share] = {}
        """-fsdev that no device uses yet."""
        self.shares: list[Share] = []
        self.chardevs: dict[str, Chardev] = {}
        self.serials: list[str] = []
        self.ports: list[ConsolePort] = []
        self.qmp: list[Qmp] = []
        self.nographic = False
        self.endpoint = ""
        self.process = ProcessOptions()

    # -- machine -----------------------------------------------------------------------------------

    def machine(self, text: str) -> None:
        values = KeyValues("-machine", text, "type")
        values.take_choice("type", ("virt",), "virt")
        self.fields["aia"] = values.take_choice("aia", ("none", "aplic-imsic"), "aplic-imsic")
        if accel := values.take("accel"):
            self.accel(accel)
        values.ignore("usb", "graphics", "acpi", "dumpdtb")
        values.done()

    def memory(self, text: str) -> None:
        values = KeyValues("-m", text, "size")
        self.fields["memory"] = parse_size("-m", values.take("size"))
        values.done()

    def smp(self, text: str) -> None:
        values = KeyValues("-smp", text, "cpus")
        number = values.take_number("cpus")
        values.ignore("sockets", "cores", "threads", "clusters", "dies", "maxcpus")
        values.done()
        self.fields["cpus"] = number if number is not None else 1

    def accel(self, text: str) -> None:
        values = KeyValues("-accel", text, "name")
        name = values.take_choice("name", ("kvmcore", "kvm", *_ENGINES), "kvmcore")
        engine = values.take_choice("engine", ("kvmcore", *_ENGINES), "kvmcore")
        self.fields["accel"] = name if name in _ENGINES else engine
        self.endpoint = values.take("endpoint", values.take("socket", self.endpoint))
        values.done()

    def cpu(self, text: str) -> None:
        if KeyValues("-cpu", text, "model").take("model") not in ("host", "max", "rv64", "any"):
            raise ConfigError(f"-cpu {text}: the vCPU is kvmcore's; say host or leave it out")

    def name(self, text: str) -> None:
        values = KeyValues("-name", text, "guest")
        self.fields["name"] = values.take("guest")
        values.ignore("process", "debug-threads")
        values.done()

    def bios(self, text: str) -> None:
        if text not in ("none", "default"):
            raise ConfigError(
                f"-bios {text}: there is no M-mode here, the VMM answers SBI; use -kernel for U-Boot"
            )

    def rtc(self, text: str) -> None:
        values = KeyValues("-rtc", text, "base")
        values.take_choice("base", ("utc", "localtime"), "utc")
        values.ignore("clock", "driftfix")
        values.done()

    # -- disks -------------------------------------------------------------------------------------

    def drive(self, text: str) -> None:
        values = KeyValues("-drive", text, "file")
        interface = values.take_choice("if", ("virtio", "none", "pflash"), "virtio")
        driver = values.take_choice("driver", ("", "raw", "qcow2", "nbd", "mirror", "stripe"))
        format = values.take_choice("format", ("", "raw", "qcow2"), driver if driver in ("raw", "qcow2") else "")
        values.ignore("media", "aio", "index", "werror", "rerror", "copy-on-read")
        if interface == "pflash":
            values.ignore("cache", "detect-zeroes")
            self._flash(values, format)
            return
        layout = driver if driver in ("mirror", "stripe") else ""
        files = values.take_all("file")
        chunk = values.take("chunk", "64K")
        name = values.take("id") or f"drive{len(self.drives)}"
        if name in self.drives:
            raise ConfigError(f"-drive {text}: there is a drive {name} already")
        settings: dict[str, Any] = {"layout": layout, "members": tuple(files) if layout or len(files) > 1 else ()}
        self.drives[name] = Drive(
            id=name,
            file=files[0] if files else "",
            format=format,
            chunk=parse_size("chunk", chunk, "B"),
            degraded=values.take_switch("degraded", False),
            cache=values.take("cache", "writeback"),
            detect_zeroes=values.take("detect-zeroes", "off"),
            limits=_limits(values),
            reconnect=values.take_number("reconnect-delay", 10) or 0,
            **settings,
            readonly=values.take_switch("readonly", False),
            discard=values.take_choice("discard", ("unmap", "on", "ignore", "off"), "ignore")
            in ("unmap", "on"),
            serial=values.take("serial"),
        )
        values.done()
        if interface == "none":
            self.unplugged.add(name)

    def blockdev(self, text: str) -> None:
        self._nodes().add(text)

    def _nodes(self) -> BlockNodes:
        from qemu_user.config.block_nodes import BlockNodes

        self.nodes = self.nodes or BlockNodes()
        return self.nodes

    def pflash(self, text: str) -> None:
        values = KeyValues("--pflash", text, "file")
        self._flash(values, values.take_choice("format", ("", "raw", "qcow2")))

    def _flash(self, values: KeyValues, format: str) -> None:
        unit = values.take_number("unit", len(self.flash))
        values.ignore("id")
        if unit in self.flash:
            raise ConfigError(f"{values.option} {values.text}: there is a flash of unit {unit} already")
        self.flash[unit or 0] = Flash(
            file=values.take("file"), format=format, readonly=values.take_switch("readonly", False)
        )
        values.done()

    # -- networks ----------------------------------------------------------------------------------

    def netdev(self, text: str) -> None:
        values = KeyValues("-netdev", text, "type")
        self._net(values, "netdev")

    def nic(self, text: str) -> None:
        values = KeyValues("-nic", text, "type")
        if values.values.get("type") == ["none"]:
            self.fields["no_net"] = True
            return
        model = values.take_choice("model", ("virtio-net-pci", "virtio-net-device", "virtio", ""), "")
        mac = values.take("mac")
        name = self._net(values, "nic")
        self._plug(name, mac, Slot(bus="mmio" if model == "virtio-net-device" else "pci"))

    def _net(self, values: KeyValues, what: str) -> str:
        name = values.take("id") or f"{what}{len(self.nets)}"
        if name in self.nets:
            raise ConfigError(f"-{values.option.strip('-')} {values.text}: there is a netdev {name} already")
        from qemu_user.config.net_options import parse_net

        self.nets[name] = parse_net(values, name)
        return name

    def publish(self, text: str) -> None:
        """docker's -p: on the first user network, made if there is none."""
        from qemu_user.config.net_options import published

        self.published.append(published(text))

    def object(self, text: str) -> None:
        values = KeyValues("-object", text, "qom-type")
        kind = values.take("qom-type")
        if kind in ("throttle-group", "tls-creds-x509"):
            self._nodes().add_object(kind, values)
            return
        if not kind.startswith("filter-"):
            return  # rng-random, memory-backend-..: what they are for is there without them
        if kind != "filter-dump":
            raise ConfigError(f"-object {text}: of QEMU's network filters there is filter-dump")
        netdev, name = values.take("netdev"), values.take("id")
        values.ignore("queue", "status", "position", "insert")
        dump = Dump(id=name, file=values.take("file"), longest=values.take_number("maxlen", 65536) or 0)
        values.done()
        if not dump.file or not name or not 0 < dump.longest <= 262144:
            raise ConfigError(f"-object {text}: needs id=, netdev=, file=, and maxlen= of at most 262144")
        self.dumps.append((netdev, dump))

    def _plug(self, name: str, mac: str, slot: Slot, **settings: Any) -> None:
        self.nets[name] = msgspec.structs.replace(self.nets[name], mac=mac, slot=slot, **settings)
        self.plugged_nets.append(name)

    # -- shared folders ----------------------------------------------------------------------------

    def fsdev(self, text: str) -> None:
        values = KeyValues("-fsdev", text, "fsdriver")
        name = values.take("id")
        if not name or name in self.folders:
            raise ConfigError(f"-fsdev {text}: needs an id of its own")
        self.folders[name] = self._share(values, name, "")
        values.done()

    def virtfs(self, text: str) -> None:
        values = KeyValues("-virtfs", text, "fsdriver")
        self.shares.append(self._share(values, values.take("id"), values.take("mount_tag")))
        values.done()

    def share(self, text: str) -> None:
        folder, colon, tag = text.rpartition(":")
        readonly = colon and tag == "ro" and ":" in folder
        if readonly:
            folder, colon, tag = folder.rpartition(":")
        if not colon:
            raise ConfigError(f"--share {text}: expected DIR:TAG or DIR:TAG:ro")
        self.shares.append(Share(folder=folder, tag=tag, readonly=bool(readonly)))

    def _share(self, values: KeyValues, name: str, tag: str) -> Share:
        values.take_choice("fsdriver", ("local",), "local")
        values.take_choice("security_model", ("none", "passthrough"), "none")
        values.ignore("writeout", "multidevs", "fmode", "dmode")
        return Share(id=name, folder=values.take("path"), tag=tag, readonly=values.take_switch("readonly", False))

    def _p9_device(self, values: KeyValues, slot: Slot) -> None:
        name = values.take("fsdev")
        if name not in self.folders:
            raise ConfigError(f"-device {values.text}: fsdev={name}: no free -fsdev of that id before it")
        self.shares.append(msgspec.structs.replace(self.folders.pop(name), tag=values.take("mount_tag"), slot=slot))

    # -- vsock -------------------------------------------------------------------------------------

    def vsock(self, text: str) -> None:
        values = KeyValues("--vsock", text, "path")
        self._set_vsock(values, "cid", Slot())
        values.done()

    def _vsock_device(self, values: KeyValues, slot: Slot) -> None:
        self._set_vsock(values, "guest-cid", slot)

    def _balloon_device(self, values: KeyValues, slot: Slot) -> None:
        self.fields["balloon"] = Balloon(
            reporting=values.take_switch("free-page-reporting", True),
            deflate_on_oom=values.take_switch("deflate-on-oom", True),
            slot=slot,
        )
        values.ignore("guest-stats-polling-interval", "free-page-hint")

    def _set_vsock(self, values: KeyValues, cid: str, slot: Slot) -> None:
        if "vsock" in self.fields:
            raise ConfigError(f"{values.option} {values.text}: a VM has one vsock device")
        self.fields["vsock"] = Vsock(cid=values.take_number(cid, 3) or 0, path=values.take("path"), slot=slot)

    # -- characters --------------------------------------------------------------------------------

    def chardev(self, text: str) -> None:
        values = KeyValues("-chardev", text, "backend")
        kind = values.take_choice("backend", ("stdio", "pty", "socket", "file", "null"))
        name = values.take("id")
        if not name or name in self.chardevs:
            raise ConfigError(f"-chardev {text}: needs an id of its own")
        mux = values.take_switch("mux", False)
        values.ignore("signal")
        self.chardevs[name] = self._chardev(values, name, kind, mux)

    def _chardev(self, values: KeyValues, name: str, kind: str, mux: bool) -> Chardev:
        fields: dict[str, Any] = {"id": name, "kind": kind}
        fields.update(logfile=values.take("logfile"), logappend=values.take_switch("logappend", False))
        if kind in ("socket", "file"):
            fields["path"] = values.take("path")
        if kind == "file":
            fields["append"] = values.take_switch("append", False)
        if kind == "socket":
            fields["server"] = values.take_switch("server", False)
            fields["wait"] = values.take_switch("wait", fields["server"])
            values.ignore("reconnect", "delay")
        values.done()
        if mux:
            if kind != "stdio":
                raise ConfigError(f"chardev {name}: mux=on goes with stdio only")
            return Chardev(**{**fields, "kind": "hub"}, stdio=True)
        return Chardev(**fields)

    def serial(self, text: str) -> None:
        head, colon, rest = text.partition(":")
        name = f"serial{len(self.serials)}"
        if head == "chardev" and colon:
            self.serials.append(rest)
            return
        if head == "none":
            self.serials.append("")
            return
        if text in ("mon:stdio", "stdio"):
            self.chardevs[name] = Chardev(id=name, kind="hub", stdio=True)
        elif head == "unix" and colon:
            self.chardevs[name] = self._chardev(KeyValues("-serial", rest, "path"), name, "socket", False)
        elif head == "file" and colon:
            self.chardevs[name] = Chardev(id=name, kind="file", path=rest)
        elif text in ("pty", "null"):
            self.chardevs[name] = Chardev(id=name, kind="pty" if text == "pty" else "null")
        else:
            raise ConfigError(
                f"-serial {text}: one of stdio, pty, null, none, file:PATH, unix:PATH[,server=on] or chardev:ID"
            )
        self.serials.append(name)

    def qmp_socket(self, text: str) -> None:
        head, _, rest = text.partition(":")
        if head != "unix" or not rest:
            raise ConfigError(f"-qmp {text}: expected unix:PATH,server=on,wait=off")
        values = KeyValues("-qmp", rest, "path")
        if not values.take_switch("server", True):
            raise ConfigError(f"-qmp {text}: this side is the server (server=on)")
        self.qmp.append(Qmp(path=values.take("path"), wait=values.take_switch("wait", True)))
        values.done()

    # -- devices -----------------------------------------------------------------------------------

    def device(self, text: str) -> None:
        values = KeyValues("-device", text, "driver")
        driver = values.take("driver")
        if handler := _PORTS.get(driver):
            values.ignore("id")
            handler(self, values)
            values.done()
            return
        if driver == "vmgenid":
            self.fields["vmgenid"] = True
            values.ignore("id", "guid")
            values.done()
            return
        name, bus = _bus_of(driver)
        plug = _DEVICES.get(name)
        if plug is None:
            known = ", ".join(f"{known}-pci" for known in _DEVICES)
            raise ConfigError(
                f"-device {driver}: no such device here ({known}, the same with -device for virtio-mmio, "
                f"{', '.join(_PORTS)})"
            )
        slot = self._slot(values, bus)
        values.ignore(*_PCI_SETTINGS)
        plug(self, values, slot)
        values.ignore("id")
        values.done()

    def _slot(self, values: KeyValues, kind: Literal["pci", "mmio"]) -> Slot:
        bus, address = values.take("bus"), values.take("addr")
        if kind == "pci":
            if bus not in ("", "pcie.0", "pci.0"):
                raise ConfigError(f"-device {values.text}: bus={bus}: there is one PCI bus, pcie.0")
            slot, _, function = address.partition(".")
            try:
                if function and int(function, 16):
                    raise ConfigError(f"-device {values.text}: addr={address}: slots have function 0 only")
                return Slot(number=int(slot, 16) if slot else None)
            except ValueError:
                raise ConfigError(f"-device {values.text}: addr={address}: expected a PCI slot such as 4 or 0x1f") from None
        if not bus:
            return Slot(bus="mmio")
        prefix, _, number = bus.rpartition(".")
        if prefix != "virtio-mmio-bus" or not number.isdigit():
            raise ConfigError(f"-device {values.text}: bus={bus}: expected virtio-mmio-bus.0 to .7")
        return Slot(bus="mmio", number=int(number))

    def _blk_device(self, values: KeyValues, slot: Slot) -> None:
        name = values.take("drive")
        if self.nodes is not None and name in self.nodes and name not in self.drives:
            self.drives[name] = self.nodes.drive(name)
            self.unplugged.add(name)
        if name not in self.unplugged:
            wanted = f"no -drive with if=none,id={name} and no -blockdev node-name={name} before it"
            raise ConfigError(f"-device {values.text}: drive={name}: {wanted}")
        self.unplugged.discard(name)
        serial = values.take("serial") or self.drives[name].serial
        values.ignore("bootindex", "write-cache", "min_io_size", "opt_io_size", "discard_granularity")
        values.ignore("scsi", "config-wce", "share-rw")
        # plugged drives come in the order of their devices
        drive = msgspec.structs.replace(
            self.drives.pop(name),
            slot=slot,
            serial=serial,
            device=values.take("id"),
            queues=values.take_number("num-queues"),
            queue_size=values.take_number("queue-size", 256),
            logical_block_size=values.take_number("logical_block_size", 512),
            physical_block_size=values.take_number("physical_block_size", 4096),
        )
        self.drives[name] = drive

    def _net_device(self, values: KeyValues, slot: Slot) -> None:
        name = values.take("netdev")
        if name not in self.nets or name in self.plugged_nets:
            raise ConfigError(f"-device {values.text}: netdev={name}: no free -netdev of that id before it")
        values.ignore("bootindex", "rx_queue_size", "tx_queue_size")
        self._plug(
            name,
            values.take("mac"),
            slot,
            device=values.take("id"),
            mtu=values.take_number("host_mtu", 0),
            without=tuple(feature for feature in NET_FEATURES if not values.take_switch(feature, True)),
        )

    def _rng_device(self, values: KeyValues, slot: Slot) -> None:
        values.ignore("rng", "max-bytes", "period")
        self.fields.update(rng=True, rng_slot=slot)

    def _serial_device(self, values: KeyValues, slot: Slot) -> None:
        values.ignore("max_ports")
        self.fields["console_slot"] = slot

    def _console_device(self, values: KeyValues) -> None:
        if self.fields.get("console"):
            raise ConfigError(
                "-device virtconsole: there is one console (hvc0); use virtserialport for more ports"
            )
        self.fields["console"] = values.take("chardev")
        values.ignore("name", "nr", "bus")

    def _port_device(self, values: KeyValues) -> None:
        number = values.take_number("nr", len(self.ports) + 1)
        self.ports.append(
            ConsolePort(id=number or 0, name=values.take("name"), chardev=values.take("chardev"))
        )
        values.ignore("bus")

    # -- the end -----------------------------------------------------------------------------------

    def finish(self) -> MachineConfig:
        """The validated configuration. ConfigError."""
        no_net = self.fields.pop("no_net", False)
        if unused := sorted(self.unplugged):
            raise ConfigError(
                f"-drive if=none,id={unused[0]}: no -device virtio-blk-pci,drive={unused[0]} uses it"
            )
        if self.nodes is not None and (left := self.nodes.unused()):
            raise ConfigError(f"-blockdev node-name={left[0]}: no -device virtio-blk-pci,drive={left[0]} uses it")
        self.finish_nets()
        nets = [self.nets[name] for name in self.plugged_nets]
        if not no_net:  # which is about those that no device was asked for
            nets += [net for name, net in self.nets.items() if name not in self.plugged_nets]
        if len(self.serials) > 1:
            raise ConfigError("-serial: this machine has one serial port")
        if not self.serials:
            self.serial(
                "stdio" if not any(c.stdio or c.kind == "stdio" for c in self.chardevs.values()) else "none"
            )
        self.fields.setdefault("console", "")
        return MachineConfig(
            **self.fields,
            boot=Boot(**self.boot),
            drives=tuple(self.drives.values()),
            flash=tuple(self.flash.get(unit, Flash(file="")) for unit in range(max(self.flash, default=-1) + 1)),
            nets=tuple(nets),
            shares=tuple(self.shares),
            chardevs=tuple(self.chardevs.values()),
            serial=self.serials[0],
            ports=tuple(self.ports),
            qmp=tuple(self.qmp),
        ).validate()


    def finish_nets(self) -> None:
        """Published ports and recorders find their networks. ConfigError."""
        if self.published:
            user = next((name for name, net in self.nets.items() if net.kind == "user"), "")
            if not user:
                user = "net0" if "net0" not in self.nets else "published"
                self.nets[user] = Net(id=user)
            net = self.nets[user]
            self.nets[user] = msgspec.structs.replace(net, forwards=(*net.forwards, *self.published))
        for netdev, dump in self.dumps:
            if netdev not in self.nets:
                raise ConfigError(f"-object filter-dump,id={dump.id}: netdev={netdev}: no -netdev of that id")
            net = self.nets[netdev]
            self.nets[netdev] = msgspec.structs.replace(net, dumps=(*net.dumps, dump))


_PCI_SETTINGS = (
    "disable-legacy", "disable-modern", "iommu_platform", "ats", "vectors", "multifunction", "romfile", "event_idx",
    "indirect_desc", "page-per-vq", "iothread", "ioeventfd",
)  # fmt: skip
"""What QEMU's virtio devices on PCI have and what makes no difference here."""
_DEVICES: dict[str, Callable[[Builder, KeyValues, Slot], None]] = {
    "virtio-blk": Builder._blk_device,
    "virtio-net": Builder._net_device,
    "virtio-rng": Builder._rng_device,
    "virtio-serial": Builder._serial_device,
    "virtio-9p": Builder._p9_device,
    "virtio-vsock": Builder._vsock_device,
    "virtio-balloon": Builder._balloon_device,
}
_PORTS: dict[str, Callable[[Builder, KeyValues], None]] = {
    "virtconsole": Builder._console_device,
    "virtserialport": Builder._port_device,
}


def _limits(values: KeyValues) -> dict[str, int]:
    """What a drive is limited to: throttling.* and the older names of the same."""
    limits = {}
    for name in DISK_LIMITS:
        old = name.replace("-total", "").replace("-read", "_rd").replace("-write", "_wr").replace("-", "_")
        for key in (f"throttling.{name}", old):
            if text := values.take(key):
                limits[name] = parse_size(key, text, "B")
    return limits


def _bus_of(driver: str) -> tuple[str, Literal["pci", "mmio"]]:
    """(device, bus) of a driver's name: -device is virtio-mmio, -pci or nothing is PCI."""
    if driver.endswith("-device"):
        return driver.removesuffix("-device"), "mmio"
    return driver.removesuffix("-non-transitional").removesuffix("-pci"), "pci"


def _boot(field: str) -> Callable[[Builder, str], None]:
    return lambda builder, text: builder.boot.__setitem__(field, text)


def _flag(field: str) -> Callable[[Builder, str], None]:
    return lambda builder, text: builder.fields.__setitem__(field, True)


def _cgroup(builder: Builder, text: str) -> None:
    builder.process.cgroup = text


def _only_files(builder: Builder, text: str) -> None:
    builder.process.only_files = True


def _nothing(builder: Builder, text: str) -> None:
    pass


def _rng(builder: Builder, text: str) -> None:
    if text not in ("on", "off"):
        raise ConfigError(f"-rng {text}: on or off")
    builder.fields["rng"] = text == "on"


def _balloon(builder: Builder, text: str) -> None:
    builder.fields["balloon"] = Balloon()


OPTIONS: tuple[Option, ...] = (
    Option(
        ("M", "machine"),
        "virt[,aia=..]",
        "the machine; aia=aplic-imsic (default; the PLIC is there as well) or none (PLIC alone)",
        Builder.machine,
    ),
    Option(("m",), "SIZE", "memory, 512M, 2G (default 512M)", Builder.memory),
    Option(("smp",), "N", "number of CPUs", Builder.smp),
    Option(("kernel",), "FILE", "what to boot: a flat Image, an ELF, or U-Boot", _boot("kernel")),
    Option(("initrd",), "FILE", "initial RAM disk", _boot("initrd")),
    Option(("append",), "WORDS", "kernel command line", _boot("append")),
    Option(("dtb",), "FILE", "device tree instead of the machine's own", _boot("dtb")),
    Option(
        ("drive",),
        "file=F[,..]",
        "disk: format=, readonly=on, discard=unmap, if=virtio|none|pflash, id=",
        Builder.drive,
    ),
    Option(("blockdev",), "DRIVER,node-name=N,..", "disk as a node for -device: raw or qcow2 over file, nbd", Builder.blockdev),
    Option(("pflash",), "FILE", "flash bank (-drive if=pflash,file=FILE): firmware, then variables", Builder.pflash),
    Option(
        ("netdev",),
        "KIND,id=..",
        "network: user[,hostfwd=tcp::2222-:22], switch[,vlan=], tap,ifname=, stream,addr.path=, socket, dgram",
        Builder.netdev,
    ),
    Option(("p", "publish"), "[HOST:]PORT:GUESTPORT", "forward a port of the host to the guest (user)", Builder.publish),
    Option(("nic",), "KIND|none", "network with its device in one", Builder.nic),
    Option(("share",), "DIR:TAG[:ro]", "shared folder: mount -t 9p -o trans=virtio TAG /mnt", Builder.share),
    Option(("vsock",), "PATH[,cid=N]", "vsock: CONNECT PORT on PATH, the guest's calls on PATH_PORT", Builder.vsock),
    Option(("balloon",), "", "memory balloon: -device virtio-balloon-pci", _balloon),
    Option(("fsdev",), "local,id=..,path=..", "folder for -device virtio-9p-pci,fsdev=,mount_tag=", Builder.fsdev),
    Option(("virtfs",), "local,path=..,mount_tag=..", "-fsdev and -device virtio-9p-pci in one", Builder.virtfs),
    Option(
        ("device",),
        "NAME[,..]",
        "virtio-{blk,net,rng,serial,9p,vsock,balloon}-pci[,addr=] or -device, virtconsole, virtserialport, vmgenid",
        Builder.device,
    ),
    Option(("chardev",), "KIND,id=..", "stdio, pty, socket, file, null", Builder.chardev),
    Option(
        ("serial",),
        "WHERE",
        "the UART: stdio, pty, null, none, file:PATH, unix:PATH,server=on, chardev:ID",
        Builder.serial,
    ),
    Option(("nographic",), "", "no graphics (there are none)", _nothing),
    Option(("display",), "none", "no graphics", _nothing),
    Option(("monitor",), "none", "accepted; management is QMP", _nothing),
    Option(("qmp",), "unix:PATH,..", "one more QMP socket", Builder.qmp_socket),
    Option(("name",), "NAME", "the VM's name", Builder.name),
    Option(
        ("accel",),
        "kvmcore[,engine=..]",
        "engine=translator, interpreter or reference: how vCPUs run; endpoint=ipc://.. to choose the daemon",
        Builder.accel,
    ),
    Option(("cpu",), "host", "accepted", Builder.cpu),
    Option(("bios",), "none", "accepted", Builder.bios),
    Option(("rtc",), "base=utc", "accepted", Builder.rtc),
    Option(("object",), "filter-dump,..", "id=,netdev=,file=: records a network as pcap; others are accepted", Builder.object),
    Option(("global",), "..", "accepted", _nothing),
    Option(("rng",), "on|off", "the entropy device (default on)", _rng),
    Option(("no-reboot",), "", "a reset of the guest ends the VM", _flag("no_reboot")),
    Option(("keep",), "", "the VM outlives this process: softkvm attach NAME goes on after a kill -9", _flag("keep")),
    Option(("cgroup",), "memory=SIZE,..", "cpus=N, pids=N, parent=DIR: limits of the VM's two processes", _cgroup),
    Option(("only-files",), "", "the device process reaches what the VM is made of alone", _only_files),
    Option(("allow-files",), "DIR", "with only-files: DIR too", lambda builder, text: builder.process.allow_files.append(text)),
    Option(("no-shutdown",), "", "a shutdown of the guest stops it only", _flag("no_shutdown")),
    Option(("S",), "", "wait for `cont` before the first instruction", _flag("paused")),
)


class _Collect(argparse.Action):
    """Keeps the options in the order of the command line, for the builder."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        collected = list(getattr(namespace, self.dest, None) or [])
        collected.append((self.const, values if isinstance(values, str) else ""))
        setattr(namespace, self.dest, collected)


def add_arguments(parser: Any, leave_out: frozenset[str] = frozenset()) -> None:
    """Give an argparse parser (or group) these options, but those whose first name is in `leave_out`."""
    for option in OPTIONS:
        if option.names[0] in leave_out:
            continue
        flags = [dash + name for name in option.names for dash in ("-", "--")]
        value: dict[str, Any] = (
            {"metavar": option.metavar.replace("%", "%%")} if option.metavar else {"nargs": 0}
        )
        parser.add_argument(
            *flags, dest="qemu_options", action=_Collect, const=option, help=option.help, **value
        )


def collect(namespace: argparse.Namespace) -> Builder:
    """The options of a parsed command line, applied; the caller may change the builder before finish()."""
    builder = Builder()
    for option, text in getattr(namespace, "qemu_options", None) or []:
        option.apply(builder, text)
    return builder


def from_namespace(namespace: argparse.Namespace) -> MachineConfig:
    """collect() and finish()."""
    return collect(namespace).finish()


def parse(argv: list[str]) -> tuple[MachineConfig, str]:
    """(configuration, kvmcore endpoint or "") of a QEMU command line. ConfigError; argparse exits 2 on
    unknown options.
    """
    builder = built(argv)
    return builder.finish(), builder.endpoint


def built(argv: list[str]) -> Builder:
    """The same before finish(), with what concerns the process that the VM is to live in."""
    parser = argparse.ArgumentParser(
        prog="python -m qemu_user", allow_abbrev=False, description="Run one VM on a kvmcore daemon."
    )
    add_arguments(parser)
    return collect(parser.parse_args(argv))
