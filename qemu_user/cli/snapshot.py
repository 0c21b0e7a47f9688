"""`softkvm snapshot NAME TAG`: keep a VM's memory, state and disks as they are now, while it runs on."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """0; 1 when it could not be kept."""
    from qemu_user.cli.vm import VerbError, connect, fail, on, wait_for_job

    parser = argparse.ArgumentParser(prog="softkvm snapshot", description="Keep a VM as it is now.")
    parser.add_argument("name")
    parser.add_argument("tag", help="what the snapshot is called")
    parser.add_argument("--full", action="store_true", help="store all of it, also what the snapshot before has already")
    options = parser.parse_args(arguments)
    try:
        with connect(options.name) as client:
            on(client, options.name, "softkvm-snapshot-save", tag=options.tag, full=options.full)
            numbers = wait_for_job(client, options.name, "snapshot")
    except VerbError as error:
        return fail("snapshot", error)
    sys.stderr.write(f"softkvm: snapshot {options.tag} of VM {options.name}: the guest stood {numbers['downtime']} ms\n")
    return 0
