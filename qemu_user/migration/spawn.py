"""Starting a VM in the background, as a process of its own (arrival.py), and hearing how that went."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from qemu_user.management.registry import runtime_directory


class SpawnError(Exception):
    """The VM did not start; the text says why."""


def start(order: bytes, name: str, fds: list[int] | None = None) -> tuple[subprocess.Popen[bytes], IO[bytes], Path]:
    """Give `order` (JSON) and descriptors to a new process: it, the pipe on which it will say how it went, its log."""
    readable, writable = os.pipe()
    directory = runtime_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = directory / f"{name}.log"
    pipe = os.fdopen(readable, "rb")
    with open(log, "wb") as output:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "qemu_user.migration.arrival", "--tell", str(writable)],
                stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
                pass_fds=[writable, *(fds or [])], cwd="/",
            )  # fmt: skip
        finally:
            os.close(writable)
    assert process.stdin is not None
    try:
        process.stdin.write(order)
        process.stdin.close()
    except BrokenPipeError:
        pass
    return process, pipe, log


def spawn(order: bytes, name: str, count: int = 1) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """The process, and what the last of its `count` VMs says first: the VM's name and pid, or where it listens. SpawnError."""
    process, pipe, log = start(order, name)
    with pipe:
        lines = [pipe.readline() for _ in range(count)]
    failed = [word["error"] for word in map(json.loads, filter(None, lines)) if "error" in word]
    if failed:
        raise SpawnError("; ".join(sorted(set(failed))))
    if not all(lines):
        process.wait()
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise SpawnError(f"VM {name}: its process ended at once: {last} (all of it: {log})")
    return process, dict(json.loads(lines[-1]))
