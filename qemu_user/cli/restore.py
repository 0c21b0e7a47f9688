"""`softkvm restore NAME TAG`: a VM as it was when the snapshot was made, in the background. A running VM of that name
is ended first; its disks go back too.
"""

from __future__ import annotations

import argparse
import sys
import time

_GONE_SECONDS = 30.0


def main(arguments: list[str]) -> int:
    """0 when the VM runs; 1 when it cannot."""
    import json

    from qemu_user.cli.daemon import DaemonError, ensure
    from qemu_user.cli.vm import VerbError, fail
    from qemu_user.migration import places
    from qemu_user.migration.snapshot import Snapshot, SnapshotError
    from qemu_user.migration.spawn import SpawnError, spawn

    parser = argparse.ArgumentParser(prog="softkvm restore", description="Bring a VM back to a snapshot.")
    parser.add_argument("name")
    parser.add_argument("tag")
    parser.add_argument("--paused", action="store_true", help="do not let it run yet (softkvm resume does)")
    options = parser.parse_args(arguments)
    try:
        folder = places.snapshots(options.name) / options.tag
        Snapshot(folder)  # before the VM that runs is ended
        endpoint = ensure()
        end_running(options.name)
        order: dict[str, object] = {"type": "Restore", "endpoint": endpoint, "snapshot": str(folder), "names": [options.name]}
        order["paused"] = options.paused
        spawn(json.dumps(order).encode(), options.name)
    except (DaemonError, SnapshotError, SpawnError, VerbError) as error:
        return fail("restore", error)
    how = "stands" if options.paused else "runs"
    sys.stderr.write(f"softkvm: VM {options.name} {how} as of {options.tag}; softkvm console {options.name} attaches to it\n")
    return 0


def end_running(name: str) -> None:
    """End the VM of that name, if there is one. VerbError if it does not go."""
    from qemu_user.cli.vm import VerbError, execute
    from qemu_user.management.registry import find

    if find(name) is None:
        return
    execute(name, "quit")
    end = time.monotonic() + _GONE_SECONDS
    while find(name) is not None:
        if time.monotonic() > end:
            raise VerbError(f"VM {name}: does not end; softkvm kill {name} forces it")
        time.sleep(0.01)
