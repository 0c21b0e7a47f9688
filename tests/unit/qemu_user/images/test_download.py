"""One file from a server that behaves, breaks off, lies or is not there."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_user.images import download as module
from qemu_user.images.download import download
from qemu_user.images.errors import ImageError

CONTENT = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole; /cut breaks off in the middle; /ignore too, and knows no ranges."""

    asked: list[str] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        Handler.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/ignore" else 0
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        first = len(Handler.asked) == 1 and self.path in ("/cut", "/ignore")
        self.wfile.write(CONTENT[start : len(CONTENT) // 2] if first else CONTENT[start:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def nothing(what: str, done: int, total: int) -> None:
    pass


def test_whole(server: str, tmp_path: Path) -> None:
    download(f"{server}/whole", tmp_path / "f", len(CONTENT), DIGEST, nothing)
    assert (tmp_path / "f").read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["cut", "ignore"])
def test_broken_connection_is_taken_up_again(server: str, tmp_path: Path, path: str) -> None:
    download(f"{server}/{path}", tmp_path / "f", len(CONTENT), DIGEST, nothing)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert Handler.asked == ["", f"bytes={len(CONTENT) // 2}-"]


@pytest.mark.parametrize(
    ("path", "size", "digest", "message"),
    [
        ("whole", len(CONTENT), "0" * 64, "sha256"),
        ("whole", len(CONTENT) - 1, DIGEST, "longer"),
        ("whole", len(CONTENT) + 1, DIGEST, "connection ended"),
        ("absent", 1, DIGEST, "404"),
    ],
)
def test_wrong_is_refused_and_nothing_stays(
    server: str, tmp_path: Path, path: str, size: int, digest: str, message: str
) -> None:
    with pytest.raises(ImageError, match=message):
        download(f"{server}/{path}", tmp_path / "f", size, digest, nothing)
    assert list(tmp_path.iterdir()) == []


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.01)
    with pytest.raises(ImageError, match="SOFTKVM_MIRROR"):
        download("http://127.0.0.1:1/f", tmp_path / "f", 1, DIGEST, nothing)
    with pytest.raises(ImageError, match="begins with"):
        download("ftp://127.0.0.1/f", tmp_path / "f", 1, DIGEST, nothing)
    assert list(tmp_path.iterdir()) == []
