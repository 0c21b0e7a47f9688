"""What `softkvm run` adds for images with a system on a disk (debian): options of the first boot, the VM's own disk, network
and vsock by default. Called by run.py.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_user.config.errors import ConfigError

if TYPE_CHECKING:
    from qemu_user.images.store import Image
    from qemu_user.images.vm_disk import VmDisk

ROOT = "/dev/vda"
#: Additional modules of the image (busybox.EXTRAS) that such a VM needs: its file system, and vsock for softkvm ssh.
EXTRAS = ("ext4", "vsock")
_HOST_NAME = re.compile(r"(?=.{1,63}\Z)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*\Z")
_PUBLIC_KEY = re.compile(r"(ssh|ecdsa|sk-ssh|sk-ecdsa)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( .*)?\Z")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that only such images have."""
    group = parser.add_argument_group("images with a disk (debian)")
    group.add_argument("--hostname", metavar="H", help="first boot: the host name (default: the VM's name)")
    group.add_argument("--user", metavar="U", help="first boot: make this user, who may sudo, and log it in at the console")
    group.add_argument("--ssh-key", action="append", default=[], metavar="FILE", help="first boot: public keys that may log in")
    group.add_argument("--disk-size", default="", metavar="SIZE", help="size of the disk (8G); what is larger grows")
    group.add_argument("--ephemeral", action="store_true", help="the disk goes with the VM, even if it has a name")
    group.add_argument("--nic", action="append", default=[], metavar="OPTIONS", help="as QEMU's; none: no network")


def given(options: argparse.Namespace) -> list[str]:
    """Which of them are on the command line, for a VM that has no use for them."""
    names = ("hostname", "user", "ssh_key", "disk_size")
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]


def open_disk(options: argparse.Namespace, image: Image, name: str) -> VmDisk:
    """The VM's disk; kept if it has got a name. ImageError, ConfigError."""
    from qemu_user.config.keyvals import parse_size
    from qemu_user.images import vm_disk

    _check(options)
    keep = bool(options.name) and not options.ephemeral
    disk = vm_disk.open_disk(image, name, keep, parse_size("--disk-size", options.disk_size, "G") if options.disk_size else 0)
    ignored = [word for word in given(options) if word in ("--hostname", "--user", "--ssh-key")]
    if not disk.new and ignored:
        sys.stderr.write(f"softkvm: VM {name} has booted before: {', '.join(ignored)} changes nothing any more\n")
    return disk


def words(options: argparse.Namespace, disk: VmDisk) -> list[str]:
    """QEMU options of the VM's disk, network and vsock. The disk is the first: vda. Of firmware: the flash."""
    if disk.image.firmware.exists():
        return ["-pflash", f"{_quoted(disk.image.firmware)},readonly=on", "-pflash", _quoted(disk.disk)]
    result = ["-drive", f"file={_quoted(disk.disk)},id=root,discard=unmap"]
    if not (options.netdev or options.nic):
        if shutil.which("passt"):
            result += ["-nic", "user,id=net0"]
        elif not options.publish:
            sys.stderr.write("softkvm: the VM gets no network: passt is not installed (Debian, Ubuntu: apt install passt)\n")
    if not options.vsock:
        result += ["-vsock", ""]
    return result


def _quoted(path: Path) -> str:
    """A path as an option's value."""
    return str(path).replace(",", ",,")


def settings(options: argparse.Namespace, disk: VmDisk, name: str, command: list[str]) -> dict[str, str]:
    """What root.sh reads."""
    conf = {"ROOT": ROOT, "NAME": options.hostname or host_name(name)}
    if disk.new and not command:
        conf |= {"MACHINE_ID": uuid.uuid4().hex, "USER_NAME": options.user or "", "SSH_KEYS": "\n".join(_keys(options))}
    return conf


def login(options: argparse.Namespace, disk: VmDisk) -> str:
    """Whom softkvm ssh logs in as: the user of the disk's first boot."""
    return (options.user or "root") if disk.new else disk.login


def host_name(name: str) -> str:
    """A host name that is like the VM's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63] or "debian"


def _check(options: argparse.Namespace) -> None:
    from qemu_user.config.machine_config import LOGIN

    if options.hostname and not _HOST_NAME.match(options.hostname):
        raise ConfigError(f"--hostname {options.hostname}: letters a to z, digits and '-', in parts between dots, at most 63")
    if options.user and (not LOGIN.match(options.user) or options.user == "root"):
        raise ConfigError(f"--user {options.user}: a letter a to z or '_', then letters, digits, '-' and '_', at most 32")
    _given_keys(options)


def _given_keys(options: argparse.Namespace) -> list[str]:
    """The lines of the files of --ssh-key. ConfigError: no public keys."""
    keys: list[str] = []
    for file in options.ssh_key:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--ssh-key {file}: {getattr(error, 'strerror', None) or 'is no text'}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        wrong = [line for line in found if not _PUBLIC_KEY.match(line)]
        if wrong or not found:
            hint = "is a private key; give the public one, which ends in .pub" if "PRIVATE KEY" in "".join(wrong) else ""
            raise ConfigError(f"--ssh-key {file}: {hint or 'holds no public keys as ssh-keygen writes them'}")
        keys += found
    return keys


def _keys(options: argparse.Namespace) -> list[str]:
    """Whose owners may log in: the user's, and softkvm's own where the host has an ssh client."""
    from qemu_user.cli.ssh import key

    keys = _given_keys(options)
    if shutil.which("ssh") and shutil.which("ssh-keygen"):
        keys.append(key().with_suffix(".pub").read_text().strip())
    return keys
