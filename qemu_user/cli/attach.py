"""`softkvm attach NAME`: a new device process for a VM whose own was killed, if it was started with --keep. The guest goes on
where it was; requests in flight are completed once. Of a VM that runs at another host already, but needs memory that is here
(migrate --postcopy), what is left is sent on.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """0 when the VM goes on, here or at the host that it was moving to; 1 when it cannot."""
    import json

    from qemu_user.cli.vm import VerbError, fail
    from qemu_user.machine.machine import POSTMIGRATE
    from qemu_user.management.registry import find
    from qemu_user.migration.spawn import SpawnError, spawn

    parser = argparse.ArgumentParser(prog="softkvm attach", description="Give a VM a new device process.")
    parser.add_argument("name")
    options = parser.parse_args(arguments)
    try:
        entry = find(options.name)
        if entry is None:
            raise VerbError(f"no VM {options.name!r} is there; softkvm ps lists them")
        if not entry.waits:
            raise VerbError(f"VM {options.name} has its device process ({entry.pid})")
        made = spawn(json.dumps({"type": "Attach", "directory": str(entry.directory)}).encode(), options.name)
    except (SpawnError, VerbError) as error:
        return fail("attach", error)
    if made["status"] == POSTMIGRATE:
        sys.stderr.write(f"softkvm: VM {options.name} runs at another host; the rest of its memory is sent there again\n")
    else:
        sys.stderr.write(f"softkvm: VM {options.name} goes on; softkvm console {options.name} attaches to it\n")
    return 0
