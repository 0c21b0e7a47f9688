"""The engine's image: a file of finished machine code, found by a key of everything that it depends on.

Layout: header (magic, lengths, sha256 of what follows), the table of functions (name and offset), padding to
a page, code. Used by build.py (writes) and loader.py (reads). Never imports LLVM: the key is made without it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import struct
from functools import lru_cache
from pathlib import Path

MAGIC = b"SKVMENG1"
_HEADER = struct.Struct("<8sQQ32s")
PAGE = 4096


class ImageError(Exception):
    """The file is not a whole, unchanged image."""


def pack(code: bytes, functions: dict[str, int]) -> bytes:
    """The file's content."""
    table = json.dumps(functions, separators=(",", ":")).encode()
    table += b" " * (-(_HEADER.size + len(table)) % PAGE)
    digest = hashlib.sha256(table + code).digest()
    return _HEADER.pack(MAGIC, len(table), len(code), digest) + table + code


def unpack(data: bytes) -> tuple[int, int, dict[str, int]]:
    """(offset of the code, its length, functions). ImageError unless every byte is as it was written."""
    if len(data) < _HEADER.size:
        raise ImageError("truncated")
    magic, table_size, code_size, digest = _HEADER.unpack_from(data)
    if magic != MAGIC or len(data) != _HEADER.size + table_size + code_size:
        raise ImageError("wrong magic or length")
    body = memoryview(data)[_HEADER.size :]
    if hashlib.sha256(body).digest() != digest:
        raise ImageError("checksum differs")
    return _HEADER.size + table_size, code_size, json.loads(bytes(body[:table_size]))


@lru_cache(1)
def key() -> str:
    """A digest of the sources that native code comes from, llvmlite's version and the host's CPU features."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for folder in ("ir", "isa", "engine"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name in ("abi/run_page.py", "abi/exits.py", "channel/vdso.py"):
        digest.update((root.parent / "protocol" / name).read_bytes())
    try:
        digest.update(importlib.metadata.version("llvmlite").encode())
    except importlib.metadata.PackageNotFoundError:
        pass  # an image that is there can be used without it
    digest.update(host_features().encode())
    return digest.hexdigest()[:32]


@lru_cache(1)
def host_features() -> str:
    """The first CPU's model and flags, as the kernel tells them."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in lines if line.split("\t")[0].strip().rstrip(":") in wanted)


def cache_directory() -> Path:
    """Where images lie: $XDG_CACHE_HOME/softkvm/engine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "softkvm" / "engine"


def path() -> Path:
    """Where this version's image for this host lies, whether or not it exists."""
    return cache_directory() / f"{key()}.img"
