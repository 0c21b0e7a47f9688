"""Limits of one VM: a control group for its device process and its process of kvmcore (softkvm run --cgroup).

Version 2 where its controllers are there, else version 1's hierarchies. The group lies beneath the one that we are in, or
beneath parent=. What the host does not let us do is an error that says what to do, never passed over. The translator is the
daemon's and serves all VMs: it is not in the group.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qemu_user.config.errors import ConfigError
from qemu_user.config.keyvals import parse_size

ROOT = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000
_CONTROLLERS = ("memory", "cpu", "pids")
_PREFIX = "softkvm-"
_LEAST_MEMORY, _LEAST_PIDS = 128 << 20, 32
"""What device process and VM process need themselves; guest memory and the threads of disks and vCPUs come on top."""
_PATIENCE = 2.0
"""Seconds that the VM's process may take to leave."""


class CgroupError(Exception):
    """The group cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Limits:
    """What a VM may use: bytes of memory (guest memory included), cores' worth of time, threads. None: any."""

    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    parent: str = ""

    @property
    def controllers(self) -> list[str]:
        """Those that are needed."""
        given = (self.memory, self.cpus, self.pids)
        return [name for name, value in zip(_CONTROLLERS, given, strict=True) if value is not None]


def parse(text: str) -> Limits:
    """`memory=2G,cpus=1.5,pids=100,parent=/sys/fs/cgroup/mine`. ConfigError."""
    values: dict[str, str] = {}
    for word in text.split(","):
        key, equals, value = word.partition("=")
        if not equals or not value or key not in (*_CONTROLLERS, "cpus", "parent") or key == "cpu" or key in values:
            raise ConfigError(f"--cgroup {text}: {word!r}: expected memory=SIZE, cpus=N, pids=N, parent=DIR")
        values[key] = value
    try:
        limits = Limits(
            memory=parse_size("--cgroup", values["memory"]) if "memory" in values else None,
            cpus=float(values["cpus"]) if "cpus" in values else None,
            pids=int(values["pids"]) if "pids" in values else None,
            parent=values.get("parent", ""),
        )
    except ValueError as error:
        raise ConfigError(f"--cgroup {text}: {error}") from None
    if not limits.controllers:
        raise ConfigError(f"--cgroup {text}: give at least one of memory=SIZE, cpus=N, pids=N")
    leasts: tuple[tuple[str, float | None, float], ...] = (
        ("memory", limits.memory, _LEAST_MEMORY), ("cpus", limits.cpus, 0.01), ("pids", limits.pids, _LEAST_PIDS),
    )  # fmt: skip
    for limit, given, least in leasts:
        if given is not None and given < least:
            raise ConfigError(f"--cgroup {text}: {limit} is at least {least}: with less the VM's own processes cannot start")
    return limits


