"""`softkvm resume NAME...`: let paused VMs go on."""

from __future__ import annotations

from qemu_user.cli.pause import each


def main(arguments: list[str]) -> int:
    """0; 1 when a VM could not go on."""
    return each("resume", "Let paused VMs go on.", "cont", arguments)
