"""`softkvm stop NAME`: ask the guest to shut down; after a while end the VM."""

from __future__ import annotations

import argparse
import sys
import time


def main(arguments: list[str]) -> int:
    """0; 1 when there is no such VM or it does not answer."""
    from qemu_user.management.qmp_client import QmpClient
    from qemu_user.management.registry import find

    parser = argparse.ArgumentParser(prog="softkvm stop", description="Shut VMs down.")
    parser.add_argument("name", nargs="+")
    parser.add_argument("-t", "--time", type=float, default=10, help="seconds before the VM is ended (default: 10)")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.name:
        entry = find(name)
        if entry is None:
            sys.stderr.write(f"softkvm stop: no VM {name!r} is running; softkvm ps lists them\n")
            status = 1
            continue
        try:
            with QmpClient(str(entry.control)) as client:
                client.execute("system_powerdown")
                deadline = time.monotonic() + options.time
                while find(name) is not None and time.monotonic() < deadline:
                    time.sleep(0.02)
                if find(name) is not None:
                    sys.stderr.write(f"softkvm stop: VM {name} did not shut down in {options.time:g} s; ending it\n")
                    client.execute("quit")
        except (OSError, EOFError):
            pass  # it went while we were speaking to it
        except RuntimeError as error:
            sys.stderr.write(f"softkvm stop: VM {name}: {error}\n")
            status = 1
    return status
