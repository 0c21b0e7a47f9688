"""Debian's packages as a folder of an initramfs, for guests that measure or soak: /debian, to be entered by chroot.

No root, no mounts, no disk: the packages and what they need are fetched, checked and put into one cpio archive that
stands behind the image `busybox`. Nothing is configured (no maintainer script runs). Made once, kept beside the images.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qemu_user.images import archive, cpio, deb
from qemu_user.images.archive import mirror
from qemu_user.images.dependencies import closure
from qemu_user.images.download import Progress
from qemu_user.images.store import Store

ROOT = "debian"
#: What nobody needs in there.
_LEFT_OUT = re.compile(
    r"usr/share/(doc|man|locale|info|lintian|bash-completion|zoneinfo|i18n|perl|gcc)/|usr/lib/python3[^/]*/(test|idlelib|ensurepip)/"
    r"|usr/libexec/gcc/.*/(lto1|lto-wrapper|g\\+\\+-mapper-server)$|usr/lib/.*\\.a$|usr/(lib|share)/perl|usr/bin/.*-(dwp|gp-.*|gprofng)$"
)
_FORMAT = 1


def ensure(packages: Sequence[str], progress: Progress) -> Path:
    """The archive with these packages, made when it is not there. ImageError."""
    digest = hashlib.sha256(repr((_FORMAT, mirror(), sorted(packages))).encode()).hexdigest()[:16]
    target = Store().folder / f"bench-debian-{digest}.cpio"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as name:
        folder = Path(name)
        listed, _ = archive.packages(folder, progress)
        made = cpio.Archive()
        for package in closure(listed, packages, ()):
            path = archive.fetch(package, folder, progress)
            _add(made, path)
            path.unlink()
        new = folder / "archive"
        new.write_bytes(made.finish())
        new.rename(target)
    return target


def _add(made: cpio.Archive, path: Path) -> None:
    for entry, content in deb.entries(path):
        name = f"{ROOT}/{entry.name}".rstrip("/.")
        if not entry.name.strip("/.") or _LEFT_OUT.search(entry.name) or ".." in entry.name.split("/"):
            continue
        if entry.isdir():
            made.folder(name, entry.mode)
        elif entry.issym():
            made.symlink(name, entry.linkname)
        elif entry.islnk():
            made.symlink(name, "/" + entry.linkname.removeprefix("./").lstrip("/"))
        elif entry.isfile():
            made.file(name, content, entry.mode)
