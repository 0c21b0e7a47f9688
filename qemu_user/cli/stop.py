"""`softkvm stop NAME`: ask the guest to shut down; after a while end the VM."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qemu_user.management.qmp_client import QmpClient


def main(arguments: list[str]) -> int:
    """0; 1 when there is no such VM."""
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
                _stop(client, name, options.time)
        except (OSError, EOFError):
            pass  # it went while we were speaking to it
    return status


def _stop(client: QmpClient, name: str, patience: float) -> None:
    """Ask, again while the guest is not up yet; then end the VM."""
    from qemu_user.management.qmp_client import QmpError
    from qemu_user.management.registry import find

    deadline = time.monotonic() + patience
    asked, why = False, f"it did not shut down in {patience:g} s"
    while find(name) is not None:
        if time.monotonic() > deadline:
            sys.stderr.write(f"softkvm stop: VM {name}: {why}; ending it\n")
            client.execute("quit")
            return
        if not asked:
            try:
                client.execute("system_powerdown")
                asked = True
            except QmpError as error:
                why = str(error)
        time.sleep(0.02 if asked else 0.2)
