"""The running VMs of a user: one directory each, <runtime>/vms/NAME, with meta.json, control.sock and
console.sock.

Who runs a VM holds a lock on its directory, so a dead one is known at once and cleared by whoever looks next.
Used by instance.py and by the command line; `list_vms` must be quick and needs nothing but the standard
library.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

from qemu_user.runtime_folder import runtime_folder

ATTACH_FILE = "attach.json"
"""In the directory of a VM that outlives its device process: how to reach it (machine/keeper.py)."""


class NameTaken(Exception):
    """A VM of that name is running."""


class VmEntry(NamedTuple):
    """A running VM."""

    name: str
    pid: int
    vm_pid: int
    """The kvmcore process behind it, 0 if not known."""
    created: float
    memory: int
    cpus: int
    login: str
    """Whom ssh logs in as."""
    directory: Path

    @property
    def control(self) -> Path:
        """Its QMP socket."""
        return self.directory / "control.sock"

    @property
    def console(self) -> Path:
        """Where terminals attach."""
        return self.directory / "console.sock"

    @property
    def waits(self) -> bool:
        """Whether its device process is dead: the VM waits for `softkvm attach`."""
        if not (self.directory / ATTACH_FILE).exists():
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.connect(str(self.control))
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            pass  # it is there, and busy
        return False


def runtime_directory() -> Path:
    """$XDG_RUNTIME_DIR/softkvm, or /tmp/softkvm-UID where there is no runtime directory."""
    return Path(runtime_folder())


def made_runtime_directory() -> Path:
    """The runtime directory, made if need be. PermissionError when others may write there."""
    directory = runtime_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.stat()
    if info.st_uid not in (0, os.geteuid()) or stat.S_IMODE(info.st_mode) & 0o022:
        raise PermissionError(f"{directory}: other users may write there; it must be yours with mode 0700")
    return directory


def _vms() -> Path:
    return made_folder("vms")


def logs_folder() -> Path:
    """Where the consoles' logs are (backends/chardev/console_log.py)."""
    return made_folder("logs")


def made_folder(kind: str) -> Path:
    """The runtime directory's folder of running things of a kind: `vms`, `switches`."""
    folder = made_runtime_directory() / kind
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


class Registration:
    """Our VM's directory (or another kind's), ours until close() or death."""

    def __init__(self, name: str, kind: str = "vms", taken: str = "") -> None:
        """NameTaken with the text `taken`, OSError."""
        self.name = name
        self.directory = made_folder(kind) / name
        self._meta: dict[str, Any] = {}
        while True:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._lock = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise NameTaken(
                    taken or f"a VM named {name} is running; choose another with -name, or see `softkvm ps`"
                ) from None
            if _is_same(self._lock, self.directory):
                break
            os.close(self._lock)  # somebody cleared it away between our two calls
        for left in self.directory.iterdir():
            left.unlink()

    @classmethod
    def adopted(cls, directory: Path, lock: int) -> Registration:
        """Of a VM whose process died while somebody else held `lock`, the locked directory's descriptor, ours from now on."""
        made = cls.__new__(cls)
        made.name, made.directory, made._lock = directory.name, directory, lock
        made._meta = {}
        for left in directory.iterdir():
            if left.suffix == ".sock":
                left.unlink()
        return made

    @property
    def descriptor(self) -> int:
        """Of the directory; whoever has it keeps the name taken."""
        return self._lock

    def describe(self, **meta: Any) -> None:
        """Write meta.json: from now on others see the VM."""
        self._meta = meta
        path = self.directory / "meta.json"
        partial = path.with_suffix(".partial")
        partial.write_text(
            json.dumps({"name": self.name, "pid": os.getpid(), "created": time.time(), **meta})
        )
        partial.rename(path)

    def rename(self, name: str) -> bool:
        """Be `name` from now on; False while another VM has it."""
        new = _vms() / name
        _look(new)  # removes what a dead one has left
        try:
            self.directory.rename(new)  # over an empty directory, or none
        except OSError:
            return False
        self.directory, self.name = new, name
        self.describe(**self._meta)
        return True

    def leave(self) -> None:
        """The VM is not ours, and not over: somebody else has the directory locked."""
        os.close(self._lock)
        self._lock = -1

    def close(self) -> None:
        """The VM is over. Idempotent."""
        if self._lock >= 0:
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _is_same(fd: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def list_vms() -> list[VmEntry]:
    """The running VMs by name; what dead ones left is removed on the way."""
    found = []
    for directory in sorted(_vms().iterdir()):
        entry = _look(directory)
        if entry is not None:
            found.append(entry)
    return found


def list_running(kind: str) -> list[Path]:
    """The directories of running things of a kind that is not VMs; what dead ones left is removed on the way."""
    return [directory for directory in sorted(made_folder(kind).iterdir()) if _is_held(directory)]


def find(name: str) -> VmEntry | None:
    """The running VM of that name."""
    return next((entry for entry in list_vms() if entry.name == name), None)


def _look(directory: Path) -> VmEntry | None:
    return _read(directory) if _is_held(directory) else None


def _is_held(directory: Path) -> bool:
    """Whether somebody runs who has this directory; else it is removed."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        shutil.rmtree(directory, ignore_errors=True)  # nobody holds it: its VM is dead
        return False
    finally:
        os.close(fd)


def _read(directory: Path) -> VmEntry | None:
    try:
        meta = json.loads((directory / "meta.json").read_text())
        return VmEntry(
            str(meta["name"]),
            int(meta["pid"]),
            int(meta.get("vm_pid", 0)),
            float(meta["created"]),
            int(meta.get("memory", 0)),
            int(meta.get("cpus", 0)),
            str(meta.get("login", "root")),
            directory,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is only just starting, or ending
