"""Disks that clones, and VMs that have come from other hosts, were given: a folder for each VM under places.disks(), which
stays when the VM ends. Called by `softkvm disks`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qemu_user.management.registry import find
from qemu_user.migration import places


class DiskError(Exception):
    """They cannot be deleted; the text is for the user."""


def listed() -> list[Path]:
    """The folders, by the VM's name."""
    root = places.disks()
    return sorted(path for path in root.iterdir() if path.is_dir() and places.is_name(path.name)) if root.is_dir() else []


def stored(folder: Path) -> int:
    """Bytes that its files take."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir() if path.is_file())


def remove(name: str) -> bool:
    """Delete those of a VM; False if it has none. DiskError: it runs; OSError."""
    folder = places.disks() / name
    if folder not in listed():
        return False
    if find(name) is not None:
        raise DiskError(f"VM {name}: is running; softkvm stop {name} ends it")
    shutil.rmtree(folder)
    return True
