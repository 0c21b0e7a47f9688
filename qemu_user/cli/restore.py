"""`softkvm restore NAME TAG`: a VM as it was when the snapshot was made, in the background. A running VM of that name
is ended first; its disks go back too.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """0 when the VM runs; 1 when it cannot."""
    import json

    from qemu_user.cli.daemon import DaemonError, ensure
    from qemu_user.cli.vm import fail
    from qemu_user.migration import places
    from qemu_user.migration.spawn import SpawnError, spawn

    parser = argparse.ArgumentParser(prog="softkvm restore", description="Bring a VM back to a snapshot.")
    parser.add_argument("name")
    parser.add_argument("tag")
    parser.add_argument("--paused", action="store_true", help="do not let it run yet (softkvm resume does)")
    options = parser.parse_args(arguments)
    folder = places.snapshots(options.name) / options.tag
    try:
        if not (places.is_name(options.name) and places.is_name(options.tag) and folder.is_dir()):
            raise SpawnError(f"there is no snapshot {options.tag} of VM {options.name}; softkvm snapshots lists what there is")
        order = {
            "type": "Restore", "endpoint": ensure(), "snapshot": str(folder),
            "names": [options.name], "replace": True, "paused": options.paused,
        }  # fmt: skip
        spawn(json.dumps(order).encode(), options.name, replaces=True)
    except (DaemonError, SpawnError) as error:
        return fail("restore", error)
    how = "stands" if options.paused else "runs"
    sys.stderr.write(f"softkvm: VM {options.name} {how} as of {options.tag}; softkvm console {options.name} attaches to it\n")
    return 0
