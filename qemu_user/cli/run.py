"""`softkvm run`: boot a VM in the foreground; with `-- COMMAND` behave as that command, as `docker run` does.

The VM's devices live in this process (qemu_user's half), its vCPUs in kvmcore's. Exit status: the guest command's (126 and 127
are the guest shell's: not executable, not found); 125 when the command line is wrong, or the VM could not be started or
ended before the command; 128 + N for a signal that ended us.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from qemu_user.cli import system
from qemu_user.cli.daemon import DaemonError, begin
from qemu_user.images.errors import ImageError

if TYPE_CHECKING:
    from qemu_user.config.machine_config import MachineConfig
    from qemu_user.images.store import Image
    from qemu_user.images.vm_disk import VmDisk
    from qemu_user.management.instance import Instance

FAILED = 125
_LAST_WORDS = 5.0
"""Seconds that a guest's exit status is waited for when the VM has ended; it is there already, but may not be read yet."""
_READY = "SOFTKVM_READY_FD"
DEFAULT_IMAGE = "busybox"
_BUILTIN = ("hello", "count")  # images/builtin.py has them; not imported before it is needed
_PORTS = ("stdin", "stdout", "stderr", "control")
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

EPILOG = """examples:
  softkvm run                                   a shell in Debian's kernel with busybox
  softkvm run busybox -- uname -a               run a command, print its output, exit with its status
  softkvm run --kernel Image --initrd I --append "..." --drive file=d.img --netdev user,id=n0 -m 512M --smp 2
  softkvm run edk2 --drive file=installer.iso,readonly=on --drive file=disk.qcow2     UEFI firmware
  softkvm run --kernel u-boot.bin               U-Boot (qemu-riscv64_smode)
  softkvm run hello                             a guest of our own, without any network
  softkvm run -d --name web                     in the background; softkvm console web attaches
  softkvm run debian                            Debian 13 with systemd, apt and a network; its disk goes with the VM
  softkvm run debian -d --name db               the same, kept under its name; softkvm ssh db, softkvm cp f db:/root

exit status: the command's own; 125 if softkvm failed, 126 and 127 as a shell's, 128 + N after signal N.
"""


class _Parser(argparse.ArgumentParser):
    """A wrong command line is our failure, as docker run has it: 125."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(FAILED, f"softkvm run: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The options; what QEMU has is called as QEMU calls it."""
    result = _Parser(
        prog="softkvm run", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Boot a VM, in the foreground unless -d is given.",
    )  # fmt: skip
    result.add_argument("image", nargs="?", help=f"image to boot (default: {DEFAULT_IMAGE}); see softkvm images")
    result.add_argument("-m", "--memory", default="512M", metavar="SIZE", help="memory (default: 512M)")
    result.add_argument("--smp", default="1", metavar="N", help="vCPUs (default: 1)")
    result.add_argument("--name", help="the VM's name in softkvm ps")
    result.add_argument("--kernel", metavar="FILE", help="flat Image, ELF or U-Boot instead of an image")
    result.add_argument("--pflash", action="append", default=[], metavar="FILE[,readonly=on]", help="firmware, its variables")
    result.add_argument("--initrd", metavar="FILE", help="initial RAM disk")
    result.add_argument("--append", default="", metavar="TEXT", help="kernel command line, or what to add to the image's")
    result.add_argument("--drive", action="append", default=[], metavar="OPTIONS", help="disk: file=PATH[,readonly=on]")
    result.add_argument(
        "--netdev", action="append", default=[], metavar="OPTIONS", help="network: user|switch|tap|stream,id=ID,..."
    )
    result.add_argument(
        "-p", "--publish", action="append", default=[], metavar="[HOST:]PORT:GUESTPORT", help="forward a port of the host"
    )
    result.add_argument("--device", action="append", default=[], metavar="NAME,...", help="as QEMU's (docs/devices.md)")
    result.add_argument("--object", action="append", default=[], metavar="filter-dump,..", help="a pcap file of a network")
    result.add_argument("--share", action="append", default=[], metavar="DIR:TAG[:ro]", help="shared folder, in /mnt/TAG")
    result.add_argument(
        "--accel", choices=("translator", "interpreter", "reference"), help="how vCPUs run (default: as the daemon was told)"
    )
    result.add_argument(
        "--only-files", action="store_true", help="the device process reaches what the VM is made of alone (docs/run.md)"
    )
    result.add_argument("--allow-files", action="append", default=[], metavar="DIR", help="with --only-files: DIR too")
    result.add_argument(
        "--cgroup", metavar="memory=SIZE,cpus=N,pids=N[,parent=DIR]", help="limits of the VM, by a control group (docs/run.md)"
    )
    result.add_argument("-d", "--detach", action="store_true", help="run in the background and print the VM's name")
    result.add_argument("--keep", action="store_true", help="the VM survives a kill -9 of this process (softkvm attach)")
    result.add_argument("--balloon", action="store_true", help="memory balloon: free memory of the guest goes back to the host")
    result.add_argument("--vsock", metavar="PATH[,cid=N]", help="stream sockets to the guest (docs/devices.md)")
    result.add_argument("-v", "--verbose", action="store_true", help="show the kernel's messages (on stderr)")
    system.add_arguments(result)
    return result


