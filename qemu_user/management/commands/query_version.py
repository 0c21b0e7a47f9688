"""query-version: whom one is talking to."""

from __future__ import annotations

from typing import Any

from qemu_user.machine.machine import Machine
from qemu_user.management.commands.command import Arguments, Command, Result

VERSION: dict[str, Any] = {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "softkvm"}


class VersionInfo(Result, frozen=True, kw_only=True):
    """QMP's VersionInfo; `qemu` is softkvm's own version."""

    qemu: dict[str, int]
    package: str


def run(machine: Machine, arguments: Arguments) -> VersionInfo:
    """The version."""
    return VersionInfo(**VERSION)


COMMAND = Command("query-version", run, "softkvm's version")
