"""What a process shows of itself in ps and top. Host-specific (Linux prctl, /proc)."""

from __future__ import annotations

import ctypes
from functools import cache

_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


def set_name(name: str) -> None:
    """The thread's name: 15 bytes of it."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode(errors="replace")[:15]), 0, 0, 0)


@cache
def _room() -> tuple[int, int]:
    """Address and bytes of the command line: forked processes have it in the same place."""
    try:
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49, the first two are cut off
    except (OSError, IndexError, ValueError):
        return 0, 0
    return start, end - start


def set_words(words: list[str]) -> None:
    """Show `words` as the command line, as far as the original one has room."""
    start, room = _room()
    if room > 1:
        text = b"\0".join(word.replace("\0", " ").encode(errors="replace") for word in words)[: room - 1]
        ctypes.memmove(start, text + bytes(room - len(text)), room)
