"""What a process of kvmcore tells the host about itself: its title in ps, and that it dies with its parent.

Called by zygote and VM processes right after fork. Host-specific (Linux prctl, /proc): nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


def set_title(title: str) -> None:
    """Show `title` in ps and top: as the command line, as far as the original one has room, and as the name (15 bytes)."""
    encoded = title.encode(errors="replace").replace(b"\0", b" ")
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(encoded[:15]), 0, 0, 0)
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as stat:
            fields = stat.read().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end: fields 48 and 49, the first two are cut off
    except (OSError, IndexError, ValueError):
        return
    room = end - start
    if room > 1:
        text = encoded[: room - 1]
        ctypes.memmove(start, text + bytes(room - len(text)), room)


def die_with_parent(parent: int) -> None:
    """Be killed when the parent dies, at the latest now."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ignore_terminal_signals() -> None:
    """Ctrl-C in the daemon's terminal is the daemon's business: it takes its children down in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
