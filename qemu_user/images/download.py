"""Fetches one file whose size and checksum are known before: all of it and right, or nothing.

Called by archive.py. Writes beside the destination and renames at the end; a connection that breaks is taken up again
where it broke. What goes wrong on the way is an ImageError that says what to do.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from qemu_user.images.errors import ImageError

Progress = Callable[[str, int, int], None]
"""(what, bytes so far, bytes in all or 0)."""

#: A file of unknown size may be so long; Debian's index has 140 kB.
MAX_UNKNOWN = 4 << 20
ATTEMPTS = 4
TIMEOUT = 30
_PIECE = 1 << 18
_PAUSE = 0.5


class _Broken(Exception):
    """The connection ended early; trying again may help."""


def download(url: str, target: Path, size: int, sha256: str, progress: Progress) -> None:
    """Fetch `url` to `target`. size 0, sha256 "": not known (the caller checks a signature). ImageError; OSError
    when the disk, not the network, is at fault.
    """
    if not url.startswith(("http://", "https://", "file://")):
        raise ImageError(f"{url}: a mirror's address begins with http://, https:// or file://")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".fetch-")
    try:
        with os.fdopen(handle, "r+b") as file:
            _whole(url, file, size, progress)
            file.flush()
            file.seek(0)
            if sha256 and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise ImageError(f"{url}: its sha256 is not the one of the signed index; not used (a proxy or mirror "
                                 "may be out of date: try again, or set SOFTKVM_MIRROR to another one)")  # fmt: skip
        os.replace(name, target)
    finally:
        if os.path.exists(name):
            os.unlink(name)


def _whole(url: str, file: IO[bytes], size: int, progress: Progress) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _rest(url, file, size, progress)
        except _Broken as error:
            if attempt == ATTEMPTS:
                raise ImageError(f"cannot fetch {url}: {error} (is the network there? SOFTKVM_MIRROR chooses another "
                                 "mirror, http_proxy a proxy)") from error  # fmt: skip
            time.sleep(_PAUSE * attempt)
        else:
            return


def _rest(url: str, file: IO[bytes], size: int, progress: Progress) -> None:
    """Append to `file` what it lacks. _Broken, ImageError."""
    label, received = url.rpartition("/")[2], file.seek(0, os.SEEK_END)
    if size and received == size:
        return
    request = urllib.request.Request(url, headers={"User-Agent": "softkvm"})
    if received:
        request.add_header("Range", f"bytes={received}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"the server says {error.code} {error.reason}") from error
        raise ImageError(f"cannot fetch {url}: the server says {error.code} {error.reason} "
                         "(SOFTKVM_MIRROR chooses another mirror)") from error  # fmt: skip
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(getattr(error, "reason", None) or error)) from error
    with response:
        if received and getattr(response, "status", 200) != 206:  # it sends all of it again
            received = file.seek(0)
            file.truncate()
        while True:
            try:
                piece = response.read(_PIECE)
            except (OSError, http.client.HTTPException) as error:
                raise _Broken(str(error) or type(error).__name__) from error
            if not piece:
                break
            received += len(piece)
            if received > (size or MAX_UNKNOWN):
                raise ImageError(f"{url}: longer than the {size or MAX_UNKNOWN} bytes that were expected; not used")
            file.write(piece)
            progress(f"fetching {label}", received, size)
    if size and received != size:
        raise _Broken(f"the connection ended after {received} of {size} bytes")
