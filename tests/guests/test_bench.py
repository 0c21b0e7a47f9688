"""`softkvm bench cpu|fp|mmu`: every kernel computes the same on every side, and the figures are written."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from qemu_user.bench import debian_root, processor
from qemu_user.images import cpio
from tests.framework.product import Product, have_image


@pytest.mark.parametrize("group", processor.GROUPS)
def test_kernels_agree(product: Product, tmp_path: Path, group: str) -> None:
    path = tmp_path / "figures.json"
    done = product.run("bench", group, "--rounds", "1", "--seconds", "0.01", "--json", str(path))
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())[group]
    sides = {"softkvm"} | ({"qemu"} if shutil.which(processor.QEMU) else set()) | ({"native"} if group != "mmu" else set())
    assert len(figures["kernels"]) >= 4
    for name, kernel in figures["kernels"].items():
        assert set(kernel["seconds"]) == sides, name
    assert (figures["geomean_vs_native"] is None) == ("native" not in sides)
    assert b"geometric mean" in done.stdout


@pytest.mark.net
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not have_image(), reason="needs the image (softkvm pull busybox)")
@pytest.mark.parametrize("program", ["openssl", "gcc"])
def test_programs_agree(product: Product, tmp_path: Path, program: str) -> None:
    """Debian's openssl and gcc, from packages that are fetched and checked, compute the same on every side. gcc has more pages
    of code than stay decoded."""
    path = tmp_path / "figures.json"
    words = ["--rounds", "1", "--seconds", "0.25", "--only", program, "--json", str(path)]
    done = product.run("bench", "programs", *words, seconds=900)
    assert done.returncode == 0, done.stderr
    (kernel,) = json.loads(path.read_text())["programs"]["kernels"].values()
    assert kernel["result"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which(processor.QEMU) is None, reason="needs qemu-system-riscv64 (qemu-system-misc)")
@pytest.mark.skipif(not have_image(), reason="needs the image (softkvm pull busybox)")
def test_qemu_is_moved_beside_us(product: Product, tmp_path: Path) -> None:
    """Its guest comes up, is watched and moved."""
    path = tmp_path / "figures.json"
    words = ["--only", "qemu-idle", "--rounds", "1", "-m", "256", "--json", str(path)]
    done = product.run("bench", "migration", *words, seconds=900)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(path.read_text())["milliseconds"].values()
    assert row["converged"] == 1
    assert row["inside"] > 0


def test_packages_become_a_folder_of_the_guest(tmp_path: Path) -> None:
    """Links stay inside, documentation is left out, nothing leaves the folder."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, kind, target in (
            ("./", tarfile.DIRTYPE, ""),
            ("./usr/bin/", tarfile.DIRTYPE, ""),
            ("./usr/bin/tool", tarfile.REGTYPE, ""),
            ("./usr/bin/same", tarfile.LNKTYPE, "./usr/bin/tool"),
            ("./bin", tarfile.SYMTYPE, "usr/bin"),
            ("./usr/share/doc/tool/copyright", tarfile.REGTYPE, ""),
            ("./../outside", tarfile.REGTYPE, ""),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.mode = kind, target, 0o755
            tar.addfile(entry)
    package = tmp_path / "tool.deb"
    head = f"{'data.tar':16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data.getvalue()):<10}`\n".encode()
    package.write_bytes(b"!<arch>\n" + head + data.getvalue())
    made = cpio.Archive()
    debian_root._add(made, package)
    names = re.findall(rb"07070[0-9a-f]{105}([^\0]+)\0", made.finish())
    assert names == [b"debian", b"debian/usr", b"debian/usr/bin", b"debian/usr/bin/tool", b"debian/usr/bin/same",
                     b"debian/bin", b"TRAILER!!!"]  # fmt: skip


def test_a_kernel_that_does_not_exist(product: Product) -> None:
    done = product.run("bench", "fp", "--rounds", "1", "--seconds", "0.01", "--only", "nothing")
    assert done.returncode == 1
    assert b"no kernel named 'nothing'" in done.stderr


def test_sides_that_disagree_are_told() -> None:
    kernels: dict[str, processor.Kernel] = {}
    processor.take(kernels, "softkvm", "noise\nsieve 100 200 3 42\n", "")
    with pytest.raises(processor.BenchError, match="sieve: qemu computed 43, another one 42"):
        processor.take(kernels, "qemu", "OpenSBI\nsieve 50 60 9 43\n", "")
    with pytest.raises(processor.BenchError, match="reported nothing"):
        processor.take(kernels, "native", "", "")


def test_ratios_and_their_mean() -> None:
    kernels: dict[str, processor.Kernel] = {}
    for side, fast, slow in (("softkvm", 100, 100), ("qemu", 200, 800), ("native", 50, 50)):
        processor.take(kernels, side, f"a {fast} 1 1 7\nb {slow} 1 1 8\n", "")
    assert processor.geomean(kernels, "qemu") == pytest.approx(4.0)
    assert processor.geomean(kernels, "native") == pytest.approx(0.5)
