"""Debian's archive: a signed index leads by checksums to every file (Debian wiki, DebianRepository/Format).

InRelease (its signature verified) -> Packages.xz (sha256) -> .deb (size and sha256). Called by busybox.py.
Downloads go to a temporary file in the folder of their destination and are renamed when they are whole and right.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from qemu_user.images.errors import ImageError

SUITE = "trixie"
ARCHITECTURE = "riscv64"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
#: Where Debian's packages put the keys that its archive is signed with.
_KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/etc/apt/trusted.gpg.d/debian-archive-trixie-stable.asc",
)
#: Long ids of the keys that sign trixie's index: the automatic archive keys and the stable release key.
_KEY_IDS = ("6ED0E7B82643E131", "78DBA3BC47EF2265", "762F67A0B2C39DE4", "BDE6D2B9216EC7A8", "F8D2585B8783D481")

Progress = Callable[[str, int, int], None]
"""(what, bytes so far, bytes in all or 0)."""


def mirror() -> str:
    """The archive's address: SOFTKVM_MIRROR, or Debian's."""
    return os.environ.get("SOFTKVM_MIRROR", DEFAULT_MIRROR).rstrip("/")


def download(url: str, target: Path, size: int, sha256: str, progress: Progress) -> None:
    """Fetch a file of known size and checksum. ImageError says what happened; nothing partial stays."""
    label = url.rpartition("/")[2]
    digest, received = hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    try:
        with os.fdopen(handle, "wb") as file, _open(url) as response:
            while chunk := response.read(1 << 18):
                received += len(chunk)
                if size and received > size:
                    raise ImageError(f"{url}: longer than the {size} bytes that the signed index says")
                digest.update(chunk)
                file.write(chunk)
                progress(label, received, size)
        if size and received != size:
            raise ImageError(f"{url}: the connection ended after {received} of {size} bytes; try again")
        if sha256 and digest.hexdigest() != sha256:
            raise ImageError(f"{url}: its sha256 is not the one of the signed index; not used")
        os.replace(name, target)
    except (OSError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise ImageError(f"cannot fetch {url}: {reason} (SOFTKVM_MIRROR chooses another mirror)") from error
    finally:
        if os.path.exists(name):
            os.unlink(name)


def _open(url: str):  # type: ignore[no-untyped-def]
    if not url.startswith(("http://", "https://", "file://")):
        raise ImageError(f"{url}: a mirror's address begins with http://, https:// or file://")
    return urllib.request.urlopen(url, timeout=30)


def signed_index(folder: Path, progress: Progress) -> tuple[dict[str, tuple[int, str]], str]:
    """Files of the suite's index as {path: (size, sha256)}, and a sentence on how it was verified."""
    path = folder / "InRelease"
    download(f"{mirror()}/dists/{SUITE}/InRelease", path, 0, "", progress)
    how = _verify(path)
    text = path.read_text(errors="replace")
    section = text.partition("\nSHA256:\n")[2]
    entries = re.findall(r"^ ([0-9a-f]{64})\s+(\d+)\s+(\S+)$", section, re.M)
    return {name: (int(size), sha256) for sha256, size, name in entries}, how


def _verify(path: Path) -> str:
    """Check the signature with gpgv and Debian's keyring; without them only transport and checksums protect."""
    keyring = next((name for name in _KEYRINGS if os.path.exists(name) and not name.endswith(".asc")), None)
    gpgv = shutil.which("gpgv")
    if gpgv is None or keyring is None:
        missing = "gpgv" if gpgv is None else "debian-archive-keyring"
        text = path.read_text(errors="replace")
        if "BEGIN PGP SIGNATURE" not in text:
            raise ImageError(f"{mirror()}: the index carries no signature")
        return f"signature not checked ({missing} is not installed); checksums were"
    result = subprocess.run(
        [gpgv, "--status-fd", "1", "--keyring", keyring, str(path)], capture_output=True, text=True, check=False
    )
    good = [line for line in result.stdout.splitlines() if line.startswith("[GNUPG:] GOODSIG")]
    if result.returncode != 0 and not good:
        raise ImageError(f"{mirror()}: the index is not signed by Debian ({result.stderr.strip()[-200:]})")
    return "signature by Debian's archive key, checksums"


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
