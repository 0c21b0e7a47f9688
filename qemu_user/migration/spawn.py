"""Starting a VM in the background, as a process of its own (arrival.py), and hearing how that went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from qemu_user.management.registry import runtime_directory


class SpawnError(Exception):
    """The VM did not start; the text says why."""


def spawn(order: bytes, name: str) -> dict[str, Any]:
    """Give `order` (JSON) to a new process; what it says when the VM is there: name and pid. SpawnError."""
    readable, writable = os.pipe()
    log = runtime_directory() / f"{name}.log"
    with open(log, "wb") as output, os.fdopen(readable, "rb") as pipe:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qemu_user.migration.arrival", "--tell", str(writable)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, pass_fds=[writable], cwd="/",
            )  # fmt: skip
        finally:
            os.close(writable)
        assert process.stdin is not None
        try:
            process.stdin.write(order)
            process.stdin.close()
        except BrokenPipeError:
            pass
        line = pipe.readline()
    if not line:
        process.wait()
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise SpawnError(f"VM {name}: its process ended at once: {last} (all of it: {log})")
    word = json.loads(line)
    if "error" in word:
        process.wait()
        raise SpawnError(word["error"])
    return dict(word)
