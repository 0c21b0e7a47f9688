"""What this host offers to softkvm: each check is a function that looks, and says what follows from it.

Used by `softkvm doctor`. A check tries the thing itself where that is possible (a memfd is made and sealed, a folder is
written to) instead of asking for a version. It changes nothing that stays. To add one: a function under @check.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from protocol.channel import confinement, fd_passing
from protocol.channel.shared_memory import create_memfd, is_sealed
from qemu_user import cgroup

GOOD: Literal["ok"] = "ok"
MISSING: Literal["missing"] = "missing"
BROKEN: Literal["broken"] = "broken"
Status = Literal["ok", "missing", "broken"]
"""broken: softkvm cannot run; missing: something it can do without."""
_MIB = 1 << 20
_IMAGE_ROOM = 300 * _MIB
"""What building the image busybox takes in the cache."""
_FEW_DESCRIPTORS = 1024


class Result(NamedTuple):
    """What a check has found: `text` says it and, unless it is good, what is lost and what to do."""

    name: str
    status: Status
    text: str


Check = Callable[[], tuple[Status, str]]
CHECKS: dict[str, Check] = {}
ONLINE: dict[str, Check] = {}
"""Those that use the network."""


def check(name: str, where: dict[str, Check] = CHECKS) -> Callable[[Check], Check]:
    """Put a check on the list, as `name`."""

    def register(function: Check) -> Check:
        where[name] = function
        return function

    return register


def examine(online: bool = False) -> list[Result]:
    """All checks. One that fails in itself is broken, with its error."""
    found = []
    for name, function in (CHECKS | ONLINE if online else CHECKS).items():
        try:
            found.append(Result(name, *function()))
        except Exception as error:
            found.append(Result(name, BROKEN, f"{type(error).__name__}: {error}"))
    return found


def _directory(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return (Path(value) if os.path.isabs(value) else Path.home() / fallback) / "softkvm"


def _writable(folder: Path, what: str) -> str:
    """"" if files can be made in `folder` (which is made), else why not."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): {what}"
    return ""


# -- the machine --------------------------------------------------------------------------------------------------------


@check("processor")
def processor() -> tuple[Status, str]:
    machine, cores = platform.machine(), len(os.sched_getaffinity(0))
    if machine != "x86_64":
        return BROKEN, f"{machine}: guest code is translated for x86-64 only"
    text = f"{machine}, {cores} core{'s' * (cores != 1)} for us"
    return (GOOD, text) if cores > 1 else (MISSING, f"{text}: devices and vCPUs take turns, which is slow")


@check("memory")
def memory() -> tuple[Status, str]:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) >> 10
    text = f"{free} MiB available"
    return (GOOD, text) if free >= 768 else (MISSING, f"{text}: less than a guest of 512 MiB takes; give a smaller -m")


@check("/dev/kvm")
def dev_kvm() -> tuple[Status, str]:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return GOOD, "is there; only softkvm fuzz --differential uses it"
    return GOOD, "is not there for us, and not needed"


@check("huge pages")
def huge_pages() -> tuple[Status, str]:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = path.read_text().partition("[")[2].partition("]")[0] if path.exists() else "never"
    if chosen in ("always", "within_size", "advise", "force"):
        return GOOD, f"transparent ones for shared memory: {chosen}"
    return MISSING, f"transparent ones for shared memory are off ({path}): guests' memory is in small pages, a little slower"


@check("Python")
def python() -> tuple[Status, str]:
    text = f"{platform.python_version()} in {sys.prefix}"
    if importlib.util.find_spec("zstandard") is None:
        return MISSING, f"{text}; without zstandard: snapshots and migration streams are not compressed"
    return GOOD, text


# -- the kernel ---------------------------------------------------------------------------------------------------------


@check("shared memory")
def shared_memory() -> tuple[Status, str]:
    fd = create_memfd("softkvm-doctor", mmap.PAGESIZE)
    try:
        if not is_sealed(fd):
            return BROKEN, "memfds cannot be sealed"
        mmap.mmap(fd, mmap.PAGESIZE).close()
    finally:
        os.close(fd)
    return GOOD, "memfds, sealed"


@check("pidfd")
def pidfd() -> tuple[Status, str]:
    os.close(os.pidfd_open(os.getpid()))
    one, two = fd_passing.pair()
    with one, two:
        os.close(fd_passing.peer_pidfd(one))
    return GOOD, "processes are watched without races"


