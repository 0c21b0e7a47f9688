"""Where migration keeps things: snapshots and templates under the user's data directory, journals in the runtime
directory (XDG base directories). Names become folders here, and nowhere else.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from qemu_user.management.registry import runtime_directory

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")


def _base(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return (Path(value) if os.path.isabs(value) else Path.home() / fallback) / "softkvm"


def snapshots(vm: str) -> Path:
    """The folder of a VM's snapshots."""
    return _base("XDG_DATA_HOME", ".local/share") / "snapshots" / vm


def templates() -> Path:
    """The folder of all templates."""
    return _base("XDG_DATA_HOME", ".local/share") / "templates"


def disks() -> Path:
    """Where disks that arrive with a VM are put."""
    return _base("XDG_DATA_HOME", ".local/share") / "disks"


def own_folders() -> list[Path]:
    """All that is softkvm's in the user's home, made if need be."""
    found = [_base("XDG_DATA_HOME", ".local/share"), _base("XDG_CACHE_HOME", ".cache"), _base("XDG_CONFIG_HOME", ".config")]
    for folder in found:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return found


def journals() -> Path:
    """The folder of hand-over journals: they need to live as long as the machine is up."""
    return runtime_directory() / "handover"


def is_name(text: str) -> bool:
    """Whether a tag or template may be called so: a name like a VM's."""
    return _NAME.match(text) is not None
