"""`softkvm bench migration [--json FILE]`: measure migrations, snapshots and clones here, beside QEMU's."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """0; 1 when something could not be measured."""
    from qemu_user.bench import migration
    from qemu_user.images.errors import ImageError

    parser = argparse.ArgumentParser(prog="softkvm bench", description="Measure what softkvm promises.")
    parser.add_argument("what", choices=("migration",))
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-m", "--memory", type=int, default=512, metavar="MIB", help="of the guest (default: 512)")
    options = parser.parse_args(arguments)
    try:
        figures = migration.run(options.rounds, options.memory << 20, lambda line: print(line, flush=True))
    except (RuntimeError, ImageError, OSError) as error:
        sys.stderr.write(f"softkvm bench: {error}\n")
        return 1
    if options.json:
        about = {"machine": platform.machine(), "kernel": platform.release(), "memory_mib": options.memory}
        Path(options.json).write_text(json.dumps({"about": about, "milliseconds": figures}, indent=2) + "\n")
    return 0
