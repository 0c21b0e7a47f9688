"""`softkvm upgrade NAME`: hand a running VM over to new processes of this host, of the program as it is installed now. Its
memory is not copied; the guest stands for milliseconds, whatever its size.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading


def main(arguments: list[str]) -> int:
    """0 when it runs in its new processes; 1 when it goes on in the old ones."""
    from qemu_user.cli.vm import VerbError, connect, fail, on, wait_for_job
    from qemu_user.management.registry import made_runtime_directory
    from qemu_user.migration.host import Host, HostError

    parser = argparse.ArgumentParser(prog="softkvm upgrade", description="Hand a VM over to new processes of this host.")
    parser.add_argument("name", nargs="+")
    parser.add_argument(
        "--endpoint", default="", metavar="ipc://PATH",
        help="a kvmcore daemon to go to (default: this user's; a new one is started when that is of another version)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    uri = f"ipc://{made_runtime_directory()}/upgrade-{os.getpid()}.sock"
    status = 0
    try:
        host = Host(uri, options.endpoint)
    except HostError as error:
        return fail("upgrade", error)
    thread = threading.Thread(target=host.serve, daemon=True)
    thread.start()
    try:
        for name in options.name:
            try:
                with connect(name) as client:
                    on(client, name, "migrate", uri=uri)
                    numbers = wait_for_job(client, name, "upgrade")
                sys.stderr.write(f"softkvm: VM {name} runs in new processes: the guest stood {numbers['downtime']} ms\n")
            except VerbError as error:
                status = fail("upgrade", error)
    finally:
        host.stop()
        thread.join()
        host.close()
    return status
