"""What the device process gives up once its VM stands: QEMU's `-sandbox on`, as a seccomp filter (docs/run.md).

Called by the programs that are a VM (qemu_user/__main__.py, cli/run.py, migration/arrival.py), never by a library: it cannot be
taken back. A device process goes on opening files, sockets and terminals for its user's commands, so it keeps those; it loses
what no VM ever needs: starting programs, other users' rights, the kernel's administration, looking into other processes.
Only a VM with a user network may go on starting programs, with the confinement of their own that passt makes: passt is started
again when it dies. With --only-files another process does that (backends/net/launcher.py).
"""

from __future__ import annotations

import os
import sys
from errno import EPERM
from pathlib import Path

from protocol.channel import confinement
from qemu_user.backends.net import launcher
from qemu_user.config.errors import ConfigError
from qemu_user.config.machine_config import MachineConfig
from qemu_user.management.registry import made_runtime_directory, runtime_directory
from qemu_user.migration import places

KILL = frozenset(
    (
        "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "mount", "umount2", "pivot_root", "open_tree", "move_mount",
        "fsopen", "fsconfig", "fsmount", "fspick", "mount_setattr", "bpf", "perf_event_open", "kexec_load", "kexec_file_load",
        "init_module", "finit_module", "delete_module", "create_module", "keyctl", "add_key", "request_key", "reboot", "swapon",
        "swapoff", "iopl", "ioperm", "io_uring_setup", "io_uring_enter", "io_uring_register", "quotactl", "quotactl_fd", "acct",
        "fanotify_init", "uselib",
    )
)  # fmt: skip
"""No library that we use has a reason to call these: whoever does is no longer us."""

REFUSED = (
    "execve", "execveat", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setfsuid", "setfsgid",
    "setgroups", "chroot", "unshare", "setns", "userfaultfd", "open_by_handle_at", "pidfd_getfd", "settimeofday",
    "clock_settime", "adjtimex", "clock_adjtime", "sethostname", "setdomainname", "syslog", "personality",
)  # fmt: skip
"""EPERM: a library may try, and do without."""


PASST = frozenset(
    (
        "execve", "execveat", "unshare", "mount", "umount2", "pivot_root", "setuid", "setgid", "setresuid", "setresgid",
        "setgroups",
    )
)  # fmt: skip
"""What starting passt takes: it shuts itself into namespaces of its own."""


def rules(user_network: bool = False) -> confinement.Filter:
    """The filter. `user_network`: passt can be started."""
    kept = PASST if user_network else frozenset()
    refused = [name for name in REFUSED if name not in kept]
    return confinement.Filter(kill=KILL - kept, errnos=dict.fromkeys(refused, EPERM), otherwise=None)


def folders(config: MachineConfig, more: list[str]) -> dict[str, int]:
    """What of the file system a VM's device process reaches with --only-files: path -> Landlock's rights beneath it.

    The folders of its disks, shares, sockets and captures, softkvm's own, and `more`, for everything; programs, libraries,
    /etc, /proc and the kernel's folder for reading; devices as they are.
    """
    reading = {*(path for path in sys.path if path), sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])}
    reading |= {"/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys"}
    files = [config.boot.kernel, config.boot.initrd, *config.boot.initrd_files, config.boot.dtb]
    reading |= {os.path.dirname(os.path.realpath(file)) for file in files if file}
    disks = [file for drive in config.drives for file in (drive.file, *drive.members)]
    written = [*disks, *(flash.file for flash in config.flash), *(qmp.path for qmp in config.qmp)]
    written += [file for chardev in config.chardevs for file in (chardev.path, chardev.logfile)]
    written += [config.vsock.path] if config.vsock else []
    whole = {os.path.dirname(os.path.realpath(file)) for file in written if file and "://" not in file}
    whole |= {os.path.realpath(share.folder) for share in config.shares}
    whole |= {str(runtime_directory()), *map(str, places.own_folders()), "/dev", *map(os.path.realpath, more)}
    paths = dict.fromkeys(sorted(reading), confinement.READ | 1)  # 1: executing, of libraries and of what they load
    return paths | dict.fromkeys(sorted(whole), confinement.ALL_FILES)


def only_files(config: MachineConfig, more: list[str]) -> None:
    """From now on this thread, and those it starts, reach folders() alone. ConfigError."""
    made_runtime_directory()
    try:
        if any(net.kind == "user" for net in config.nets):
            launcher.begin()  # passt makes namespaces, which Landlock forbids
        confinement.landlock(folders(config, more), network=True, signals=True)
    except OSError as error:
        raise ConfigError(f"--only-files: {error.strerror or error}; softkvm doctor says what this host has") from error


def confine(config: MachineConfig) -> str:
    """Give it all up, in every thread; what is missing on this host, as a sentence, or ""."""
    try:
        starts = any(net.kind == "user" for net in config.nets) and launcher.launcher is None
        confinement.seccomp(rules(user_network=starts))
    except OSError as error:
        return f"the device process is not confined: {error.strerror or error}"
    return ""
