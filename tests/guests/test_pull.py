"""`softkvm pull` as a user meets it: from a mirror that damages what it serves, from none at all, and with a warm cache.

The index comes from Debian's archive through a mirror of ours, for its signature is checked; the packages are ours.
"""

from __future__ import annotations

import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from qemu_user.images.archive import mirror
from qemu_user.images.errors import ImageError
from qemu_user.images.store import Store
from tests.framework.product import Product

NOBODY = "http://127.0.0.1:9/debian"

pytestmark = [pytest.mark.net, pytest.mark.timeout(180)]


class Mirror(BaseHTTPRequestHandler):
    """Debian's indexes as they are; of a package as many zeroes as `cut` leaves of its size."""

    upstream = ""
    cut = 0

    def do_GET(self) -> None:
        url = self.upstream + self.path.removeprefix("/debian")
        package = self.path.endswith(".deb")
        request = urllib.request.Request(url, method="HEAD" if package else "GET")
        with urllib.request.urlopen(request, timeout=60) as answer:
            content, length = answer.read(), int(answer.headers["Content-Length"])
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(bytes(length - self.cut) if package else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def bad_mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Mirror."""
    monkeypatch.setattr(Mirror, "upstream", mirror())
    try:
        urllib.request.urlopen(f"{Mirror.upstream}/dists/trixie/InRelease", timeout=60).close()
    except OSError as error:
        pytest.skip(f"Debian's archive cannot be reached: {error}")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/debian"
    server.shutdown()
    server.server_close()


def softkvm(product: Product, cache: Path | str, where: str, *words: str) -> subprocess.CompletedProcess[bytes]:
    product.environment |= {"XDG_CACHE_HOME": str(cache), "SOFTKVM_MIRROR": where}
    return product.run(*words, seconds=150)


def left(cache: Path) -> list[str]:
    """What is in the cache of images, but for the lock."""
    folder = cache / "softkvm" / "images"
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.startswith(".lock")]


@pytest.mark.parametrize(("cut", "reason"), [(0, b"sha256"), (1000, b"the connection ended after")])
def test_damaged_packages_are_refused_and_nothing_stays(
    product: Product, bad_mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, reason: bytes
) -> None:
    monkeypatch.setattr(Mirror, "cut", cut)
    result = softkvm(product, tmp_path, bad_mirror, "pull", "busybox")
    assert result.returncode == 1
    assert result.stdout == b""
    assert reason in result.stderr
    assert b"SOFTKVM_MIRROR" in result.stderr, "it says what to do"
    assert left(tmp_path) == []


def test_offline_with_a_cold_cache_it_says_what_to_do(product: Product, tmp_path: Path) -> None:
    for words, status in ((("pull",), 1), (("run", "--", "true"), 125)):
        result = softkvm(product, tmp_path, NOBODY, *words)
        assert result.returncode == status
        assert b"is the network there?" in result.stderr
        assert left(tmp_path) == []


def test_offline_with_a_warm_cache_it_runs(product: Product) -> None:
    try:
        cache = Store().ensure("busybox", lambda *_: None).folder.parent.parent.parent
    except ImageError as error:
        pytest.skip(f"no busybox image and no way to get one: {error}")
    result = softkvm(product, cache, NOBODY, "run", "--", "echo", "offline")
    assert (result.returncode, result.stdout) == (0, b"offline\n"), result.stderr
