"""The image `debian`: Debian 13 with systemd, sshd and apt on a disk of its own, built by a guest.

The host fetches checked packages and lays them out as one tar (root_tar.py); a throw-away VM makes the file system, unpacks
the tar and configures the packages (debian_files/build.sh, second-stage.sh). So it takes no root and no tool of the host.
Called by store.py into an empty folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_user.images import build_vm, busybox, cpio, deb
from qemu_user.images.dependencies import Package, closure
from qemu_user.images.root_tar import RootTar, merged

if TYPE_CHECKING:
    from qemu_user.images.download import Progress

#: What is asked for beside the required packages; dependencies come by themselves, recommendations do not.
PACKAGES = (
    "systemd-sysv", "udev", "dbus", "libpam-systemd", "systemd-resolved", "libnss-resolve", "libnss-myhostname",
    "openssh-server", "openssh-client", "sudo", "apt", "debian-archive-keyring", "ca-certificates", "curl", "iproute2",
    "iputils-ping", "netbase", "procps", "kmod", "e2fsprogs", "bash-completion", "less", "nano",
)  # fmt: skip
#: Bytes of the file system; the image grows as it is filled. A VM's own disk may be larger.
DISK_SIZE = 8 << 30
#: For hardware that no VM has, more than half of the modules. cfg80211 would be loaded at each boot: networkd asks for it.
_NO_MODULES = (
    "kernel/sound/", "kernel/drivers/ata/", "kernel/drivers/bluetooth/", "kernel/drivers/gpu/", "kernel/drivers/hid/",
    "kernel/drivers/hwmon/", "kernel/drivers/iio/", "kernel/drivers/infiniband/", "kernel/drivers/input/",
    "kernel/drivers/leds/", "kernel/drivers/media/", "kernel/drivers/memstick/", "kernel/drivers/message/",
    "kernel/drivers/mmc/", "kernel/drivers/mtd/", "kernel/drivers/net/can/", "kernel/drivers/net/dsa/",
    "kernel/drivers/net/ethernet/", "kernel/drivers/net/ieee802154/", "kernel/drivers/net/usb/",
    "kernel/drivers/net/wireless/", "kernel/drivers/net/wwan/", "kernel/drivers/scsi/aic7xxx/", "kernel/drivers/scsi/bfa/",
    "kernel/drivers/scsi/lpfc/", "kernel/drivers/scsi/mpi3mr/", "kernel/drivers/scsi/mpt3sas/",
    "kernel/drivers/scsi/qla2xxx/", "kernel/drivers/soundwire/", "kernel/drivers/staging/", "kernel/drivers/usb/",
    "kernel/drivers/video/", "kernel/net/bluetooth/", "kernel/net/mac80211/",
    "kernel/net/nfc/", "kernel/net/rfkill/", "kernel/net/wireless/",
)  # fmt: skip
#: What mke2fs is made of, by the package that has it.
_TOOLS = {
    "e2fsprogs": ("usr/sbin/mke2fs", "etc/mke2fs.conf"),
    "libc6": ("usr/lib/riscv64-linux-gnu/ld-linux", "usr/lib/riscv64-linux-gnu/libc.so", "usr/lib/ld-linux"),
    "libext2fs2t64": ("usr/lib/riscv64-linux-gnu/lib",),
    "libcom-err2": ("usr/lib/riscv64-linux-gnu/lib",),
    "libblkid1": ("usr/lib/riscv64-linux-gnu/lib",),
    "libuuid1": ("usr/lib/riscv64-linux-gnu/lib",),
}
#: Ours, in the image: where -> (file in debian_files, mode).
_OWN = {
    "second-stage": "second-stage.sh",
    "etc/systemd/system/softkvm-agent.service": "softkvm-agent.service",
    "usr/lib/softkvm/agent": "softkvm-agent.sh",
    "etc/systemd/system/sshd-extra@.service.d/softkvm.conf": "sshd-extra.conf",
    "etc/systemd/network/80-softkvm.network": "80-softkvm.network",
    "etc/apt/sources.list.d/debian.sources": "debian.sources",
}
_AGENT_WANTED = "etc/systemd/system/dev-virtio\\x2dports-org.softkvm.control.device.wants/softkvm-agent.service"


def build(target: Path, progress: Progress) -> str:
    """Make kernel, initrd, disk and a list of packages in `target`; returns how packages were verified. ImageError."""
    from qemu_user.backends.block.qcow2.create import create_qcow2
    from qemu_user.images import archive
    from qemu_user.images.store import DISK

    with tempfile.TemporaryDirectory(dir=target, prefix=".packages-") as name:
        folder = Path(name)
        listed, how = archive.packages(folder, progress)
        kernel = busybox.build_from(listed, target, folder, progress)
        chosen = closure(listed, PACKAGES)
        debs = []
        total = sum(int(package["Size"]) for package in chosen)
        done = 0
        for package in chosen:
            debs.append(archive.fetch(package, folder, lambda *_: None))
            done += int(package["Size"])
            progress(f"fetching {len(chosen)} packages", done, total)
        (target / "packages").write_text("".join(f"{p['Package']} {p['Version']} {p['SHA256']}\n" for p in chosen))
        tar = folder / "root.tar"
        _write_tar(tar, list(zip(debs, chosen, strict=True)), kernel, progress)
        disk = target / DISK
        create_qcow2(disk, DISK_SIZE)
        hear = _Listener(progress, len(chosen))
        modules = (target / "modules-ext4").read_bytes()
        script = files("qemu_user.images").joinpath("debian_files/build.sh").read_text()
        disks = [(disk, False), (tar, True)]
        build_vm.run(target / "kernel", target / "initrd", modules, _tools(zip(debs, chosen, strict=True)), script, disks, hear)
    return how


def _write_tar(path: Path, packages: list[tuple[Path, Package]], kernel: Path, progress: Progress) -> None:
    with path.open("wb") as file:
        with RootTar(file, 0) as root:
            for count, (package, paragraph) in enumerate(packages):
                root.package(package, paragraph)
                progress("unpacking packages", count + 1, 0)
            for entry, content in deb.entries(kernel):
                name = merged(entry.name)
                inside = name.removeprefix("usr/lib/modules/").partition("/")[2]
                if entry.isfile() and name.startswith("usr/lib/modules/") and not inside.startswith(_NO_MODULES):
                    root.file(name, content)
            for place, source in _OWN.items():
                root.file(place, files("qemu_user.images").joinpath(f"debian_files/{source}").read_bytes())
            root.link(_AGENT_WANTED, "/etc/systemd/system/softkvm-agent.service")
        file.truncate(-(-file.tell() // 4096) * 4096)


def _tools(packages: Iterable[tuple[Path, Package]]) -> cpio.Archive:
    """mke2fs and its libraries, under /tools of the initrd."""
    tools = cpio.Archive()
    for path, package in packages:
        wanted = _TOOLS.get(package["Package"])
        for entry, content in deb.entries(path) if wanted else ():
            name = merged(entry.name)
            if not name.startswith(wanted or ()):
                continue
            if entry.issym():
                tools.symlink(f"tools/{name}", entry.linkname)
            elif entry.isfile():
                tools.file(f"tools/{name}", content, 0o755)
    tools.symlink("tools/lib", "usr/lib")
    return tools


class _Listener:
    """Progress from what the scripts in the VM say."""

    def __init__(self, progress: Progress, packages: int) -> None:
        self._progress, self._packages = progress, packages
        self._phase = "starting the VM that builds"
        self._installed: set[str] = set()

    def __call__(self, line: str) -> None:
        words = line.split()
        if words[:1] == ["phase"]:
            self._phase = line.removeprefix("phase ")
            self._progress(self._phase, 0, 0)
        elif words[:1] == ["status:"] and words[-1] == "installed":
            self._installed.add(words[1])
            self._progress(self._phase, len(self._installed), self._packages)
