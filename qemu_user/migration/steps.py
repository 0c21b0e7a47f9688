"""Named points of a hand-over at which tests can break it: SOFTKVM_MIGRATION_FAULT="source:committed=kill" in the
environment of a process makes it kill itself there; "=killvm" kills the kvmcore process of its VM, "=killdaemon" the daemon
behind that; "=cut" makes it lose the connection; "=kill:5" when it comes there for the fifth time.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable

STEPS = (
    "source:connected", "source:offered", "source:round", "source:standing", "source:state", "source:prepared",
    "source:committed", "source:commit-sent", "source:done",
    "destination:hello", "destination:built", "destination:data", "destination:state", "destination:prepared",
    "destination:prepared-sent", "destination:commit", "destination:decided", "destination:running", "destination:done",
)  # fmt: skip
POSTCOPY_STEPS = ("source:page", "destination:page")
RESTORE_STEPS = ("restored:page", "restored:whole")
CHANNEL_STEPS = ("source:extra", "destination:extra")


_broken: set[str] = set()
_times: Counter[str] = Counter()


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    """Of a VM's process: the zygote; of that: the daemon."""
    return int(_stat(pid)[1])


def _lives(pid: int) -> bool:
    """Whether any thread of it does: a first one that is dead has closed nothing yet."""
    try:
        return _stat(pid)[0] != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def reached(step: str, cut: Callable[[], None], vm_pid: int = 0) -> None:
    """The hand-over is at `step`; `cut` ends its connection; `vm_pid` is the VM's kvmcore process."""
    name, _, action = os.environ.get("SOFTKVM_MIGRATION_FAULT", "").partition("=")
    if name != step or step in _broken:
        return
    action, _, which = action.partition(":")
    _times[step] += 1
    if _times[step] < int(which or 1):
        return
    _broken.add(step)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "cut":
        cut()
    elif action in ("killvm", "killdaemon"):
        os.kill(vm_pid if action == "killvm" else _parent(_parent(vm_pid)), signal.SIGKILL)
        while _lives(vm_pid):  # and all of it is gone
            time.sleep(0.01)
