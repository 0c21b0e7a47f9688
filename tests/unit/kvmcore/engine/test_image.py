"""The image on disk: built once, verified, rebuilt when damaged; loading it needs no LLVM."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from kvmcore.engine import image as image_file
from kvmcore.engine.link import LinkError, link
from kvmcore.engine.loader import EngineError, Image, ensure_image


def test_loading_brings_no_llvm():
    """How long it takes is measured by tests/performance/bench.py."""
    ensure_image()
    program = (
        "import sys; from kvmcore.engine.loader import Image\n"
        "import kvmcore.engine.machine\n"
        "Image.load()\n"
        "assert not any(name.startswith('llvmlite') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text"])
def test_a_damaged_image_is_not_used(tmp_path, damage):
    data = bytearray(ensure_image().read_bytes())
    if damage == "truncate":
        del data[-100:]
    elif damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "empty":
        data.clear()
    else:
        data[:] = b"not an image" * 100
    path = tmp_path / "x.img"
    path.write_bytes(data)
    with pytest.raises((image_file.ImageError, ValueError)):
        image_file.unpack(path.read_bytes())
    with pytest.raises(EngineError):
        Image(path)


def test_a_missing_or_damaged_image_is_built_by_one_of_many(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = image_file.path()
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half an im")
    made = []
    threads = [threading.Thread(target=lambda: made.append(ensure_image()), daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [path] * 3
    image_file.unpack(path.read_bytes())
    assert sorted(entry.name for entry in path.parent.iterdir()) == sorted([".lock", path.name])
    assert path.read_bytes() == ensure_image().read_bytes()


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocker))
    with pytest.raises(EngineError, match="cannot write the engine image"):
        ensure_image()


def test_the_linker_refuses_what_it_does_not_know():
    with pytest.raises(LinkError):
        link(b"\x7fELF\x01\x01" + bytes(100))
    with pytest.raises(LinkError):
        link(os.urandom(64))


def test_the_key_names_everything(monkeypatch):
    before = image_file.key()
    image_file.key.cache_clear()
    monkeypatch.setattr(image_file, "host_features", lambda: "another CPU")
    try:
        assert image_file.key() != before
    finally:
        image_file.key.cache_clear()
