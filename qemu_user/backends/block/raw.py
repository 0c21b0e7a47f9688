"""Raw disk images: a file or block device, byte for byte.

Opened once and locked for its life (locks.py: one writer or many readers), so that no two processes ever write one
image. Called by devices/virtio/blk.py on the I/O thread; OSError is for the device to answer. Must never
leave an image changed by being opened.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from typing import Protocol

from qemu_user import holes
from qemu_user.backends.block import locks
from qemu_user.backends.errors import BackendBusy, BackendError

SECTOR = 512
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)
_IOV_MAX = 1024
_ZEROES = bytes(1 << 20)


class BlockBackend(Protocol):
    """What a disk device asks of its image. Offsets and lengths in bytes, inside `size`."""

    size: int
    readonly: bool
    discard: bool
    """Whether discarding frees space."""

    report: Callable[[str, str], None]
    """Called with (QMP event, text for the user) when something happens to the disk while it is in use."""

    @property
    def descriptor(self) -> int | None:
        """The open file whose byte n is the disk's byte n; None for formats that place them otherwise."""

    @property
    def waits(self) -> bool:
        """Whether a write takes as long as a disk or a network does, and not as a copy to the page cache."""

    def read(self, offset: int, views: list[memoryview]) -> None: ...

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        """Like read() if that need not wait for a disk or a network, True then; False: it would, and `views` hold nothing of
        value; None: it cannot be told. OSError."""

    def write(self, offset: int, views: list[memoryview]) -> None: ...

    def flush(self) -> None:
        """What was written before is on the disk when this returns."""

    def punch(self, offset: int, length: int) -> None:
        """The contents do not matter any more."""

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        """The range reads as zeroes; `unmap`: it need not take space."""

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        """A byte per `unit` bytes: 1 where there may be something else than zeroes; without `chain`, where the disk may
        differ from its backing file."""

    def lock(self) -> None:
        """One writer or many readers, on all machines that share the image. BackendError if others have it."""

    def unlock(self) -> None:
        """Let others have it; what was written is on the disk (flush) before."""

    def hand_out(self) -> None:
        """Nothing of what was written before is in this process alone when this returns: it may be killed."""

    def locks(self) -> list[int]:
        """The descriptors of the open files that hold the lock."""

    def adopt_locks(self, take: Callable[[], int]) -> None:
        """The lock is held by open files of a process that died: `take` gives their descriptors, in the order of locks(), ours
        from now on."""

    def resize(self, size: int) -> None:
        """The disk has `size` bytes, a multiple of 512, from now on; new ones read as zeroes. OSError."""

    def close(self) -> None: ...


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    while call(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def fallocate_punch(fd: int, offset: int, length: int) -> None:
    """A hole in a file, where the file system has any; else nothing changes. OSError."""
    try:
        _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def unheard(event: str, text: str) -> None:
    """Nobody listens yet."""


class RawImage:
    """A BlockBackend over a raw file or block device."""

    open_flags = 0
    """Beyond those that everybody needs."""

    def __init__(self, path: str, readonly: bool = False, discard: bool = True, locked: bool = True) -> None:
        """BackendError if it cannot be opened, is no disk, or is in use. Not `locked`: somebody else still has it, and
        nothing is written before lock()."""
        self.path, self.readonly, self.discard = path, readonly, discard and not readonly
        self.report: Callable[[str, str], None] = unheard
        self._tells = True
        """Whether the file system says what is in the page cache (RWF_NOWAIT)."""
        self.syncs = True
        """Whether flushes are passed on to the device (cache=unsafe: not)."""
        flags = os.O_CLOEXEC | self.open_flags | (os.O_RDONLY if readonly else os.O_RDWR)
        try:
            self._fd = os.open(path, flags)
        except OSError as error:
            hint = "; use readonly=on to open it for reading" if error.errno in (errno.EACCES, errno.EROFS) else ""
            if self.open_flags and error.errno == errno.EINVAL:
                hint = ": the file system cannot do without the page cache; leave cache=none out"
            raise BackendError(f"disk image {path}: {error.strerror}{'' if readonly else hint}") from error
        self._lock_fd = self._fd
        """Whose open file has the lock: locks go by open files (locks.py)."""
        try:
            self._check(locked)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, locked: bool) -> None:
        kind = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
            raise BackendError(f"disk image {self.path}: is neither a file nor a block device")
        if locked:
            self.lock()
        self._end = os.lseek(self._fd, 0, os.SEEK_END)
        if self._end == 0:
            raise BackendError(f"disk image {self.path}: is empty")
        # A file that ends within a sector is one sector longer, as QEMU has it; the missing bytes read as
        # zeroes.
        self.size = -(-self._end // SECTOR) * SECTOR

    def lock(self) -> None:
        """One writer or many readers: BackendError if others have it. Idempotent."""
        if locks.take(self._lock_fd, write=not self.readonly):
            return
        how = "is being written by" if self.readonly else "is in use by"
        hint = "" if self.readonly else "; VMs can share an image if all have it readonly=on"
        raise BackendBusy(f"disk image {self.path}: {how} another VM or process{hint}")

    def unlock(self) -> None:
        """Let others have it: nothing is read or written until lock()."""
        locks.release(self._lock_fd)

    def hand_out(self) -> None:
        pass  # all of it is the kernel's

    def locks(self) -> list[int]:
        return [self._lock_fd]

    def adopt_locks(self, take: Callable[[], int]) -> None:
        fd = take()
        if fd >= 0:
            self._lock_fd = fd

    @property
    def descriptor(self) -> int | None:
        return self._fd

    @property
    def end(self) -> int:
        """Bytes of the file now, which need not be whole sectors."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    def read(self, offset: int, views: list[memoryview]) -> None:
        """Fill `views` from `offset` on."""
        while views:
            done = os.preadv(self._fd, views[:_IOV_MAX], offset)
            if done == 0:
                for view in views:
                    view[:] = bytes(len(view))
                return
            offset += done
            views = _after(views, done)

    @property
    def waits(self) -> bool:
        """Whether a write is slow."""
        return False

    def read_now(self, offset: int, views: list[memoryview]) -> bool | None:
        """Fill `views` with what is in the page cache."""
        if not self._tells or len(views) > _IOV_MAX:
            return None
        try:
            done = os.preadv(self._fd, views, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._tells = False
            return None
        return done == sum(map(len, views))

    def write(self, offset: int, views: list[memoryview]) -> None:
        """Put `views` at `offset`."""
        while views:
            done = os.pwritev(self._fd, views[:_IOV_MAX], offset)
            offset += done
            views = _after(views, done)

    def flush(self) -> None:
        if not self.readonly and self.syncs:
            os.fdatasync(self._fd)

    def with_data(self, unit: int, chain: bool = True) -> bytearray:
        """A byte per `unit` bytes: 0 for holes."""
        return holes.with_data(self._fd, self.size, unit)

    def punch(self, offset: int, length: int) -> None:
        if not length or not self.discard:
            return
        try:
            _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self.discard = False  # this file system cannot: the contents may as well stay

    def zero(self, offset: int, length: int, unmap: bool) -> None:
        if not length:
            return
        modes = [_ZERO_RANGE | _KEEP_SIZE]
        if unmap and self.discard:
            modes.insert(0, _PUNCH_HOLE | _KEEP_SIZE)
        for mode in modes:
            try:
                _fallocate(self._fd, mode, offset, length)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            else:
                return
        while length:
            part = min(length, len(_ZEROES))
            self.write(offset, [memoryview(_ZEROES)[:part]])
            offset, length = offset + part, length - part

    def resize(self, size: int) -> None:
        if self.readonly:
            raise OSError(errno.EROFS, "the image is open for reading only")
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OSError(errno.EOPNOTSUPP, "a block device has the size that it has")
        os.ftruncate(self._fd, size)
        self.size = self._end = size

    def close(self) -> None:
        """Let go of the image and its lock. Idempotent."""
        if self._fd >= 0:
            if self._lock_fd != self._fd:
                os.close(self._lock_fd)
            os.close(self._fd)
            self._fd = self._lock_fd = -1


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """What is left of `views` after `done` bytes."""
    for index, view in enumerate(views):
        if done < len(view):
            return [view[done:], *views[index + 1 :]]
        done -= len(view)
    return []
