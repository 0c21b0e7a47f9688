"""`--share DIR:TAG`: the guest's kernel on our 9P server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.framework.product import Product, read_until

pytestmark = [pytest.mark.net, pytest.mark.timeout(240), pytest.mark.usefixtures("busybox")]


def test_a_folder_is_shared_both_ways(product: Product, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    data = os.urandom(3_000_000)
    (folder / "from-host").write_bytes(data)
    (tmp_path / "secret").write_text("outside")
    (folder / "escape").symlink_to("../secret")
    script = """
        cd /mnt/data && cp from-host from-guest && mkdir -p a/b && mv a c && ln -s from-host link && cmp link from-guest &&
        cat escape; cat ../../../secret; ls c; for i in 1 2 3; do echo $i >>log; done; sync; echo 4 >>log
    """
    done = product.run("run", "--share", f"{folder}:data", "--", "sh", "-c", script)
    assert done.stdout == b"b\n", done.stderr
    assert (folder / "from-guest").read_bytes() == data
    assert (folder / "c" / "b").is_dir()
    assert (folder / "log").read_text() == "1\n2\n3\n4\n"
    assert os.readlink(folder / "link") == "from-host"


def test_a_read_only_share(product: Product, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept\n")
    script = "cat /mnt/data/file; ! echo x >/mnt/data/file"
    done = product.run("run", "--share", f"{tmp_path}:data:ro", "--", "sh", "-c", script)
    assert done.stdout == b"kept\n"
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "kept\n"


def test_changes_of_either_side_are_seen_at_the_next_open(product: Product, tmp_path: Path) -> None:
    shared = tmp_path / "file"
    shared.write_text("one\n")
    script = "cd /mnt/data; while cat file; echo end; read line; do echo $line >answer; done"
    running = product.start("run", "--share", f"{tmp_path}:data", "--", "sh", "-c", script)
    assert running.stdin is not None
    try:
        assert read_until(running, b"end\n", 120) == b"one\nend\n"
        for word in (b"two", b"SIX", b"longer than before"):
            shared.write_bytes(word + b"\n")
            running.stdin.write(word + b"\n")
            running.stdin.flush()
            assert read_until(running, b"end\n", 120) == word + b"\nend\n"
            assert (tmp_path / "answer").read_bytes() == word + b"\n"
    finally:
        running.kill()
        running.communicate()
