"""Finds, builds if need be, and maps the engine's image. Loaded into every VM process: never imports LLVM."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

from kvmcore.engine import image
from kvmcore.engine.code_memory import LARGE

#: Address space for template code, behind the image, and for translated regions, behind that; records reach 4 GB.
TEMPLATE_BYTES, ARENA_BYTES = 20 << 20, 48 << 20
_PROT_NONE = 0
_MAP_FIXED = 0x10
_NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


#: Of the last byte of an entry of /proc/self/pagemap: 1 if the page is present.
_PRESENT = bytes(byte >> 7 for byte in range(256))


class EngineError(Exception):
    """There is no usable engine image and none can be built; the message says why."""


def ensure_image() -> Path:
    """The path of this version's image;
    built in a process of its own (some seconds, once) when it is not there.
    """
    path = image.path()
    if _usable(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(path.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several first starts at once: one builds
            if _usable(path):
                return path
            result = subprocess.run(
                [sys.executable, "-m", "kvmcore.engine.build", str(path)],
                capture_output=True, text=True, check=False,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
            )  # fmt: skip
    except OSError as error:
        raise EngineError(f"cannot write the engine image {path}: {error.strerror}") from error
    if result.returncode != 0 or not _usable(path):
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"cannot build the engine image {path}: {last}")
    return path


def _usable(path: Path) -> bool:
    try:
        image.unpack(path.read_bytes())
    except (OSError, image.ImageError, ValueError):
        return False
    return True


class Image:
    """A mapped image. `functions`: offsets, relative to what records are relative to.

    `address(name)` is a function's host address; the named methods call it without the GIL.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            offset, size, self.functions = image.unpack(data)
        except (image.ImageError, ValueError) as error:
            raise EngineError(f"engine image {path}: {error}") from error
        # Copied from the verified bytes: later changes of the file cannot reach it.
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        everything = self._room + TEMPLATE_BYTES + ARENA_BYTES
        start = self._mmap(None, everything + LARGE, _PROT_NONE, _NORESERVE, -1)
        self._base = -(-(start + self._room) // LARGE) * LARGE - self._room  # other processes' code, in large pages
        self._mprotect(mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memmove(self._base, data[offset:], size)
        self._mprotect(mmap.PROT_READ | mmap.PROT_EXEC)
        word = ctypes.c_uint64
        self.run = ctypes.CFUNCTYPE(word, word)(self.address("run"))
        self.atomic_or = ctypes.CFUNCTYPE(word, word, word)(self.address("atomic_or64"))
        self.atomic_and = ctypes.CFUNCTYPE(word, word, word)(self.address("atomic_and64"))
        self.signal = ctypes.CFUNCTYPE(word, word, word)(self.address("signal"))
        self.run_on, self.serve_runs, self.serve_irqfds, self.wake_hart = (
            ctypes.CFUNCTYPE(word, word)(self.address(f"python_{name}"))
            for name in ("run_on", "serve_runs", "serve_irqfds", "wake_hart")
        )
        self.sleep_hart = ctypes.CFUNCTYPE(word, word, word, word)(self.address("python_sleep_hart"))
        self.deliver = ctypes.CFUNCTYPE(word, word, word)(self.address("python_deliver"))
        self._decode = ctypes.CFUNCTYPE(word, word, word)(self.address("decode_record"))
        self.assemble = ctypes.CFUNCTYPE(word, word)(self.address("python_template_assemble"))
        self._install = ctypes.CFUNCTYPE(word, word, word, word, word)(self.address("python_template_install"))
        self.know = ctypes.CFUNCTYPE(word, word, word)(self.address("python_know"))
        self.ticks = ctypes.CFUNCTYPE(word)(self.address("ticks"))

    @property
    def table(self) -> int:
        """Host address of the table of templates."""
        return self._base + self.functions["_decode_at"] + self.functions["_templates_at"]

    def address(self, name: str) -> int:
        """Host address of a function of the image."""
        return self._base + self.functions["_decode_at"] + self.functions[name]

    def code_of(self, name: str) -> bytes:
        """The bytes of a function, and perhaps some that pad it."""
        start = self.functions[name]
        end = min(at for other, at in self.functions.items() if at > start and not other.startswith("_"))
        return ctypes.string_at(self.address(name), end - start)

    def _mmap(self, at: int | None, size: int, protection: int, flags: int, fd: int) -> int:
        where = self._libc.mmap(
            ctypes.c_void_p(at), ctypes.c_size_t(size), protection, flags, fd, ctypes.c_long(0)
        )
        if where == ctypes.c_void_p(-1).value:
            raise EngineError(f"cannot map {size} bytes for the engine: {os.strerror(ctypes.get_errno())}")
        return int(where)

    def _mprotect(self, protection: int) -> None:
        if self._libc.mprotect(ctypes.c_void_p(self._base), ctypes.c_size_t(self._room), protection):
            raise EngineError(f"cannot map the engine image executable: {os.strerror(ctypes.get_errno())}")

    def decode(self, page: bytes, offset: int) -> int:
        """The record of the instruction at `offset` of a page, which has all of it."""
        raw = int.from_bytes(page[offset : offset + 4], "little")
        return int(self._decode(raw if raw & 3 == 3 else raw & 0xFFFF, offset))

    template_bytes, arena_bytes = TEMPLATE_BYTES, ARENA_BYTES

    @property
    def templates(self) -> int:
        """Where template code is, relative to what records are relative to."""
        return self._room - self.functions["_decode_at"]

    @property
    def arena(self) -> int:
        """Where translated regions are, relative to what records are relative to."""
        return self.templates + TEMPLATE_BYTES

    def map_arena(self, fd: int) -> None:
        """Map the translator's memory for regions, readable and executable. EngineError."""
        self._map_code(self._base + self._room + TEMPLATE_BYTES, ARENA_BYTES, fd)

    def map_templates(self, fd: int) -> None:
        """The same of its memory for template code."""
        self._map_code(self._base + self._room, TEMPLATE_BYTES, fd)

    def _map_code(self, at: int, size: int, fd: int) -> None:
        self._mmap(at, size, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_SHARED | _MAP_FIXED, fd)

    def shared_bytes(self) -> int:
        """Of template code and regions, as much as this process has been in: pages of the host, which other VMs' processes may
        have as well. 0 where /proc is not to be read."""
        first = (self._base + self._room) // mmap.PAGESIZE
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return 0
        try:
            entries = os.pread(fd, (TEMPLATE_BYTES + ARENA_BYTES) // mmap.PAGESIZE * 8, first * 8)
        except OSError:
            return 0
        finally:
            os.close(fd)
        return entries[7::8].translate(_PRESENT).count(1) * mmap.PAGESIZE

    def leave_shared(self) -> None:
        """Be in no template code and no region any more. Harts may run: what they go on using comes back as they touch it."""
        size = ctypes.c_size_t(TEMPLATE_BYTES + ARENA_BYTES)
        self._libc.madvise(ctypes.c_void_p(self._base + self._room), size, mmap.MADV_DONTNEED)

    def install_templates(self, page: int, place: int) -> None:
        """Let the records of a decoded page lead to its template code, whose list of heads is at `place` of that memory."""
        self._install(page, self._base + self._room + place, self.templates + place, self.arena)

    @classmethod
    def load(cls, path: Path | None = None) -> Image:
        """Map the image at `path`, or this version's, which is built if need be. EngineError."""
        return cls(path if path is not None else ensure_image())