@dataclass
class Outcome:
    """What the guest said on its control port."""

    status: int | None = None
    ready: bool = False


def main(arguments: list[str]) -> int:
    """Run; the exit status."""
    command: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, command = arguments[:at], arguments[at + 1 :]
        if not command:
            return _fail("nothing behind --; give a command to run")
    options = parser().parse_args(arguments)
    options.bare = bool(options.kernel or options.pflash)
    try:
        kept = _kept(options)
    except ImageError as error:
        return _fail(str(error))
    if not options.bare and not command and _is_template(options.image):
        return _run_template(options.image, options.name or _free_name())
    if command and (options.bare or options.image in (*_BUILTIN, "edk2")):
        return _fail("-- COMMAND needs an image with an init that understands it; --kernel boots what you give")
    try:
        if options.detach and _READY not in os.environ:
            return _detach(options, arguments, command, kept)
        return _run(options, command, kept)
    except DaemonError as error:
        return _fail(str(error))


def _kept(options: argparse.Namespace) -> Image | None:
    """What the VM of that name boots from, if its disk is kept. ImageError: it is another image than the one that is named."""
    if not options.name or options.bare or options.ephemeral:
        return None
    from qemu_user.images.vm_disk import find_kept

    kept = find_kept(options.name)
    if kept is not None:
        if options.image not in (None, kept.meta.name):
            raise ImageError(
                f"VM {options.name} is kept, and of the image {kept.meta.name}; choose another name, or delete it with "
                f"softkvm disks --delete {options.name}"
            )
        options.image = kept.meta.name
    return kept


def _detach(options: argparse.Namespace, arguments: list[str], command: list[str], kept: Image | None) -> int:
    """The same command in a process of its own, without terminal; return when its VM runs. Its output goes to a file."""
    import subprocess

    from qemu_user.management.registry import made_runtime_directory
    from qemu_user.warm.process import start
    from qemu_user.warm.request import SOFTKVM

    if not options.bare and kept is None and options.image not in _BUILTIN and (failed := _fetch(options)):
        return failed
    name = options.name or _free_name()
    log = made_runtime_directory() / f"{name}.log"
    words = ["run", "--name", name, *arguments, *([] if options.name else ["--ephemeral"])]
    words += ["--", *command] if command else []
    readable, writable = os.pipe()
    with log.open("wb") as output, open(os.devnull, "rb") as nothing:
        fds = {0: nothing.fileno(), 1: output.fileno(), 2: output.fileno(), writable: writable}
        child = start(SOFTKVM, words, fds, ".", **{_READY: str(writable)}) or subprocess.Popen(
            [sys.executable, "-P", "-m", "qemu_user.cli.main", *words], stdin=nothing, stdout=output, stderr=output,
            start_new_session=True, pass_fds=[writable], env={**os.environ, _READY: str(writable)},
        )  # fmt: skip
    os.close(writable)
    with os.fdopen(readable, "rb") as ready:
        started = bool(ready.read(1))
    if started:
        sys.stderr.write(f"softkvm: VM {name} runs; softkvm console {name} attaches, its output goes to {log}\n")
        sys.stdout.write(f"{name}\n")
        return 0
    status = child.wait()
    sys.stderr.write(log.read_text(errors="replace"))
    log.unlink(missing_ok=True)
    return status or FAILED


def _fetch(options: argparse.Namespace) -> int:
    """The image, made if need be; FAILED if it cannot be had."""
    try:
        _image(options, _extras(options))
    except ImageError as error:
        return _fail(str(error))
    return 0


def _extras(options: argparse.Namespace) -> list[str]:
    """The image's additional modules that this VM needs: whoever has no disk gets no file system."""
    from qemu_user.images.store import CATALOGUE

    devices = {"9p": options.share, "vsock": options.vsock, "balloon": options.balloon, "ext4": options.drive}
    names = {"ext4": "blk"}
    recipe = CATALOGUE.get(options.image or DEFAULT_IMAGE)
    if recipe is not None and recipe.firmware:
        return []
    always = system.EXTRAS if recipe is not None and recipe.disk else ()
    return [
        extra for extra, value in devices.items()
        if value or extra in always or any(device.startswith(f"virtio-{names.get(extra, extra)}") for device in options.device)
    ]  # fmt: skip


