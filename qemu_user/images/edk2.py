"""The image `edk2`: UEFI firmware from Debian's qemu-efi-riscv64, which boots what is on a VM's disks (or an installer's).

Two files of a flash bank each: code.fd, and vars.fd, of which every VM has its own. Called by store.py into an empty folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_user.images import busybox, deb
from qemu_user.images.errors import ImageError
from qemu_user.images.store import CODE, VARIABLES

if TYPE_CHECKING:
    from qemu_user.images.download import Progress

_FILES = {"RISCV_VIRT_CODE.fd": CODE, "RISCV_VIRT_VARS.fd": VARIABLES}


def build(target: Path, progress: Progress) -> str:
    """Make both files in `target`; returns how the package was verified. ImageError."""
    from qemu_user.images import archive

    with tempfile.TemporaryDirectory(dir=target, prefix=".packages-") as name:
        listed, how = archive.packages(Path(name), progress)
        package = archive.fetch(busybox.package(listed, "qemu-efi-riscv64"), Path(name), progress)
        for path, content in deb.members(package):
            if own := _FILES.get(path.rpartition("/")[2]):
                (target / own).write_bytes(content)
    for own in _FILES.values():
        if not (target / own).exists():
            raise ImageError(f"qemu-efi-riscv64 has no file for {own}")
    return how
