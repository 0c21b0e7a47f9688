"""`softkvm kill NAME`: end a VM at once, as pulling its plug would."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time


def main(arguments: list[str]) -> int:
    """0; 1 when there is no such VM."""
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
            continue
        try:
            os.kill(entry.vm_pid or entry.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        deadline = time.monotonic() + 5
        while find(name) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
    return status
