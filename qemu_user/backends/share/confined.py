"""A directory tree that nobody leaves: paths are resolved beneath the root, symbolic links are never followed.

Used by server.py with names from the guest. A path is a tuple of names; every operation opens its directory with
openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS) (name by name with O_NOFOLLOW on kernels before 5.6) and then works on
one name relative to it. So neither "..", nor a link, nor a rename on the host in between leads out.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator

Path = tuple[str, ...]
_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x02, 0x04, 0x08
_HOW = struct.pack(
    "<QQQ", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH
)
_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH = 0x1000
NAME_MAX = 255


def check_name(name: str) -> str:
    """A name that may be looked up or made. OSError: ENOENT, EINVAL, ENAMETOOLONG."""
    if not name:
        raise OSError(errno.ENOENT, "an empty name")
    if name in (".", "..") or "/" in name or "\0" in name:
        raise OSError(errno.EINVAL, "not a name")
    if len(os.fsencode(name)) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "a name too long")
    return name


class ConfinedTree:
    """The tree under `folder`. All operations raise OSError as the system call would."""

    def __init__(self, folder: str, readonly: bool = False) -> None:
        self.readonly = readonly
        self._root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._has_openat2 = True

    def close(self) -> None:
        """Idempotent."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    # -- resolution --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def handle(self, path: Path) -> Iterator[int]:
        """An O_PATH descriptor of `path` itself (a symbolic link is not followed)."""
        fd = self._resolve(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def _resolve(self, path: Path) -> int:
        for name in path:
            check_name(name)
        if not path:
            return os.dup(self._root)
        if self._has_openat2:
            # RESOLVE_NO_SYMLINKS with O_PATH | O_NOFOLLOW still opens a link that is the last name, as itself.
            text = os.fsencode("/".join(path))
            fd = int(_libc.syscall(_OPENAT2, self._root, text, _HOW, len(_HOW)))
            if fd >= 0:
                return fd
            number = ctypes.get_errno()
            if number not in (errno.ENOSYS, errno.EPERM):
                raise OSError(number, os.strerror(number))
            self._has_openat2 = False
        return self._walk(path)

    def _walk(self, path: Path) -> int:
        fd = os.dup(self._root)
        for name in path:
            try:
                following = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = following
        return fd

    def _writable(self) -> None:
        if self.readonly:
            raise OSError(errno.EROFS, "the folder is shared read-only")

    # -- what is there -----------------------------------------------------------------------------

    def stat(self, path: Path) -> os.stat_result:
        with self.handle(path) as fd:
            return os.fstat(fd)

    def statfs(self, path: Path) -> os.statvfs_result:
        with self.handle(path) as fd:
            return os.statvfs(fd)

    def readlink(self, path: Path) -> str:
        with self.handle(path) as fd:
            return os.fsdecode(os.readlink("", dir_fd=fd))

    def open(self, path: Path, flags: int) -> int:
        """Open a file or folder for input and output. ENXIO for anything else: the host's devices are not the guest's."""
        if flags & (os.O_ACCMODE | os.O_TRUNC):
            self._writable()
        with self.handle(path) as fd:
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                raise OSError(errno.ELOOP, "a symbolic link")
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OSError(errno.ENXIO, "a special file")
            # The descriptor's own magic link: the very inode that was resolved.
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NOCTTY)

    def names(self, path: Path) -> list[str]:
        """Names in a folder, without . and .. ."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    # -- changes -----------------------------------------------------------------------------------

    def create(self, folder: Path, name: str, flags: int, mode: int) -> int:
        """Make a file, with `mode` whatever our umask, and open it; without O_EXCL one that is there will do."""
        self._writable()
        how = (flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY) & ~os.O_EXCL
        with self.handle(folder) as fd:
            try:
                made = os.open(check_name(name), how | os.O_EXCL, mode, dir_fd=fd)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                return self.open((*folder, name), flags & ~os.O_CREAT)
        os.fchmod(made, mode & 0o7777)
        return made

    def mkdir(self, folder: Path, name: str, mode: int) -> None:
        self._writable()
        with self.handle(folder) as fd:
            os.mkdir(check_name(name), mode, dir_fd=fd)
        self.chmod((*folder, name), mode & 0o7777)

    def symlink(self, folder: Path, name: str, target: str) -> None:
        self._writable()
        with self.handle(folder) as fd:
            os.symlink(target, check_name(name), dir_fd=fd)

    def mknod(self, folder: Path, name: str, mode: int) -> None:
        """Named pipes, sockets and plain files; no device nodes."""
        self._writable()
        if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)):
            raise OSError(errno.EPERM, "device nodes are not made on the host")
        with self.handle(folder) as fd:
            os.mknod(check_name(name), mode, dir_fd=fd)

    def link(self, path: Path, folder: Path, name: str) -> None:
        """A hard link `folder`/`name` to `path`."""
        self._writable()
        if not path:
            raise OSError(errno.EPERM, "the shared folder itself")
        with self.handle(path[:-1]) as source, self.handle(folder) as target:
            os.link(path[-1], check_name(name), src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def rename(self, folder: Path, name: str, to_folder: Path, to_name: str) -> None:
        self._writable()
        with self.handle(folder) as source, self.handle(to_folder) as target:
            os.rename(check_name(name), check_name(to_name), src_dir_fd=source, dst_dir_fd=target)

    def remove(self, folder: Path, name: str, is_folder: bool) -> None:
        self._writable()
        with self.handle(folder) as fd:
            if is_folder:
                os.rmdir(check_name(name), dir_fd=fd)
            else:
                os.unlink(check_name(name), dir_fd=fd)

    def chmod(self, path: Path, mode: int) -> None:
        self._writable()
        with self.handle(path) as fd:
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise OSError(errno.EOPNOTSUPP, "a symbolic link has no mode")
            os.chmod(f"/proc/self/fd/{fd}", mode)

    def chown(self, path: Path, uid: int, gid: int) -> None:
        """As far as we may: without root, files stay ours, which is no error (QEMU's security_model=none)."""
        self._writable()
        with self.handle(path) as fd, contextlib.suppress(PermissionError):
            if _libc.fchownat(fd, b"", ctypes.c_uint32(uid), ctypes.c_uint32(gid), _AT_EMPTY_PATH):
                raise OSError(ctypes.get_errno(), "chown")

    def truncate(self, path: Path, size: int) -> None:
        fd = self.open(path, os.O_WRONLY)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    def utime(self, path: Path, accessed: int, modified: int) -> None:
        """Times in nanoseconds."""
        self._writable()
        with self.handle(path[:-1]) as fd:
            os.utime(path[-1] if path else ".", ns=(accessed, modified), dir_fd=fd, follow_symlinks=False)
