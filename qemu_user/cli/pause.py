"""`softkvm pause NAME...`: stop VMs where they are. resume.py is the way back."""

from __future__ import annotations

import argparse


def main(arguments: list[str]) -> int:
    """0; 1 when a VM could not be paused."""
    return each("pause", "Stop VMs where they are.", "stop", arguments)


def each(verb: str, what: str, command: str, arguments: list[str]) -> int:
    """One QMP command on every VM that is named; the exit status."""
    from qemu_user.cli.vm import VerbError, execute, fail

    parser = argparse.ArgumentParser(prog=f"softkvm {verb}", description=what)
    parser.add_argument("name", nargs="+")
    status = 0
    for name in parser.parse_args(arguments).name:
        try:
            execute(name, command)
        except VerbError as error:
            status = fail(verb, error)
    return status
