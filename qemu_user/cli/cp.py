"""`softkvm cp SOURCE ... TARGET`: copy between host and VM; NAME:PATH is in the VM. scp over vsock, as `softkvm ssh`."""

from __future__ import annotations

import argparse
import os
import re

_REMOTE = re.compile(r"(?:([^@:/]+)@)?([A-Za-z0-9][A-Za-z0-9_.-]*):")


def main(arguments: list[str]) -> int:
    """scp's exit status; 1 when there is no such VM; 2 when no argument is in a VM."""
    from qemu_user.cli.ssh import options as ssh_options
    from qemu_user.cli.ssh import program
    from qemu_user.cli.vm import VerbError, fail

    parser = argparse.ArgumentParser(prog="softkvm cp", description="Copy files between host and VM; NAME:PATH is in the VM.")
    parser.add_argument("-r", action="store_true", help="folders too")
    parser.add_argument("-p", action="store_true", help="keep times and modes")
    parser.add_argument("paths", nargs="+", metavar="[[USER@]NAME:]PATH", help="what to copy, and where to")
    options = parser.parse_args(arguments)
    if len(options.paths) < 2:
        parser.error("a source and a target are needed")
    remotes = {match[2]: match[1] or "" for path in options.paths if (match := _REMOTE.match(path))}
    if len(remotes) != 1:
        parser.error("one of the paths is in a VM: NAME:PATH" if not remotes else "all paths in VMs are to be in the same one")
    name, user = remotes.popitem()
    try:
        words = [program("scp"), *ssh_options(name, user), "-q"]
    except VerbError as error:
        return fail("cp", error)
    words += [flag for flag, given in (("-r", options.r), ("-p", options.p)) if given]
    # scp would take a local path with a colon for a host.
    paths = [path if _REMOTE.match(path) or path.startswith("/") else f"./{path}" for path in options.paths]
    os.execv(words[0], [*words, "--", *paths])
