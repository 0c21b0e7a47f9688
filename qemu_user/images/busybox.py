"""The image `busybox`: Debian's kernel, busybox-static and the few modules that virtio devices need.

Built in plain Python from three checked packages: no root, no mounts. Called by store.py into an empty folder.
"""

from __future__ import annotations

import lzma
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_user.images import cpio, deb
from qemu_user.images.boot_files import add_scripts
from qemu_user.images.errors import ImageError

if TYPE_CHECKING:
    from qemu_user.images.download import Progress

#: Modules by the virtio device that needs them; dependencies are found in the modules themselves.
MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng")
#: What only some VMs need, each an archive of its own behind the initrd of those VMs.
EXTRAS = {
    "ext4": ("ext4", "crc32c_generic"),
    "9p": ("9pnet_virtio", "9p"),
    "vsock": ("vmw_vsock_virtio_transport",),
    "balloon": ("virtio_balloon",),
}
#: Applets that /init and people use before anything could be installed.
_APPLETS = """[ [[ ash awk base64 basename cat chmod chown clear cmp cp cut date dd df diff dirname dmesg du echo egrep
env expr false fdisk fgrep find free getty grep gunzip gzip halt head hexdump hostname id ifconfig insmod ip kill killall
less ln login ls lsmod md5sum mkdir mkfifo mknod mktemp modprobe more mount mv nc netstat nproc nslookup od ping pkill
poweroff printf ps pwd reboot reset rm rmdir rmmod route sed seq setsid sh sha256sum sleep sort stat stty su sync
tail tar tee telnet test time timeout top touch tr true tty udhcpc umount uname uniq uptime usleep vi wc wget which
whoami xargs xxd yes zcat cttyhack"""


def build(target: Path, progress: Progress) -> str:
    """Make kernel and initrd in `target`; returns how the packages were verified. ImageError."""
    from qemu_user.images import archive  # HTTP, signatures: a warm cache needs neither

    with tempfile.TemporaryDirectory(dir=target, prefix=".packages-") as name:
        folder = Path(name)
        listed, how = archive.packages(folder, progress)
        build_from(listed, target, folder, progress)
    return how


def build_from(listed: list[dict[str, str]], target: Path, folder: Path, progress: Progress) -> Path:
    """The same of these packages of the suite, fetched into `folder`; the kernel's package. ImageError."""
    from qemu_user.images import archive

    kernel_deb = archive.fetch(_kernel(listed), folder, progress)
    busybox_deb = archive.fetch(package(listed, "busybox-static"), folder, progress)
    kernel, found = _unpack_kernel(kernel_deb, progress)
    modules = _with_dependencies(found, MODULES)
    (target / "kernel").write_bytes(kernel)
    (target / "initrd").write_bytes(_initrd(_busybox(busybox_deb), modules))
    for extra, names in EXTRAS.items():
        more = {name: content for name, content in _with_dependencies(found, names).items() if name not in modules}
        (target / f"modules-{extra}").write_bytes(_modules(extra, more).finish())
    return kernel_deb


def package(listed: list[dict[str, str]], name: str) -> dict[str, str]:
    from qemu_user.images import archive

    found = [package for package in listed if package["Package"] == name]
    if not found:
        raise ImageError(f"{archive.mirror()}: {archive.SUITE} has no package {name}")
    return found[-1]


def _kernel(listed: list[dict[str, str]]) -> dict[str, str]:
    """The versioned package that the meta package linux-image-riscv64 depends on."""
    depends = package(listed, "linux-image-riscv64").get("Depends", "")
    match = re.search(r"linux-image-\d[^\s,(]*", depends)
    if match is None:
        raise ImageError("linux-image-riscv64 depends on no kernel")
    return package(listed, match[0])


def _unpack_kernel(path: Path, progress: Progress) -> tuple[bytes, dict[str, bytes]]:
    """The kernel, and its modules as they are packed, by name."""
    kernel, found = None, {}
    for count, (name, content) in enumerate(deb.members(path)):
        if name.startswith(("boot/vmlinux-", "boot/vmlinuz-")):
            kernel = content
        elif name.endswith(".ko.xz"):
            found[name.rpartition("/")[2].removesuffix(".ko.xz").replace("-", "_")] = content
        elif name.endswith(".ko"):
            found[name.rpartition("/")[2].removesuffix(".ko").replace("-", "_")] = content
        if count % 64 == 0:
            progress("unpacking the kernel", count, 0)
    if kernel is None:
        raise ImageError(f"{path.name}: no kernel inside")
    return kernel, found


def _with_dependencies(found: dict[str, bytes], names: tuple[str, ...]) -> dict[str, bytes]:
    """The modules with what they need, unpacked, in an order in which they can be loaded."""
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in ordered or name not in found:
            return  # built in, or there already
        content = lzma.decompress(found[name]) if found[name][:6] == b"\xfd7zXZ\0" else found[name]
        match = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in (match[1].decode() if match else "").split(","):
            add(needed)
        ordered[name] = content

    for name in names:
        add(name)
    return ordered


def _busybox(path: Path) -> bytes:
    for name, content in deb.members(path):
        if name.rpartition("/")[2] == "busybox":
            return content
    raise ImageError(f"{path.name}: no busybox inside")


def _modules(extra: str, modules: dict[str, bytes], archive: cpio.Archive | None = None) -> cpio.Archive:
    """The modules, and a list of them that /init loads: `extra` "" is the list of all devices' modules."""
    archive = archive or cpio.Archive()
    for name, content in modules.items():
        archive.file(f"lib/modules/{name}.ko", content)
    order = f"lib/modules/{extra}.order" if extra else "lib/modules/order"
    archive.file(order, "".join(f"{name}\n" for name in modules).encode())
    return archive


def _initrd(busybox: bytes, modules: dict[str, bytes]) -> bytes:
    initrd = cpio.Archive()
    for folder in ("dev", "proc", "sys", "tmp", "root", "etc", "mnt", "run", "sbin", "usr/bin", "usr/sbin"):
        initrd.folder(folder)
    initrd.device("dev/console", 5, 1)
    initrd.device("dev/null", 1, 3, 0o666)
    initrd.file("bin/busybox", busybox, 0o755)
    for applet in _APPLETS.split():
        initrd.symlink(f"bin/{applet}", "busybox")
    add_scripts(initrd)
    initrd.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    initrd.file("etc/group", b"root:x:0:\n")
    return _modules("", modules, initrd).finish()
