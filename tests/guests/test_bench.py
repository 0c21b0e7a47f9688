"""`softkvm bench cpu|fp|mmu`: every kernel computes the same on every side, and the figures are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qemu_user.bench import processor
from tests.framework.product import Product


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
