"""`softkvm template create VM NAME`: keep a running VM as what new VMs are made of; `softkvm run NAME` makes one."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done."""
    from qemu_user.cli.vm import VerbError, fail
    from qemu_user.migration import places
    from qemu_user.migration.snapshot import SnapshotError, delete, listed

    parser = argparse.ArgumentParser(prog="softkvm template", description="Golden VMs, of which others are made.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="make a template of a running VM, which runs on")
    create.add_argument("vm")
    create.add_argument("name", help="what the template is called")
    verbs.add_parser("list", help="what templates there are")
    remove = verbs.add_parser("delete", help="remove a template")
    remove.add_argument("name")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "create":
            numbers = keep(options.vm, options.name, str(places.templates()))
            sys.stderr.write(
                f"softkvm: template {options.name}: the guest stood {numbers['downtime']} ms; softkvm run {options.name}\n"
            )
        elif options.verb == "list":
            for meta in listed(places.templates()):
                sys.stdout.write(f"{meta.tag}  of {meta.name}, {meta.memory >> 20} MiB, {meta.stored / 1e6:.0f} MB stored\n")
        elif places.is_name(options.name):
            delete(places.templates() / options.name)
    except (VerbError, SnapshotError, OSError) as error:
        return fail("template", error)
    return 0


def keep(vm: str, tag: str, folder: str) -> dict[str, float]:
    """A snapshot of a running VM in `folder`, called `tag`; the job's numbers. VerbError."""
    from qemu_user.cli.vm import connect, on, wait_for_job

    with connect(vm) as client:
        on(client, vm, "softkvm-snapshot-save", tag=tag, folder=folder)
        return wait_for_job(client, vm, "snapshot")


def make(folder: str, names: list[str], paused: bool = False) -> None:
    """New VMs of a snapshot, in the background. VerbError."""
    import json

    from qemu_user.cli.daemon import DaemonError, ensure
    from qemu_user.cli.vm import VerbError
    from qemu_user.migration.spawn import SpawnError, spawn

    try:
        order = {
            "type": "Restore", "endpoint": ensure(), "snapshot": folder, "names": names, "paused": paused, "new": True,
            "fill": False,
        }  # fmt: skip
        spawn(json.dumps(order).encode(), names[0], len(names))
    except (DaemonError, SpawnError) as error:
        raise VerbError(str(error)) from error
