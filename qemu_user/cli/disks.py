"""`softkvm disks`: the VMs whose disks are kept, the disks that clones have, and how to delete them."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done."""
    from qemu_user.cli.vm import fail
    from qemu_user.images import vm_disk
    from qemu_user.images.errors import ImageError
    from qemu_user.migration import left_disks

    parser = argparse.ArgumentParser(prog="softkvm disks", description="VMs whose disk is kept, and disks of clones.")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("--delete", nargs="+", metavar="NAME", help="delete these VMs and what is on their disks")
    options = parser.parse_args(arguments)
    try:
        for name in options.delete or ():
            if not left_disks.remove(name) or vm_disk.find_kept(name) is not None:
                vm_disk.remove(name)
    except (ImageError, left_disks.DiskError, OSError) as error:
        return fail("disks", error)
    if options.delete:
        return 0
    rows = [
        {"name": vm.name, "image": vm.meta.name, "bytes": vm.own.stat().st_blocks * 512, "disk": str(vm.own)}
        for vm in vm_disk.kept()
    ]
    rows += [
        {"name": folder.name, "image": "", "bytes": left_disks.stored(folder), "disk": str(folder)}
        for folder in left_disks.listed()
    ]
    if options.format == "json":
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    for row in rows:
        sys.stdout.write(f"{row['name']:20}  {row['image']:10}  {row['bytes'] / 1e6:8.0f} MB  {row['disk']}\n")  # type: ignore[operator]
    return 0