@check("seccomp")
def seccomp() -> tuple[Status, str]:
    if confinement.seccomp_available():
        return GOOD, "system call filters for VM and device processes"
    return MISSING, "no system call filters here: VM and device processes keep their user's rights (SECURITY.md)"


@check("Landlock")
def landlock() -> tuple[Status, str]:
    version = confinement.landlock_version()
    if version:
        return GOOD, f"version {version}: VM processes do not see their user's files, device processes with --only-files"
    return MISSING, "not in this kernel, or switched off: VM processes may read their user's files (SECURITY.md)"


@check("control groups")
def control_groups() -> tuple[Status, str]:
    if lack := cgroup.lacking():
        return MISSING, f"run --cgroup limits VMs only beneath a group that is delegated to you (parent=DIR): {lack}"
    return GOOD, "limits for VMs (run --cgroup)"


@check("user namespaces")
def user_namespaces() -> tuple[Status, str]:
    pid = os.fork()
    if pid == 0:
        import ctypes

        os._exit(0 if ctypes.CDLL(None).unshare(0x10000000) == 0 else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        return GOOD, "passt shuts itself in"
    return MISSING, "cannot be made here: passt (--netdev user) runs without its own confinement, or not at all"


@check("descriptors")
def descriptors() -> tuple[Status, str]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard} a process"
    if hard != resource.RLIM_INFINITY and hard < _FEW_DESCRIPTORS:
        return MISSING, f"{text}: few sessions and VMs at a time (ulimit -n)"
    return GOOD, text


# -- folders ------------------------------------------------------------------------------------------------------------


@check("runtime folder")
def runtime_folder() -> tuple[Status, str]:
    from qemu_user.management.registry import runtime_directory

    folder = runtime_directory()
    if why := _writable(folder, "no daemon can listen; set XDG_RUNTIME_DIR"):
        return BROKEN, why
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        return BROKEN, f"{folder} is open to others; it has to be yours, mode 0700"
    if len(os.fsencode(folder)) > 60:
        return MISSING, f"{folder} is long: paths of sockets have 107 bytes; set XDG_RUNTIME_DIR to a shorter one"
    return GOOD, str(folder)


@check("cache folder")
def cache_folder() -> tuple[Status, str]:
    folder = _directory("XDG_CACHE_HOME", ".cache")
    if why := _writable(folder, "nothing that is built can be kept; set XDG_CACHE_HOME"):
        return BROKEN, why
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free // _MIB} MiB free"
    return (GOOD, text) if free > _IMAGE_ROOM else (MISSING, f"{text}: building images takes {_IMAGE_ROOM // _MIB}")


@check("data folder")
def data_folder() -> tuple[Status, str]:
    folder = _directory("XDG_DATA_HOME", ".local/share")
    why = _writable(folder, "no snapshots and templates; set XDG_DATA_HOME")
    return (MISSING, why) if why else (GOOD, f"{folder}, {shutil.disk_usage(folder).free // _MIB} MiB free")


# -- other programs -----------------------------------------------------------------------------------------------------

PROGRAMS = {
    "passt": "--netdev user needs it (Debian: passt)",
    "ssh": "softkvm ssh and cp need it (Debian: openssh-client)",
    "mke2fs": "disks with a file system are made with it (Debian: e2fsprogs)",
    "qemu-img": "other formats than raw and qcow2 are converted with it (Debian: qemu-utils)",
    "gpgv": "Debian's signatures are then checked by softkvm itself (Debian: gpgv)",
    "qemu-system-riscv64": "benchmarks and some tests compare with it (Debian: qemu-system-misc)",
}
"""Programs that softkvm can use, and what each is for."""


def _program(name: str, use: str) -> Check:
    def look() -> tuple[Status, str]:
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        return (GOOD, path) if path else (MISSING, f"is not installed: {use}")

    return look


for _name, _use in PROGRAMS.items():
    CHECKS[_name] = _program(_name, _use)


# -- the network --------------------------------------------------------------------------------------------------------


@check("archive", ONLINE)
def archive() -> tuple[Status, str]:
    import urllib.request

    from qemu_user.images.archive import SUITE, mirror

    address = f"{mirror()}/dists/{SUITE}/InRelease"
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10) as answer:
            return GOOD, f"{address} answers ({answer.status})"
    except OSError as error:
        return MISSING, f"{address}: {error}: images cannot be pulled; SOFTKVM_MIRROR chooses another mirror"
