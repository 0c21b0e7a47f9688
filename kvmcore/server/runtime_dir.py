"""Where sockets live: the listening socket, and the private directory of one daemon's life behind it.

Called by the daemon at start and end, and by the zygote when the daemon was killed. A second daemon on the same path is
noticed, what a killed one left is swept. Locks are flock on directories, so that nothing is left of them either. Must
never remove a socket that somebody still listens on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.channel.fd_passing import MAX_PATH, connect, credentials

#: Room that the names inside the private directory need: "/kv-xxxxxxxx-xxxxxxxx/v-xxxxxxxxxxxx".
_INSIDE = 40
_LOCK_SECONDS = 5.0


class AlreadyRunning(Exception):
    """Somebody listens on that path. `pid` is who."""

    def __init__(self, path: str, pid: int) -> None:
        super().__init__(f"a kvmcore daemon (process {pid}) already listens on {path}")
        self.pid = pid


class BadPath(Exception):
    """The path cannot be listened on; the message says why and what to do."""


def default_directory() -> Path:
    """$XDG_RUNTIME_DIR/softkvm, or /tmp/softkvm-UID where there is no runtime directory."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.path.isdir(base) and os.access(base, os.W_OK):
        return Path(base) / "softkvm"
    return Path(f"/tmp/softkvm-{os.geteuid()}")


def default_endpoint() -> str:
    """Where the daemon listens unless told otherwise."""
    return f"ipc://{default_directory() / 'kvmcore.sock'}"


def listen(path: str) -> socket.socket:
    """A listening SOCK_SEQPACKET socket on `path`, mode 0600; a dead daemon's socket there is replaced.

    AlreadyRunning, BadPath, or OSError as bind(2) has it.
    """
    if len(os.fsencode(path)) > MAX_PATH:
        raise BadPath(f"{path}: longer than the {MAX_PATH} bytes that a Unix socket's path may have")
    directory = os.path.dirname(path) or "."
    make_private(Path(directory))
    with _locked(directory):
        _clear(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            _bind(sock, path)
        except BaseException:
            sock.close()
            raise
    return sock


def bind_inside(path: str) -> socket.socket:
    """A listening SOCK_SEQPACKET socket on a fresh name in a private directory."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    _bind(sock, path)
    return sock


def _bind(sock: socket.socket, path: str) -> None:
    before = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(before)
    sock.listen(128)


def make_private(directory: Path) -> None:
    """Create `directory` (0700) unless it is there. BadPath if it is one that another user could tamper with."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = os.stat(directory)
    if not stat.S_ISDIR(info.st_mode):
        raise BadPath(f"{directory} is not a directory")
    others_write = info.st_mode & 0o022 and not info.st_mode & stat.S_ISVTX
    if info.st_uid not in (0, os.geteuid()) or others_write:
        raise BadPath(f"{directory}: other users may write there; choose a directory of mode 0700 that is yours")


def remove_listener(path: str) -> None:
    """Remove the socket at `path` if nobody listens on it any more."""
    try:
        with _locked(os.path.dirname(path) or "."):
            _clear(path)
    except (AlreadyRunning, BadPath, OSError):
        pass  # somebody else's by now, or gone


def _clear(path: str) -> None:
    """Make way at `path`: remove a stale socket. AlreadyRunning if it is not stale."""
    try:
        sock = connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except OSError as error:
        raise BadPath(f"{path} is in the way and is not a kvmcore socket ({error.strerror})") from error
    with sock:
        raise AlreadyRunning(path, credentials(sock).pid)


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """Hold the directory's flock, which starting daemons take turns with."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(fd):
            if time.monotonic() > until:
                raise BadPath(f"{directory} has been locked by another process for {_LOCK_SECONDS:.0f} s")
            time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class PrivateDirectory:
    """The directory (0700) of the ZeroMQ endpoints and VM doors of one daemon's life.

    An open descriptor of it holds its flock: the processes that inherit it keep the directory theirs, and the next
    daemon sweeps those that nobody holds.
    """

    def __init__(self, listen_path: str) -> None:
        """Sweep what dead daemons on the same path left, then make ours. OSError, BadPath."""
        label = hashlib.sha256(os.fsencode(os.path.abspath(listen_path))).hexdigest()[:8]
        base = Path(listen_path).absolute().parent
        if len(os.fsencode(str(base))) + _INSIDE > MAX_PATH:
            base = default_directory()
            make_private(base)
        for left in base.glob(f"kv-{label}-*"):
            _sweep(left)
        self.path = base / f"kv-{label}-{secrets.token_hex(4)}"
        self.path.mkdir(mode=0o700)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def name(self, kind: str) -> str:
        """A fresh path inside, that nobody can guess."""
        return str(self.path / f"{kind}-{secrets.token_hex(6)}")

    def remove(self) -> None:
        """The daemon's life is over."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(directory: Path) -> None:
    """Remove a directory whose holders are all dead."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid == os.geteuid() and _try_lock(fd):
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(fd)
