"""`softkvm doctor`: what this host offers, what is missing, and what follows from that. Exit status 1: softkvm cannot run."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str]) -> int:
    from qemu_user.host_checks import BROKEN, GOOD, examine

    parser = argparse.ArgumentParser(
        prog="softkvm doctor",
        description="Look at this host: what softkvm needs, what it can do without, what to do about it. Changes nothing.",
    )
    parser.add_argument("--json", action="store_true", help="for programs: a list of {name, status, text}")
    parser.add_argument("--online", action="store_true", help="also look whether Debian's archive can be reached")
    options = parser.parse_args(arguments)
    results = examine(options.online)
    broken = [result for result in results if result.status == BROKEN]
    if options.json:
        sys.stdout.write(json.dumps([result._asdict() for result in results], indent=2) + "\n")
        return 1 if broken else 0
    width = max(len(result.name) for result in results)
    for name, status, text in results:
        sys.stdout.write(f"{status:7}  {name:{width}}  {text}\n")
    missing = sum(result.status not in (GOOD, BROKEN) for result in results)
    if broken:
        sys.stdout.write(f"\nsoftkvm cannot run here: {', '.join(result.name for result in broken)}\n")
    else:
        rest = f"; {missing} things are missing that it can do without" if missing else ""
        sys.stdout.write(f"\nsoftkvm can run here{rest}\n")
    return 1 if broken else 0
