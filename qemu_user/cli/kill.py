"""`softkvm kill NAME`: end a VM at once, as pulling its plug would."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time

#: Seconds that the VM's device process gets to notice that the VM is gone, and to clean up.
_PATIENCE = 5.0


def main(arguments: list[str]) -> int:
    """0; 1 when there is no such VM, or it cannot be ended."""
    from qemu_user.management.registry import find

    parser = argparse.ArgumentParser(prog="softkvm kill", description="End VMs at once.")
    parser.add_argument("name", nargs="+")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.name:
        entry = find(name)
        if entry is None:
            sys.stderr.write(f"softkvm kill: no VM {name!r} is running; softkvm ps lists them\n")
            status = 1
        elif not (_end(name, entry.vm_pid) or _end(name, entry.pid)):
            sys.stderr.write(f"softkvm kill: VM {name}: its process {entry.pid} does not end\n")
            status = 1
    return status


def _end(name: str, pid: int) -> bool:
    """Kill the process; whether the VM is gone. The vCPUs' process first: the other one then ends in order."""
    from qemu_user.management.registry import find

    if not pid:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _PATIENCE
    while find(name) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