def _tell_ready() -> None:
    """To the process that has started us with -d: the VM runs."""
    if fd := os.environ.pop(_READY, ""):
        os.write(int(fd), b"r")
        os.close(int(fd))


def _is_template(image: str | None) -> bool:
    """Whether the image is a template of the user's."""
    from qemu_user.migration import places

    return bool(image) and places.is_name(image or "") and (places.templates() / (image or "")).is_dir()


def _run_template(image: str, name: str) -> int:
    """A VM made of a template: in the background, with this terminal at its console if it is one."""
    from qemu_user.cli import console
    from qemu_user.cli.template import make
    from qemu_user.cli.vm import VerbError
    from qemu_user.migration import places

    try:
        make(str(places.templates() / image), [name])
    except VerbError as error:
        return _fail(str(error))
    sys.stderr.write(f"softkvm: VM {name} runs; softkvm console {name} attaches to it\n")
    return console.main([name]) if sys.stdin.isatty() else 0


def _fail(sentence: str) -> int:
    sys.stderr.write(f"softkvm run: {sentence}\n")
    return FAILED


def _run(options: argparse.Namespace, command: list[str], kept: Image | None) -> int:
    """Run, and see that a throw-away disk goes."""
    disks: list[VmDisk] = []
    moved = False
    groups = ExitStack()
    try:
        status, moved = _boot(options, command, kept, disks, groups)
    finally:
        groups.close()
        for disk in disks:
            if not moved:  # else the VM has it where it is now
                disk.discard()
    return status


def _boot(
    options: argparse.Namespace, command: list[str], kept: Image | None, disks: list[VmDisk], groups: ExitStack
) -> tuple[int, bool]:
    """(exit status, whether the VM lives on elsewhere). A disk that is made goes into `disks`, what ends a control group into
    `groups`.
    """
    daemon = begin()  # it starts while we import what a machine is made of
    import msgspec

    from qemu_user import cgroup
    from qemu_user.config.errors import ConfigError
    from qemu_user.config.qemu_options import parse
    from qemu_user.confinement import confine, only_files
    from qemu_user.images.store import Store
    from qemu_user.machine.machine import StartError
    from qemu_user.management.instance import Instance

    name = options.name or _free_name()
    words = ["-m", options.memory, "-smp", options.smp, "-name", name, "-device", "vmgenid"]
    ours, theirs = socket.socketpair()
    try:
        if options.image in _BUILTIN and not options.bare:
            from qemu_user.images.builtin import ensure as builtin

            options.bare, options.kernel = True, str(builtin(options.image, Store().folder))
        conf: dict[str, str] = {}
        if options.bare:
            words += ["-kernel", options.kernel] if options.kernel else []
            words += ["-initrd", options.initrd] if options.initrd else []
            words += ["-append", options.append] if options.append else []
        else:
            extras = _extras(options)
            image = kept or _image(options, extras)
            if image.own.exists():
                disk = system.open_disk(options, image, name)
                disks.append(disk)
                image = disk.image
                options.bare = image.firmware.exists()
                words += system.words(options, disk)
                conf = system.settings(options, disk, name, command)
        if not options.bare:
            append = " ".join(filter(None, (image.append, options.append)))
            if options.verbose:
                append = append.replace("quiet", "").strip()
            words += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", append]
        if (not disks or options.bare) and (useless := system.given(options)):
            return _fail(f"{useless[0]} goes with an image that has a disk, as debian"), False
        config, _ = parse([*words, *_devices(options), "-nographic"])
        if disks:
            config = msgspec.structs.replace(config, login=system.login(options, disks[0]))
        if not options.bare:
            modules = tuple(str(image.extra(name)) for name in extras)
            config = _with_ports(config, command, options.verbose, theirs.fileno(), modules, conf)
        limits = cgroup.parse(options.cgroup) if options.cgroup else None
        endpoint = daemon()
        group = cgroup.VmCgroup(name, limits, kept=options.only_files) if limits is not None else None
        if group is not None:
            groups.callback(group.remove)
        if options.only_files:
            only_files(config, options.allow_files)
        instance = Instance(config, endpoint)
        if group is not None:
            instance.machine.vm_made = group.add
    except (ConfigError, ImageError, StartError, cgroup.CgroupError) as error:
        return _fail(str(error)), False
    outcome = Outcome()
    interactive = not command and sys.stdin.isatty()
    if interactive:
        sys.stderr.write(f"softkvm: VM {config.name}; leave with Ctrl-A x, help with Ctrl-A h\n")
    _forward_signals(instance, ours, outcome, bool(command))
    try:
        instance.start()
    except StartError as error:
        return _fail(str(error)), False
    for disk in disks if not command else ():
        disk.booted(config.login)
    if lack := confine(config):
        sys.stderr.write(f"softkvm: {lack}\n")
    _tell_ready()
    listener = threading.Thread(target=_listen, args=(ours, outcome), daemon=True)
    if not options.bare:
        listener.start()
    status = instance.wait()
    theirs.close()
    if not options.bare:
        listener.join(_LAST_WORDS)  # what the guest said before it powered off may not have been read yet
    job = instance.machine.job
    if job is not None and job.kind == "migration" and job.status == "completed":
        sys.stderr.write(f"softkvm: {job.result}\n")
        return 0, True
    return _status(status, options, command, outcome, config.name), False


