"""The last resort against orphans: a VM process whose I/O thread does not get round to noticing that its owner has died.

Whatever keeps it (a fault of ours: nothing should), guest code must not go on burning a core for nobody. A thread of its own
waits for the owner's pidfd and ends the process if it is still there a while later. Started by vm_process.py.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvmcore.vm")

PATIENCE = 20.0
"""Seconds that an orderly end may take on a busy host."""


def watch(owner_pidfd: int, may_live: Callable[[], bool], end: Callable[[], None], patience: float = PATIENCE) -> None:
    """`end` is called `patience` seconds after the owner's death, unless `may_live` says that the VM outlives it."""
    fd = os.dup(owner_pidfd)  # the loop closes its own

    def wait() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not poll.poll():
            pass
        os.close(fd)
        time.sleep(patience)
        if not may_live():
            log.error("the I/O thread has not noticed for %g s that its owner is dead: the process ends", patience)
            end()

    threading.Thread(target=wait, name="watchdog", daemon=True).start()
