"""`softkvm clone VM NAME [--count N]`: more VMs like a running one, which runs on. Memory is shared with the copy that is
taken, until it is touched; disks are reflinked where the file system can.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time


def main(arguments: list[str]) -> int:
    """0; 1 when it cannot be done."""
    from qemu_user.cli.template import keep, make
    from qemu_user.cli.vm import VerbError, fail
    from qemu_user.management.registry import find, made_runtime_directory

    parser = argparse.ArgumentParser(prog="softkvm clone", description="Make VMs like a running one.")
    parser.add_argument("vm")
    parser.add_argument("name", help="of the clone; with --count NAME-1, NAME-2, ...")
    parser.add_argument("--count", type=int, default=1, metavar="N")
    parser.add_argument("--paused", action="store_true", help="do not let them run yet (softkvm resume does)")
    options = parser.parse_args(arguments)
    if not 1 <= options.count <= 1000:
        parser.error("--count: 1 to 1000")
    several = options.count > 1
    names = [f"{options.name}-{number}" for number in range(1, options.count + 1)] if several else [options.name]
    folder = None
    try:
        taken = [name for name in names if find(name) is not None]
        if taken:
            raise VerbError(f"a VM named {taken[0]} is running")
        started = time.monotonic()
        folder = tempfile.mkdtemp(prefix="clone-", dir=made_runtime_directory())
        numbers = keep(options.vm, "of", folder)
        make(f"{folder}/of", names, options.paused)
    except VerbError as error:
        return fail("clone", error)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # who needs the memory has it open
    sys.stderr.write(
        f"softkvm: {', '.join(names[:3])}{', ...' if several and options.count > 3 else ''}: VM {options.vm} stood "
        f"{numbers['downtime']} ms; {time.monotonic() - started:.2f} s for all\n"
    )
    return 0
