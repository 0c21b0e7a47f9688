"""A 9P2000.L server of one folder: requests in, replies out. Used by devices/virtio/p9.py, on the I/O thread.

A fid is a path beneath the root, resolved anew at each use (confined.py), and an open descriptor once it was opened;
so tens of thousands of fids cost no descriptors. Whatever a client does wrong is answered with Rlerror. Extended
attributes are not served (EOPNOTSUPP).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Callable

import msgspec

from qemu_user.backends.errors import BackendError
from qemu_user.backends.share import messages as m
from qemu_user.backends.share.confined import ConfinedTree, Path, check_name

MAX_MSIZE = 512 * 1024
MIN_MSIZE = 4096
MAX_FIDS = 1 << 16
MAX_WALK = 16
_KEPT_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_EXCL | os.O_DIRECTORY | os.O_SYNC | os.O_DSYNC
"""Flags of Tlopen that reach the host; their numbers are Linux's generic ones, which 9P2000.L uses too. Not O_APPEND:
every Twrite says where it goes, and a client that writes a page back means that place (Linux would append it again).
"""
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_SET, _MTIME_SET = 0x1, 0x2, 0x4, 0x8, 0x10, 0x20, 0x80, 0x100
_LOCK_SUCCESS, _LOCK_BLOCKED = 0, 1
_UNLOCK = 2
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_LOCK_KINDS = {0: fcntl.F_RDLCK, 1: fcntl.F_WRLCK, _UNLOCK: fcntl.F_UNLCK}
_FLOCK = struct.Struct("hhqqi4x")
_NOBODY_CHANGED = 0xFFFFFFFF


class FidState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`flags`: what it was opened with, -1 if it is not open."""

    number: int
    path: list[bytes]
    flags: int


class _Fid:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1
        self.flags = -1
        self.listing: list[str] = []


