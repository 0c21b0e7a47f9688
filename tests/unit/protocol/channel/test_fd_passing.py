"""Descriptors: room for many of them."""

from __future__ import annotations

import os
from pathlib import Path

from protocol.channel import fd_passing


def test_room_for_descriptors_is_made_at_once() -> None:
    """In a process that has one thread: fork() gives it a table for what is open."""
    pid = os.fork()
    if not pid:
        fd_passing.make_room(3000)
        (size,) = [int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "FDSize" in line]
        os._exit(size >= 3000)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
