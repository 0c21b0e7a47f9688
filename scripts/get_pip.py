"""Installs pip into the virtual environment that runs this, for hosts whose python3 comes without ensurepip.

`VENV/bin/python scripts/get_pip.py`: fetches pip's wheel from the package index, checks the digest that the index gives,
and lets pip install itself from it. Needs nothing but Python and the network. Called by setup-environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

_INDEX = "https://pypi.org/simple"


def index() -> str:
    """Where packages come from: PIP_INDEX_URL, or PyPI."""
    return os.environ.get("PIP_INDEX_URL", _INDEX).rstrip("/")


def wheels(listing: str, place: str) -> list[tuple[list[int], str, str]]:
    """(version, URL, sha256) of the wheels in an index's page, PEP 691's JSON or PEP 503's HTML; no pre-releases."""
    if listing.lstrip().startswith("{"):
        files = [
            (file["filename"], file["url"], file["hashes"].get("sha256", ""))
            for file in json.loads(listing)["files"]
            if not file.get("yanked")
        ]
    else:
        links = re.findall(r'<a ([^>]*)href="([^"#]+)#sha256=([0-9a-f]{64})"([^>]*)>', listing)
        files = [
            (url.rpartition("/")[2], url, digest)
            for before, url, digest, after in links
            if "data-yanked" not in before + after
        ]
    found = []
    for name, url, digest in files:
        version = re.fullmatch(r"pip-([0-9.]+)-py[23.py]*-none-any\.whl", name)
        if version and digest:
            found.append(([int(part) for part in version[1].split(".")], urljoin(place, url), digest))
    return found


def fetch(url: str, kind: str = "*/*") -> bytes:
    request = urllib.request.Request(url, headers={"Accept": kind})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def main() -> int:
    """0, or 1 with a message."""
    place = f"{index()}/pip/"
    try:
        found = wheels(fetch(place, "application/vnd.pypi.simple.v1+json, text/html;q=0.5").decode(), place)
        _, url, digest = max(found)
        wheel = fetch(url)
    except (OSError, ValueError, KeyError) as error:
        sys.stderr.write(f"softkvm: cannot fetch pip from {place}: {error}\n")
        return 1
    if hashlib.sha256(wheel).hexdigest() != digest:
        sys.stderr.write(f"softkvm: {url} is damaged: its sha256 is not {digest}\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / url.rpartition("/")[2]
        path.write_bytes(wheel)
        sys.path.insert(0, str(path))
        sys.argv = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", str(path)]
        runpy.run_module("pip", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
