"""The kernels on the host's own processor: `python -m qemu_user.bench.native GROUP TICKS`, a process of its own.

native.bin is position-independent code of kernels/kernels.c that begins with run_group(); it gets its memory and its way to
write and to read the time from here.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
from pathlib import Path

CODE = Path(__file__).parent / "kernels" / "native.bin"
_ROOM = 48 << 20
_PUT = ctypes.CFUNCTYPE(None, ctypes.c_char)
_TICKS = ctypes.CFUNCTYPE(ctypes.c_uint64)


class _Place(ctypes.Structure):
    """struct place of kernels.h."""

    _fields_ = [("put", _PUT), ("ticks", _TICKS), ("room", ctypes.c_void_p)]


def run(group: str, budget: int) -> None:
    """Report the group's kernels on stdout. OSError when the host maps no code."""
    code = CODE.read_bytes()
    text = mmap.mmap(-1, -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    text[: len(code)] = code
    at = ctypes.addressof(ctypes.c_char.from_buffer(text))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(len(text)), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "cannot map code")
    room = mmap.mmap(-1, _ROOM)

    def put(character: bytes) -> None:
        sys.stdout.write(character.decode())

    place = _Place(_PUT(put), _TICKS(lambda: time.monotonic_ns() // 100), ctypes.addressof(ctypes.c_char.from_buffer(room)))
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64)(at)
    entry(ctypes.addressof(place), group.encode(), budget)


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
