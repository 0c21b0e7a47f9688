"""What the verbs that speak to a running VM share: finding it, waiting for its job with a bar, telling what failed."""

from __future__ import annotations

import sys
import time
from typing import Any

from qemu_user.management.qmp_client import QmpClient, QmpError
from qemu_user.management.registry import find

_POLL_SECONDS = 0.05


class VerbError(Exception):
    """The verb cannot be done; the text is for the user."""


class Ended(VerbError):
    """The VM's process here has ended meanwhile."""


def connect(name: str) -> QmpClient:
    """A QMP connection to a running VM. VerbError."""
    entry = find(name)
    if entry is None:
        raise VerbError(f"no VM {name!r} is running; softkvm ps lists them")
    try:
        return QmpClient(str(entry.control), timeout=60)
    except OSError as error:
        raise VerbError(f"VM {name}: does not answer: {error}") from error


def execute(name: str, command: str, **arguments: Any) -> Any:
    """One QMP command. VerbError."""
    with connect(name) as client:
        return on(client, name, command, **arguments)


def on(client: QmpClient, name: str, command: str, **arguments: Any) -> Any:
    """One QMP command on an open connection. VerbError."""
    try:
        return client.execute(command, **arguments)
    except QmpError as error:
        raise VerbError(f"VM {name}: {error}") from error
    except (OSError, EOFError) as error:
        raise Ended(f"VM {name}: ended meanwhile") from error


def wait_for_job(client: QmpClient, name: str, what: str) -> dict[str, Any]:
    """Show a job's progress until it has ended; its numbers. Ctrl-C calls it off. VerbError when it failed."""
    bar = JobBar(what)
    numbers: dict[str, Any] = {}
    cancelling = False
    while True:
        try:
            numbers = on(client, name, "query-migrate")
            if numbers["status"] in ("completed", "failed", "cancelled"):
                break
            bar.show(numbers)
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            if cancelling:
                raise
            cancelling = True
            on(client, name, "migrate_cancel")
    bar.end()
    if numbers["status"] == "failed":
        raise VerbError(f"VM {name}: {what} failed, the VM goes on here: {numbers['error-desc']}")
    if numbers["status"] == "cancelled":
        raise VerbError(f"VM {name}: {what} was called off, the VM goes on here")
    return numbers


class JobBar:
    """A line on stderr: rounds, dirty rate, throughput, expected downtime. Nothing where that is no terminal."""

    def __init__(self, what: str) -> None:
        self._what, self._tty = what, sys.stderr.isatty()

    def show(self, numbers: dict[str, Any]) -> None:
        if not self._tty:
            return
        ram = numbers["ram"]
        part = 1 - ram["remaining"] / ram["total"] if ram["total"] and ram["dirty-sync-count"] > 1 else 0.0
        filled = round(20 * part)
        text = (
            f"[{'#' * filled}{'.' * (20 - filled)}] {self._what}: round {ram['dirty-sync-count']}, "
            f"{ram['transferred'] / 1e6:.0f} MB sent, {ram['mbps'] / 8:.0f} MB/s, "
            f"guest writes {ram['dirty-bytes-rate'] / 1e6:.0f} MB/s, "
            f"downtime {numbers['expected-downtime']:.0f} ms"
        )
        if numbers["cpu-throttle-percentage"]:
            text += f", CPU slowed {numbers['cpu-throttle-percentage']} %"
        sys.stderr.write(f"\r\x1b[K{text[:150]}")
        sys.stderr.flush()

    def end(self) -> None:
        if self._tty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def fail(verb: str, error: Exception) -> int:
    """Tell the user; the exit status."""
    sys.stderr.write(f"softkvm {verb}: {error}\n")
    return 1