def _status(status: int, options: argparse.Namespace, command: list[str], outcome: Outcome, name: str) -> int:
    """Our exit status, of the VM's and what the guest has said."""
    if options.bare:
        return status
    if outcome.status is not None:
        return outcome.status
    if status:
        return status if status > 128 else FAILED
    if command:
        return _fail(f"VM {name} ended before the command did (-v shows the kernel's messages)")
    return 0


def _image(options: argparse.Namespace, extras: list[str]) -> Image:
    """The image, made if need be, with progress on our terminal. ImageError."""
    from qemu_user.cli.progress import Bar
    from qemu_user.images.store import Store

    with Bar() as progress:
        return Store().ensure(options.image or DEFAULT_IMAGE, progress, extras=extras)


def _devices(options: argparse.Namespace) -> list[str]:
    """What the user asked for, as QEMU's options."""
    words = []
    for name in ("pflash", "drive", "netdev", "nic", "publish", "device", "object", "share"):
        for value in getattr(options, name):
            words += [f"-{name}", value]
    words += ["-vsock", options.vsock] if options.vsock else []
    words += ["-balloon"] if options.balloon else []
    words += ["-keep"] if options.keep else []
    words += ["-accel", f"kvmcore,engine={options.accel}"] if options.accel else []
    return words


def _free_name() -> str:
    return f"vm-{os.getpid()}"


def _with_ports(
    config: MachineConfig, command: list[str], verbose: bool, control: int, modules: tuple[str, ...], system: dict[str, str]
) -> MachineConfig:
    """The image's devices: console, and the ports that /init speaks over. `system`: settings for one on a disk."""
    import msgspec

    from qemu_user.config.machine_config import Chardev, ConsolePort
    from qemu_user.images.store import command_line, settings

    shell = "" if system else "exec sh -l"
    conf = {"NAME": config.name, "COMMAND": command_line(command) if command else shell, **system}
    if config.shares:
        conf["SHARES"] = " ".join(share.tag for share in config.shares)
    if command:
        console = Chardev(id="console", kind="fd", output=2) if verbose else Chardev(id="console", kind="hub")
    else:
        conf["TTY"] = "1"
        console = Chardev(id="console", kind="hub", stdio=True)
    chardevs = [console, Chardev(id="control", kind="fd", input=control, output=control)]
    ports = []
    if command:
        chardevs += [
            Chardev(id="stdin", kind="fd", input=0),
            Chardev(id="stdout", kind="fd", output=1, quit_on_hangup=True),
            Chardev(id="stderr", kind="fd", output=2),
        ]
        ports = [ConsolePort(id=number, name=f"org.softkvm.{name}", chardev=name)
                 for number, name in enumerate(_PORTS, 1)]  # fmt: skip
    else:
        ports = [ConsolePort(id=4, name="org.softkvm.control", chardev="control")]
    boot = msgspec.structs.replace(config.boot, initrd_files=modules, initrd_extra=settings(conf))
    return msgspec.structs.replace(
        config, boot=boot, chardevs=tuple(chardevs), serial="", console="console", ports=tuple(ports),
        no_reboot=bool(command), panic_ends=True,
    ).validate()  # fmt: skip


def _listen(control: socket.socket, outcome: Outcome) -> None:
    """Lines from the guest: `ready`, `exit N`."""
    with control.makefile("r", errors="replace") as lines:
        for line in lines:
            words = line.split()
            if words[:1] == ["ready"]:
                outcome.ready = True
            elif len(words) == 2 and words[0] == "exit" and words[1].isdigit():
                outcome.status = int(words[1]) & 0xFF


def _forward_signals(instance: Instance, control: socket.socket, outcome: Outcome, command: bool) -> None:
    """Signals go to the guest's command once it runs; before that, and without one, they end the VM."""

    def received(number: int, frame: object) -> None:
        if command and outcome.ready:
            try:
                control.send(f"signal {number}\n".encode())
            except OSError:
                instance.quit(128 + number)
        else:
            instance.quit(128 + number)

    for number in _FORWARDED:
        signal.signal(number, received)
    signal.signal(signal.SIGWINCH, lambda number, frame: instance.machine.window_changed())