class VmCgroup:
    """The group of VM `name`, with its limits set. We are in it until remove()."""

    def __init__(self, name: str, limits: Limits, root: Path = ROOT, *, kept: bool = False) -> None:
        """`kept`: another process is to remove it, when this one has ended, for --only-files forbids us that. CgroupError."""
        self._root, self._limits = root, limits
        self._name = f"{_PREFIX}{name}-{os.getpid()}"
        self._own = _own_groups()
        self._folders: list[Path] = []
        self._keeper: subprocess.Popen[bytes] | None = None
        self._members: list[int] = []
        """Descriptors of the folders' cgroup.procs: once --only-files holds they cannot be opened any more."""
        try:
            for parent, controllers in self._parents():
                self._make(parent, controllers)
            if kept:
                self._begin_keeper()
            self.add(os.getpid())
        except OSError as error:
            self.remove()
            raise CgroupError(
                f"--cgroup: {error.filename or root}: {error.strerror}; limits need a control group that this user may write"
                " to, as root or delegated (systemd-run --user --scope -p Delegate=yes); parent=DIR names another one"
            ) from error
        except CgroupError:
            self.remove()
            raise

    def _parents(self) -> list[tuple[Path, list[str]]]:
        """Where groups are made, and for which controllers."""
        wanted = self._limits.controllers
        unified = self._root / "cgroup.controllers"
        if self._limits.parent:
            given = Path(self._limits.parent)
            if not (given / "cgroup.procs").exists():
                raise CgroupError(f"--cgroup: {given} is no control group")
            if (given / "cgroup.controllers").exists():
                return [(given, wanted)]
            if len(wanted) > 1:
                raise CgroupError("--cgroup: parent= names a group of one controller (cgroup v1): give that one's limit only")
            return [(given, wanted)]
        if unified.exists():
            return [(self._root / self._own.get("", "/").lstrip("/"), wanted)]
        folders = []
        for controller in wanted:
            hierarchy = self._root / controller
            if not hierarchy.is_dir():
                raise CgroupError(f"--cgroup: this host has no {controller} controller (no {hierarchy})")
            folders.append((hierarchy / self._own.get(controller, "/").lstrip("/"), [controller]))
        return folders

    def _make(self, parent: Path, controllers: list[str]) -> None:
        _sweep(parent)
        second = (parent / "cgroup.controllers").exists()
        if second:
            offered = set((parent / "cgroup.controllers").read_text().split())
            if lacking := [name for name in controllers if name not in offered]:
                raise CgroupError(f"--cgroup: {parent} offers no {', '.join(lacking)} controller; ask for its delegation")
            enabled = set((parent / "cgroup.subtree_control").read_text().split())
            for name in controllers:
                if name not in enabled:
                    _write(parent / "cgroup.subtree_control", f"+{name}")
        folder = parent / self._name
        folder.mkdir(mode=0o755)
        self._folders.append(folder)
        self._members.append(os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))
        limits = self._limits
        for name in controllers:
            if name == "memory":
                _write(folder / ("memory.max" if second else "memory.limit_in_bytes"), str(limits.memory))
            elif name == "pids":
                _write(folder / "pids.max", str(limits.pids))
            else:
                quota = round((limits.cpus or 0) * _PERIOD_US)
                if second:
                    _write(folder / "cpu.max", f"{quota} {_PERIOD_US}")
                else:
                    _write(folder / "cpu.cfs_period_us", str(_PERIOD_US))
                    _write(folder / "cpu.cfs_quota_us", str(quota))

    def add(self, pid: int) -> None:
        """The process, with all its threads. OSError."""
        for members in self._members:
            os.pwrite(members, str(pid).encode(), 0)

    def _begin_keeper(self) -> None:
        """Not in the group, which could not go then."""
        theirs, _ = os.pipe()  # our end stays open as long as we live
        command = [sys.executable, "-P", "-m", "qemu_user.cgroup_keeper", str(theirs), *map(str, self._folders)]
        null = subprocess.DEVNULL
        try:
            self._keeper = subprocess.Popen(
                command, pass_fds=(theirs,), stdin=null, stdout=null, stderr=null, start_new_session=True
            )
        finally:
            os.close(theirs)

    def remove(self) -> None:
        """We go back to where we were, and the group with its limits goes, once the VM's process has ended; one that is `kept`
        goes when we have ended. Idempotent.
        """
        if self._keeper is not None:
            return
        until = time.monotonic() + _PATIENCE
        for members in self._members:
            os.close(members)
        self._members.clear()
        for folder in self._folders:
            with suppress(OSError):
                _write(folder.parent / "cgroup.procs", str(os.getpid()))
            while folder.exists():
                try:
                    folder.rmdir()
                    break
                except OSError:
                    if time.monotonic() > until:
                        break
                time.sleep(0.02)
        self._folders.clear()


def lacking(root: Path = ROOT) -> str:
    """Why groups with all limits cannot be made beneath ours; "": they can."""
    own = _own_groups()
    if (root / "cgroup.controllers").exists():
        parent = root / own.get("", "/").lstrip("/")
        file = parent / "cgroup.controllers"
        offered = file.read_text().split() if file.exists() else []
        if missing := [name for name in _CONTROLLERS if name not in offered]:
            return f"{parent} offers no {', '.join(missing)}"
        return "" if os.access(parent, os.W_OK) else f"{parent} is not ours to write to"
    for name in _CONTROLLERS:
        folder = root / name / own.get(name, "/").lstrip("/")
        if not os.access(folder, os.W_OK):
            return f"{folder} is not there, or not ours to write to"
    return ""


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _own_groups() -> dict[str, str]:
    """Controller -> our group's path in its hierarchy; "" is version 2's."""
    groups: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace").splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            groups[name] = path
    return groups


def _sweep(parent: Path) -> None:
    """Groups of device processes that were killed, and are empty."""
    for folder in parent.glob(f"{_PREFIX}*-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                folder.rmdir()
