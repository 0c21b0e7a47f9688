"""`softkvm ps`: the running VMs of this user."""

from __future__ import annotations

import argparse
import json
import sys
import time


def main(arguments: list[str]) -> int:
    from qemu_user.management.registry import list_vms

    parser = argparse.ArgumentParser(prog="softkvm ps", description="List running VMs.")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(arguments)
    entries = list_vms()
    if options.format == "json":
        rows = [
            {
                "name": entry.name, "pid": entry.pid, "vm_pid": entry.vm_pid, "created": entry.created,
                "memory": entry.memory, "cpus": entry.cpus, "directory": str(entry.directory),
                "waits": entry.waits,
            }
            for entry in entries
        ]  # fmt: skip
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    sys.stdout.write(f"{'NAME':20} {'PID':>8} {'VM PID':>8} {'CPUS':>4} {'MEMORY':>9} {'UP':>10}\n")
    for entry in entries:
        seconds = max(0, int(time.time() - entry.created))
        up = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        memory = f"{entry.memory >> 20} MiB"
        pid = "waits" if entry.waits else str(entry.pid)
        sys.stdout.write(f"{entry.name:20} {pid:>8} {entry.vm_pid:>8} {entry.cpus:>4} {memory:>9} {up:>10}\n")
    return 0