class Server:
    """Serves `folder`. BackendError if it cannot be opened."""

    def __init__(self, folder: str, readonly: bool = False) -> None:
        try:
            self._tree = ConfinedTree(folder, readonly)
        except OSError as error:
            raise BackendError(f"shared folder {folder}: {error.strerror}") from error
        self.msize = MIN_MSIZE
        self._fids: dict[int, _Fid] = {}
        self._handlers: dict[int, Callable[[m.Fields], bytes]] = {
            m.TSTATFS: self._statfs,
            m.TLOPEN: self._lopen,
            m.TLCREATE: self._lcreate,
            m.TSYMLINK: self._symlink,
            m.TMKNOD: self._mknod,
            m.TRENAME: self._rename,
            m.TREADLINK: self._readlink,
            m.TGETATTR: self._getattr,
            m.TSETATTR: self._setattr,
            m.TREADDIR: self._readdir,
            m.TFSYNC: self._fsync,
            m.TLOCK: self._lock,
            m.TGETLOCK: self._getlock,
            m.TLINK: self._link,
            m.TMKDIR: self._mkdir,
            m.TRENAMEAT: self._renameat,
            m.TUNLINKAT: self._unlinkat,
            m.TVERSION: self._version,
            m.TATTACH: self._attach,
            m.TFLUSH: lambda fields: b"",  # requests are answered in order: what it flushes is over
            m.TWALK: self._walk,
            m.TWRITE: self._write,
            m.TCLUNK: self._clunk,
            m.TREMOVE: self._remove,
        }

    def close(self) -> None:
        """Idempotent."""
        self.reset()
        self._tree.close()

    def reset(self) -> None:
        """The client is gone: no fid is left."""
        for fid in self._fids.values():
            _shut(fid)
        self._fids.clear()
        self.msize = MIN_MSIZE

    # -- the way in --------------------------------------------------------------------------------

    def serve(self, request: bytes, room: list[memoryview]) -> bytes | int:
        """One request. The reply, to be written into the buffers `room`; or how many bytes of it stand there already
        (Tread puts data where it belongs without a copy).
        """
        if len(request) < m.HEADER.size:
            return m.error(errno.EINVAL, m.NO_TAG)
        size, kind, tag = m.HEADER.unpack_from(request)
        try:
            if size > len(request):
                raise m.BadMessage("a size that is not the message's")
            fields = m.Fields(request[m.HEADER.size : size])
            if kind == m.TREAD:
                return self._read(fields, tag, room)
            handler = self._handlers.get(kind)
            if handler is None:
                return m.error(errno.EOPNOTSUPP, tag)
            return m.reply(kind + 1, tag, handler(fields))
        except OSError as error:
            return m.error(error.errno or errno.EIO, tag)
        except (m.BadMessage, ValueError):  # ValueError: a NUL in a name
            return m.error(errno.EINVAL, tag)

    def _fid(self, number: int) -> _Fid:
        fid = self._fids.get(number)
        if fid is None:
            raise OSError(errno.EBADF, "no such fid")
        return fid

    def _new(self, number: int, path: Path) -> None:
        if number in self._fids or number == m.NO_FID:
            raise OSError(errno.EINVAL, "the fid is in use")
        if len(self._fids) >= MAX_FIDS:
            raise OSError(errno.ENFILE, "too many fids")
        self._fids[number] = _Fid(path)

    def _opened(self, number: int) -> _Fid:
        fid = self._fid(number)
        if fid.fd < 0:
            raise OSError(errno.EBADF, "the fid is not open")
        return fid

    # -- session -----------------------------------------------------------------------------------

    def _version(self, fields: m.Fields) -> bytes:
        msize, version = fields.number(4), fields.text()
        self.reset()
        if msize < MIN_MSIZE:
            raise OSError(errno.EMSGSIZE, "msize too small")
        self.msize = min(msize, MAX_MSIZE)
        return m.number(self.msize, 4) + m.text(m.VERSION if version == m.VERSION else "unknown")

    def _attach(self, fields: m.Fields) -> bytes:
        number, auth = fields.numbers(4, 4)
        if auth != m.NO_FID:
            raise OSError(errno.EINVAL, "no authentication here")
        self._new(number, ())
        return m.qid(self._tree.stat(()))

    def _walk(self, fields: m.Fields) -> bytes:
        number, new, count = fields.numbers(4, 4, 2)
        names = [fields.text() for _ in range(min(count, MAX_WALK + 1))]
        if count > MAX_WALK:
            raise OSError(errno.EINVAL, "too many names")
        fid = self._fid(number)
        if fid.fd >= 0:
            raise OSError(errno.EBUSY, "an open fid does not walk")
        path, qids = fid.path, []
        try:
            for name in names:
                # ".." at the root stays there, as everywhere in 9P.
                path = path[:-1] if name == ".." else path if name == "." else (*path, check_name(name))
                qids.append(m.qid(self._tree.stat(path)))
        except OSError:
            if not qids:
                raise
        if len(qids) == len(names):
            if new == number:
                fid.path = path
            else:
                self._new(new, path)
        return m.number(len(qids), 2) + b"".join(qids)

    def _clunk(self, fields: m.Fields) -> bytes:
        number = fields.number(4)
        _shut(self._fid(number))
        del self._fids[number]
        return b""

    # -- files -------------------------------------------------------------------------------------

    def _lopen(self, fields: m.Fields) -> bytes:
        number, flags = fields.numbers(4, 4)
        fid = self._fid(number)
        if fid.fd >= 0:
            raise OSError(errno.EBUSY, "the fid is open")
        self._take(fid, self._tree.open(fid.path, flags & _KEPT_FLAGS), flags & _KEPT_FLAGS)
        return m.qid(os.fstat(fid.fd)) + m.number(0, 4)

    def _lcreate(self, fields: m.Fields) -> bytes:
        number, name, (flags, mode, group) = fields.number(4), fields.text(), fields.numbers(4, 4, 4)
        fid = self._fid(number)
        if fid.fd >= 0:
            raise OSError(errno.EBUSY, "the fid is open")
        fd = self._tree.create(fid.path, name, flags & _KEPT_FLAGS, mode & 0o7777)
        fid.path = (*fid.path, name)
        self._take(fid, fd, flags & _KEPT_FLAGS & ~(os.O_EXCL | os.O_TRUNC))
        self._own(fid.path, group)
        return m.qid(os.fstat(fd)) + m.number(0, 4)

    @staticmethod
    def _take(fid: _Fid, fd: int, flags: int) -> None:
        fid.fd, fid.flags = fd, flags

    def _own(self, path: Path, group: int) -> None:
        if group != _NOBODY_CHANGED:
            self._tree.chown(path, _NOBODY_CHANGED, group)

    def _read(self, fields: m.Fields, tag: int, room: list[memoryview]) -> bytes | int:
        number, offset, count = fields.numbers(4, 8, 4)
        fid = self._opened(number)
        if stat.S_ISDIR(os.fstat(fid.fd).st_mode):
            raise OSError(errno.EISDIR, "a folder")
        count = min(count, self.msize - m.READ_HEADER, sum(map(len, room)) - m.READ_HEADER)
        header, data = _cut(room, m.READ_HEADER)
        target, _ = _cut(data, max(count, 0))
        done = os.preadv(fid.fd, target, offset) if target else 0
        raw = m.HEADER.pack(m.READ_HEADER + done, m.TREAD + 1, tag) + m.number(done, 4)
        for view in header:
            view[:], raw = raw[: len(view)], raw[len(view) :]
        return m.READ_HEADER + done

    def _write(self, fields: m.Fields) -> bytes:
        number, offset, count = fields.numbers(4, 8, 4)
        fid = self._opened(number)
        return m.number(os.pwrite(fid.fd, fields.data(count), offset), 4)

    def _fsync(self, fields: m.Fields) -> bytes:
        number, only_data = fields.numbers(4, 4)
        fd = self._opened(number).fd
        if only_data:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return b""

    def _lock_range(self, fields: m.Fields) -> m.Lock:
        kind, start, length, process = fields.numbers(1, 8, 8, 4)
        if kind not in _LOCK_KINDS or start >= 1 << 63 or length >= 1 << 63:
            raise OSError(errno.EINVAL, "a bad lock")
        return m.Lock(kind, start, length, process, fields.text())

    def _lock(self, fields: m.Fields) -> bytes:
        number = fields.number(4)
        kind, (flags, start, length, _) = fields.number(1), fields.numbers(4, 8, 8, 4)
        fields.text()
        if kind not in _LOCK_KINDS or start >= 1 << 63 or length >= 1 << 63 or flags & ~3:
            raise OSError(errno.EINVAL, "a bad lock")
        request = _FLOCK.pack(_LOCK_KINDS[kind], os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(self._opened(number).fd, _F_OFD_SETLK, request)
        except BlockingIOError:
            return m.number(_LOCK_BLOCKED, 1)
        return m.number(_LOCK_SUCCESS, 1)

    def _getlock(self, fields: m.Fields) -> bytes:
        number = fields.number(4)
        wanted = self._lock_range(fields)
        request = _FLOCK.pack(_LOCK_KINDS[wanted.kind], os.SEEK_SET, wanted.start, wanted.length, 0)
        kind, _, start, length, _ = _FLOCK.unpack(fcntl.fcntl(self._opened(number).fd, _F_OFD_GETLK, request))
        if kind == fcntl.F_UNLCK:
            found = (_UNLOCK, wanted.start, wanted.length)
        else:
            found = (0 if kind == fcntl.F_RDLCK else 1, start, length)
        return m.number(found[0], 1) + struct.pack("<QQI", found[1], found[2], wanted.process) + m.text(wanted.client)

    # -- attributes --------------------------------------------------------------------------------

    def _status(self, fid: _Fid) -> os.stat_result:
        # An open file that was removed is still there for who has it open.
        return os.fstat(fid.fd) if fid.fd >= 0 else self._tree.stat(fid.path)

    def _getattr(self, fields: m.Fields) -> bytes:
        number, _ = fields.numbers(4, 8)
        return m.attributes(self._status(self._fid(number)))

    def _setattr(self, fields: m.Fields) -> bytes:
        number, valid, mode, uid, gid, size = fields.numbers(4, 4, 4, 4, 4, 8)
        times = [seconds * 1_000_000_000 + rest for seconds, rest in (fields.numbers(8, 8), fields.numbers(8, 8))]
        fid = self._fid(number)
        if valid & _MODE:
            self._tree.chmod(fid.path, mode & 0o7777)
        if valid & (_UID | _GID):
            self._tree.chown(fid.path, uid if valid & _UID else _NOBODY_CHANGED, gid if valid & _GID else _NOBODY_CHANGED)
        if valid & _SIZE:
            self._tree.truncate(fid.path, size)
        if valid & (_ATIME | _MTIME):
            self._set_times(fid, valid, times)
        return b""

    def _set_times(self, fid: _Fid, valid: int, times: list[int]) -> None:
        now, status = time.time_ns(), self._status(fid)
        accessed, modified = status.st_atime_ns, status.st_mtime_ns
        if valid & _ATIME:
            accessed = times[0] if valid & _ATIME_SET else now
        if valid & _MTIME:
            modified = times[1] if valid & _MTIME_SET else now
        self._tree.utime(fid.path, accessed, modified)

    def _statfs(self, fields: m.Fields) -> bytes:
        found = self._tree.statfs(self._fid(fields.number(4)).path)
        free = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return struct.pack("<II6QI", 0x01021997, found.f_frsize, *free, found.f_fsid & (1 << 64) - 1, found.f_namemax)

    def _readlink(self, fields: m.Fields) -> bytes:
        return m.text(self._tree.readlink(self._fid(fields.number(4)).path))

    # -- folders -----------------------------------------------------------------------------------

    def _readdir(self, fields: m.Fields) -> bytes:
        number, offset, count = fields.numbers(4, 8, 4)
        fid = self._opened(number)
        if offset == 0:
            fid.listing = [".", "..", *self._tree.names(fid.path)]
        room = min(count, self.msize - m.READ_HEADER)
        out: list[bytes] = []
        for position in range(min(offset, len(fid.listing)), len(fid.listing)):
            name = fid.listing[position]
            path = {".": fid.path, "..": fid.path[:-1]}.get(name, (*fid.path, name))
            try:
                status = self._tree.stat(path)
            except OSError:
                continue  # gone meanwhile
            entry = m.qid(status) + m.number(position + 1, 8) + m.number(stat.S_IFMT(status.st_mode) >> 12, 1) + m.text(name)
            if len(entry) > room:
                break
            room -= len(entry)
            out.append(entry)
        data = b"".join(out)
        return m.number(len(data), 4) + data

    def _mkdir(self, fields: m.Fields) -> bytes:
        number, name, (mode, group) = fields.number(4), fields.text(), fields.numbers(4, 4)
        folder = self._fid(number).path
        self._tree.mkdir(folder, name, mode & 0o7777)
        self._own((*folder, name), group)
        return m.qid(self._tree.stat((*folder, name)))

    def _symlink(self, fields: m.Fields) -> bytes:
        number, name, target, group = fields.number(4), fields.text(), fields.text(), fields.number(4)
        folder = self._fid(number).path
        self._tree.symlink(folder, name, target)
        self._own((*folder, name), group)
        return m.qid(self._tree.stat((*folder, name)))

    def _mknod(self, fields: m.Fields) -> bytes:
        number, name, (mode, _, _, group) = fields.number(4), fields.text(), fields.numbers(4, 4, 4, 4)
        folder = self._fid(number).path
        self._tree.mknod(folder, name, mode)
        self._own((*folder, name), group)
        return m.qid(self._tree.stat((*folder, name)))

    def _link(self, fields: m.Fields) -> bytes:
        folder, number, name = fields.number(4), fields.number(4), fields.text()
        self._tree.link(self._fid(number).path, self._fid(folder).path, name)
        return b""

    def _move(self, source: Path, folder: Path, name: str) -> None:
        if not source:
            raise OSError(errno.EBUSY, "the shared folder itself")
        self._tree.rename(source[:-1], source[-1], folder, name)
        target = (*folder, name)
        for fid in self._fids.values():  # fids below keep naming what they named
            if fid.path[: len(source)] == source:
                fid.path = target + fid.path[len(source) :]

    def _rename(self, fields: m.Fields) -> bytes:
        number, folder, name = fields.number(4), fields.number(4), fields.text()
        self._move(self._fid(number).path, self._fid(folder).path, name)
        return b""

    def _renameat(self, fields: m.Fields) -> bytes:
        old, old_name, new, new_name = fields.number(4), fields.text(), fields.number(4), fields.text()
        self._move((*self._fid(old).path, check_name(old_name)), self._fid(new).path, new_name)
        return b""

    def _unlinkat(self, fields: m.Fields) -> bytes:
        number, name, flags = fields.number(4), fields.text(), fields.number(4)
        self._tree.remove(self._fid(number).path, name, bool(flags & m.NAME_AT_REMOVEDIR))
        return b""

    def _remove(self, fields: m.Fields) -> bytes:
        number = fields.number(4)
        fid = self._fid(number)
        try:
            if not fid.path:
                raise OSError(errno.EBUSY, "the shared folder itself")
            is_folder = stat.S_ISDIR(self._tree.stat(fid.path).st_mode)
            self._tree.remove(fid.path[:-1], fid.path[-1], is_folder)
        finally:
            _shut(fid)  # the fid is gone, whether the file is or not (remove(5))
            del self._fids[number]
        return b""

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> list[FidState]:
        return [
            FidState(number=number, path=[os.fsencode(name) for name in fid.path], flags=fid.flags)
            for number, fid in self._fids.items()
        ]

    def restore(self, msize: int, fids: list[FidState]) -> None:
        """Take over; a file that cannot be opened here any more gives EBADF when it is used."""
        self.reset()
        self.msize = msize
        for saved in fids:
            fid = self._fids[saved.number] = _Fid(tuple(os.fsdecode(name) for name in saved.path))
            if saved.flags >= 0:
                flags = saved.flags & _KEPT_FLAGS & ~(os.O_TRUNC | os.O_EXCL)
                try:
                    self._take(fid, self._tree.open(fid.path, flags), flags)
                except OSError:
                    continue


def _shut(fid: _Fid) -> None:
    if fid.fd >= 0:
        os.close(fid.fd)
        fid.fd = -1


def _cut(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """(the first `count` bytes, the rest) of a list of buffers."""
    front: list[memoryview] = []
    for index, view in enumerate(views):
        if count < len(view):
            return [*front, view[:count]] if count else front, [view[count:], *views[index + 1 :]]
        front.append(view)
        count -= len(view)
    return front, []
