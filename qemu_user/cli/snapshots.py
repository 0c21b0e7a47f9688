"""`softkvm snapshots [NAME]`: list the snapshots of a VM, or of all."""

from __future__ import annotations

import argparse
import json
import sys
import time


def main(arguments: list[str]) -> int:
    """0."""
    from qemu_user.migration import places
    from qemu_user.migration.snapshot import listed

    parser = argparse.ArgumentParser(prog="softkvm snapshots", description="List snapshots.")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    options = parser.parse_args(arguments)
    root = places.snapshots("")
    names = [options.name] if options.name else sorted(folder.name for folder in root.iterdir()) if root.is_dir() else []
    rows = [meta for name in names for meta in listed(places.snapshots(name))]
    if options.format == "json":
        from msgspec import to_builtins

        sys.stdout.write(json.dumps(to_builtins(rows)) + "\n")
        return 0
    lines = [("NAME", "TAG", "CREATED", "MEMORY", "CPUS", "STORED", "PAUSE", "PARENT")]
    for meta in rows:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(meta.created))
        memory, stored = f"{meta.memory >> 20} MiB", f"{meta.stored / 1e6:.0f} MB"
        lines.append((meta.name, meta.tag, made, memory, str(meta.cpus), stored, f"{meta.downtime * 1000:.1f} ms", meta.parent))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        sys.stdout.write("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n")
    return 0
