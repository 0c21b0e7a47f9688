"""What a process of kvmcore tells the host about itself: its title in ps, and that it dies with its parent.

Called by zygote and VM processes right after fork. Host-specific (Linux prctl, /proc): nowhere else.
"""

from __future__ import annotations

import ctypes
import os
import signal

from protocol.channel import process_title

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def set_title(title: str) -> None:
    """Show `title` in ps and top: as the command line, as far as the original one has room, and as the name."""
    process_title.set_name(title)
    process_title.set_words([title])


def die_with_parent(parent: int) -> None:
    """Be killed when the parent dies, at the latest now."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def ignore_terminal_signals() -> None:
    """Ctrl-C in the daemon's terminal is the daemon's business: it takes its children down in order."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
