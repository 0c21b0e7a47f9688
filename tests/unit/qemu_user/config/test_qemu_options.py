"""QEMU's command lines into configurations, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import KeyValues, parse_size, split_commas
from qemu_user.config.machine_config import Balloon, Boot, MachineConfig, Slot, Vsock
from qemu_user.config.qemu_options import OPTIONS, ProcessOptions, built, parse


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "Image"
    path.write_bytes(b"x")
    return str(path)


def _parse(kernel: str, line: str) -> MachineConfig:
    return parse(["-kernel", kernel, *line.split()])[0]


def test_one_and_two_dashes(kernel: str) -> None:
    one = _parse(kernel, "-m 1G -smp 2 -M virt,aia=none -nographic -name web -S -no-reboot")
    two = _parse(kernel, "--m 1024M --smp cpus=2 --machine virt,aia=none --nographic --name guest=web --S --no-reboot")
    assert one == two
    assert (one.memory, one.cpus, one.aia, one.name, one.paused, one.no_reboot) == (1 << 30, 2, "none", "web", True, True)


def test_append_is_taken_as_it_is(kernel: str) -> None:
    config, _ = parse(["-kernel", kernel, "-append", "console=ttyS0,115200 root=/dev/vda"])
    assert config.boot.append == "console=ttyS0,115200 root=/dev/vda"


def test_disks(kernel: str) -> None:
    config = _parse(
        kernel,
        "-drive file=/a,,b,format=raw,readonly=on,discard=unmap,if=virtio "
        "-drive file=/c,if=none,id=x0 -device virtio-blk-device,drive=x0,bus=virtio-mmio-bus.0,serial=S1",
    )
    first, second = config.drives
    assert first.slot == Slot(bus="pci")
    assert (first.file, first.readonly, first.discard) == ("/a,b", True, True)
    assert (second.file, second.slot, second.serial) == ("/c", Slot(bus="mmio", number=0), "S1")


def test_slots(kernel: str) -> None:
    config = _parse(
        kernel,
        "-drive file=/a,if=none,id=a -device virtio-blk-pci,drive=a,addr=0x1f,bus=pcie.0,id=disk0 "
        "-drive file=/b,if=none,id=b -device virtio-blk,drive=b,addr=a.0,disable-legacy=on "
        "-device virtio-rng-device -device virtio-serial-pci-non-transitional -nic user,model=virtio-net-device",
    )
    assert [drive.slot for drive in config.drives] == [Slot(number=31), Slot(number=10)]
    assert config.rng_slot == Slot(bus="mmio")
    assert config.console_slot == Slot()
    assert config.nets[0].slot == Slot(bus="mmio")


def test_settings_of_disks_and_networks(kernel: str) -> None:
    config = _parse(
        kernel,
        "-drive file=/a,if=none,id=a -device virtio-blk-pci,drive=a,id=d0,num-queues=3,queue-size=64,logical_block_size=4096 "
        "-netdev stream,id=s,addr.path=/tmp/s,vnet_hdr=on,queues=2 "
        "-device virtio-net-pci,netdev=s,id=n0,host_mtu=9000,csum=off,mq=on",
    )
    drive, net = config.drives[0], config.nets[0]
    assert (drive.device, drive.queues, drive.queue_size, drive.logical_block_size) == ("d0", 3, 64, 4096)
    assert (net.device, net.virtio_header, net.queues, net.mtu, net.without) == ("n0", True, 2, 9000, ("csum",))


def test_shares_vsock_and_balloon(kernel: str) -> None:
    config = _parse(
        kernel,
        "-share /a:one -share /b:two:ro -virtfs local,path=/c,mount_tag=three,security_model=none "
        "-fsdev local,id=f,path=/d,security_model=passthrough -device virtio-9p-pci,fsdev=f,mount_tag=four,addr=9 "
        "-vsock /tmp/v,cid=7 -balloon",
    )
    assert [(share.folder, share.tag, share.readonly) for share in config.shares] == [
        ("/a", "one", False), ("/b", "two", True), ("/c", "three", False), ("/d", "four", False),
    ]  # fmt: skip
    assert config.shares[3].slot == Slot(number=9)
    assert (config.vsock.path, config.vsock.cid) == ("/tmp/v", 7) if config.vsock else False
    assert config.balloon == Balloon()
    other = _parse(kernel, "-device virtio-vsock-device,guest-cid=4,path=/v -device virtio-balloon-pci,free-page-reporting=off")
    assert other.vsock == Vsock(cid=4, path="/v", slot=Slot(bus="mmio"))
    assert other.balloon == Balloon(reporting=False)


def test_networks(kernel: str) -> None:
    config = _parse(
        kernel,
        "-netdev user,id=n,hostfwd=tcp::2222-:22,hostfwd=udp:127.0.0.1:53-:53 "
        "-device virtio-net-device,netdev=n,mac=52:54:00:00:00:01 "
        "-netdev stream,id=s,addr.type=unix,addr.path=/tmp/s,server=on -nic tap,ifname=tap7",
    )
    kinds = {net.id: net for net in config.nets}
    assert kinds["n"].forwards == ("tcp::2222-:22", "udp:127.0.0.1:53-:53")
    assert kinds["n"].mac == "52:54:00:00:00:01"
    assert (kinds["s"].kind, kinds["s"].path, kinds["s"].server) == ("stream", "/tmp/s", True)
    assert sorted(net.kind for net in config.nets) == ["stream", "tap", "user"]
    assert _parse(kernel, "-nic none").nets == ()
    assert _parse(kernel, "-netdev user,id=n -nic none").nets == ()
    (net,) = _parse(kernel, "-netdev user,id=n -device virtio-net-device,netdev=n -nic none").nets
    assert net.id == "n"


def test_characters(kernel: str) -> None:
    config = _parse(
        kernel,
        "-serial unix:/tmp/u,server=on,wait=off -chardev pty,id=p -device virtio-serial-device "
        "-device virtconsole,chardev=p -chardev file,id=f,path=/tmp/f -device virtserialport,chardev=f,name=org.x,nr=3",
    )
    assert config.chardev(config.serial).kind == "socket"
    assert not config.chardev(config.serial).wait
    assert config.console == "p"
    assert [(port.id, port.name, port.chardev) for port in config.ports] == [(3, "org.x", "f")]
    assert config.rng
    assert not _parse(kernel, "-rng off").rng


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("-m 1", "memory"),
        ("-m lots", "size"),
        ("-smp 0", "CPUs"),
        ("-smp many", "number"),
        ("-M microvm", "virt"),
        ("-M virt,gic=3", "gic"),
        ("-drive format=vmdk,file=x", "raw"),
        ("-drive file=x,if=none,id=a", "uses it"),
        ("-drive readonly=on", "file"),
        ("-device virtio-blk-pci,drive=a", "if=none,id=a"),
        ("-device virtio-rng-pci,bus=pcie.1", "pcie.0"),
        ("-device virtio-rng-pci,addr=0", "1 to 0x1f"),
        ("-device virtio-rng-pci,addr=20", "1 to 0x1f"),
        ("-device virtio-rng-pci,addr=4.1", "function 0"),
        ("-device virtio-rng-pci,addr=x", "expected a PCI slot"),
        ("-device virtio-rng-pci,addr=4 -netdev user,id=n -device virtio-net-pci,netdev=n,addr=4.0", "two devices"),
        ("-device e1000", "no such device"),
        ("-drive file=x,if=none,id=a -device virtio-blk-pci,drive=a,num-queues=0", "1 to 64"),
        ("-drive file=x,if=none,id=a -device virtio-blk-pci,drive=a,queue-size=100", "power of two"),
        ("-drive file=x,if=none,id=a -device virtio-blk-pci,drive=a,logical_block_size=100", "power of two"),
        ("-netdev user,id=n,queues=99", "1 to 64"),
        ("-share /a", "DIR:TAG"),
        ("-share /a:b/c", "tag"),
        ("-share /a:t -share /b:t", "one tag"),
        ("-device virtio-9p-pci,fsdev=f,mount_tag=x", "no free -fsdev"),
        ("-vsock /a -vsock /b", "one vsock"),
        ("-vsock /a,cid=2", "guest-cid"),
        ("-vsock /" + "x" * 100, "socket's path"),
        ("-netdev user,id=a -netdev user,id=a", "already"),
        ("-netdev user,id=a,speed=9", "speed"),
        ("-nic user,mac=1:2", "mac"),
        ("-nic user,mac=01:00:00:00:00:00", "multicast"),
        ("-name a/b", "name"),
        ("-serial warp", "serial"),
        ("-serial chardev:nope", "nope"),
        ("-bios fw.bin", "M-mode"),
        ("-accel tcg", "kvmcore"),
        ("-qmp tcp:1", "unix"),
        ("-initrd /does/not/exist", "initrd"),
    ],
)
def test_what_is_wrong_is_said(kernel: str, line: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _parse(kernel, line)


def test_no_kernel() -> None:
    with pytest.raises(ConfigError, match="-kernel"):
        parse([])


def test_too_many_devices(kernel: str) -> None:
    with pytest.raises(ConfigError, match="slots"):
        _parse(kernel, " ".join(f"-drive file=d{n}" for n in range(31)))
    with pytest.raises(ConfigError, match="slots"):
        _parse(kernel, " ".join(f"-drive file=d{n},if=none,id=d{n} -device virtio-blk-device,drive=d{n}" for n in range(9)))


def test_configuration_by_hand(kernel: str) -> None:
    config = MachineConfig(boot=Boot(kernel=kernel)).validate()
    assert config.chardev("console").kind == "hub"


def test_every_option_has_help() -> None:
    assert all(option.help for option in OPTIONS)
    names = [name for option in OPTIONS for name in option.names]
    assert len(names) == len(set(names))


def test_commas_and_sizes() -> None:
    assert split_commas("a,,b,c") == ["a,b", "c"]
    assert KeyValues("-x", "stdio,id=a,nowait", "kind").values == {"kind": ["stdio"], "id": ["a"], "wait": ["off"]}
    assert parse_size("-m", "1.5G") == 3 << 29
    with pytest.raises(ConfigError):
        KeyValues("-x", "a,,,")


@pytest.mark.parametrize(
    ("line", "accel"),
    [
        ("", "kvmcore"),
        ("-accel kvm", "kvmcore"),
        ("-accel kvmcore,endpoint=ipc:///x", "kvmcore"),
        ("-accel kvmcore,engine=interpreter", "interpreter"),
        ("-accel reference", "reference"),
        ("-machine virt,accel=translator", "translator"),
    ],
)
def test_how_vcpus_run(kernel: str, line: str, accel: str) -> None:
    assert _parse(kernel, line).accel == accel


def test_what_concerns_the_process_is_no_part_of_the_machine(kernel: str) -> None:
    words = ["-kernel", kernel, "-cgroup", "memory=1G,pids=99", "-only-files", "-allow-files", "/a", "--allow-files", "/b"]
    assert built(words).process == ProcessOptions("memory=1G,pids=99", only_files=True, allow_files=["/a", "/b"])
    assert built(words).finish() == built(["-kernel", kernel]).finish()


@pytest.mark.parametrize("login", ["", "a b", "ada\n", "-oProxyCommand=x", "x" * 33])
def test_who_logs_in_is_a_user(login: str) -> None:
    """It may come from another host, and becomes an option of ssh's."""
    with pytest.raises(ConfigError, match="login"):
        MachineConfig(login=login).validate(files=False)
