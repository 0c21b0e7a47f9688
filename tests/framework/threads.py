"""What Linux says of threads."""

from __future__ import annotations

import re
from pathlib import Path


def slice_of(thread: int) -> int:
    """Nanoseconds that a thread (a process: its first one) asks the scheduler for; 0 where Linux does not tell."""
    try:
        found = re.search(r"se\.slice +: +(\d+)", Path(f"/proc/{thread}/sched").read_text())
    except FileNotFoundError:
        return 0
    return int(found[1]) if found else 0
