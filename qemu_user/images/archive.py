"""Debian's archive: a signed index leads by checksums to every file (Debian wiki, DebianRepository/Format).

InRelease (its signature verified) -> Packages.xz (sha256) -> .deb (size and sha256). Called by busybox.py.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qemu_user.images import openpgp
from qemu_user.images.download import Progress, download
from qemu_user.images.errors import ImageError

SUITE = "trixie"
ARCHITECTURE = "riscv64"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
#: Where Debian's packages put the keys that its archive is signed with.
_KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)


def mirror() -> str:
    """The archive's address: SOFTKVM_MIRROR, or Debian's."""
    return os.environ.get("SOFTKVM_MIRROR", DEFAULT_MIRROR).rstrip("/")


def signed_index(folder: Path, progress: Progress) -> tuple[dict[str, tuple[int, str]], str]:
    """Files of the suite's index as {path: (size, sha256)}, and a sentence on how it was verified. ImageError."""
    path = folder / "InRelease"
    download(f"{mirror()}/dists/{SUITE}/InRelease", path, 0, "", progress)
    text, how = verified(path)
    if f"\nCodename: {SUITE}\n" not in text:
        raise ImageError(f"{mirror()}: the index is signed, but it is not that of {SUITE}")
    section = text.partition("\nSHA256:\n")[2]
    entries = re.findall(r"^ ([0-9a-f]{64})\s+(\d+)\s+(\S+)$", section, re.M)
    return {name: (int(size), sha256) for sha256, size, name in entries}, how


def verified(path: Path) -> tuple[str, str]:
    """The text that is signed in an InRelease file, and by what that was found out. ImageError when it is not signed by
    Debian: by gpgv and the installed keyring where both are there and know the key, else by the keys in openpgp.py.
    """
    document = path.read_text(encoding="utf-8", errors="surrogateescape")
    try:
        text, _ = openpgp.split(document)  # gpgv passes over unsigned text around the signed one: we refuse it
        keyring = next((name for name in _KEYRINGS if os.path.exists(name)), None)
        gpgv = shutil.which("gpgv")
        if gpgv is not None and keyring is not None and _gpgv_knows(gpgv, keyring, path):
            return text, "signature by Debian's archive key (gpgv, installed keyring), checksums"
        text, key = openpgp.verify(document)
    except ImageError as error:
        raise ImageError(f"{mirror()}: {error}; not used") from error
    return text, f"signature by {key.owner} (key built into softkvm), checksums"


def _gpgv_knows(gpgv: str, keyring: str, path: Path) -> bool:
    """Whether the keyring holds a key that has made a signature; False: none of the keys is in it. ImageError: forged."""
    command = [gpgv, "--status-fd", "1", "--keyring", keyring, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    words = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("[GNUPG:] ")]
    if "BADSIG" in words:
        raise ImageError("the index is not what Debian has signed")
    return "GOODSIG" in words and "VALIDSIG" in words


def packages(folder: Path, progress: Progress) -> tuple[list[dict[str, str]], str]:
    """All packages of the suite as dictionaries of their fields, and how the index was verified."""
    index, how = signed_index(folder, progress)
    name = f"main/binary-{ARCHITECTURE}/Packages.xz"
    if name not in index:
        raise ImageError(f"{mirror()}: the index of {SUITE} has no {name}")
    size, sha256 = index[name]
    path = folder / "Packages.xz"
    download(f"{mirror()}/dists/{SUITE}/{name}", path, size, sha256, progress)
    return list(_paragraphs(lzma.decompress(path.read_bytes()).decode())), how


def _paragraphs(text: str) -> Iterator[dict[str, str]]:
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", paragraph, re.M))
        if fields:
            yield fields


def fetch(package: dict[str, str], folder: Path, progress: Progress) -> Path:
    """The package's .deb, checked."""
    path = folder / package["Filename"].rpartition("/")[2]
    url = f"{mirror()}/{package['Filename']}"
    download(url, path, int(package["Size"]), package["SHA256"], progress)
    return path
