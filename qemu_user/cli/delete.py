"""`softkvm delete NAME TAG...`: remove snapshots of a VM."""

from __future__ import annotations

import argparse


def main(arguments: list[str]) -> int:
    """0; 1 when one of them is not there."""
    from qemu_user.cli.vm import fail
    from qemu_user.migration import places
    from qemu_user.migration.snapshot import SnapshotError, delete

    parser = argparse.ArgumentParser(prog="softkvm delete", description="Remove snapshots.")
    parser.add_argument("name")
    parser.add_argument("tag", nargs="+")
    options = parser.parse_args(arguments)
    status = 0
    for tag in options.tag:
        try:
            if not (places.is_name(options.name) and places.is_name(tag)):
                raise SnapshotError(f"{options.name} {tag}: no name of a snapshot")
            delete(places.snapshots(options.name) / tag)
        except (SnapshotError, OSError) as error:
            status = fail("delete", error)
    return status
