"""Removes a VM's control groups when its device process, which may not do so itself (`--only-files`), has ended:
`python -m qemu_user.cgroup_keeper FD FOLDER...`.

Started by cgroup.py before the rights are given up, outside the groups. FD is a pipe whose other end the device process
alone has: the end of that process, by kill -9 too, is the pipe's. It does nothing else, and takes no orders.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

_PATIENCE, _PAUSE = 10.0, 0.02
"""Seconds that the VM's processes may take to end, and between two looks."""


def main(words: list[str]) -> int:
    """0: the groups are gone. 1: somebody is still in one; the next VM with limits removes it (cgroup._sweep)."""
    fd, folders = int(words[0]), [Path(word) for word in words[1:]]
    while os.read(fd, 1):
        pass
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        for folder in folders:
            with suppress(OSError):  # busy, or gone already
                folder.rmdir()
        if not any(folder.exists() for folder in folders):
            return 0
        time.sleep(_PAUSE)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
