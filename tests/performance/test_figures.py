"""The promised figures hold. Slow, and only meaningful on a machine that does nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework import qemu_peer
from tests.framework.product import Product, have_image
from tests.performance import bench

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
needs_image = pytest.mark.skipif(not have_image(), reason="needs the image (softkvm pull busybox)")


@pytest.fixture
def product() -> Iterator[Product]:
    with Product() as running:
        yield running


def test_engine_image() -> None:
    """Built in under 3 s, mapped in under 20 ms, without LLVM in a VM process."""
    figures = bench.engine_image()
    assert figures["build"]["min"] < 3
    assert figures["load"]["median"] < 0.02
    assert not figures["vm_process_imports_llvmlite"]


@needs_image
@pytest.mark.net
@pytest.mark.qemu
@pytest.mark.skipif(not qemu_peer.available(), reason="needs qemu-system-riscv64 (apt install qemu-system-misc)")
def test_boot_against_qemu(product: Product) -> None:
    """`run busybox -- true` in at most 1.5 times QEMU's time."""
    assert bench.boots(product, 5, 1, ["true"])["ratio"] <= 1.5


@needs_image
@pytest.mark.net
def test_memory(product: Product) -> None:
    """A VM costs no more than 1.3 times the guest's memory and 40 MB."""
    figures = bench.memory_of_a_vm(product, 64)
    assert figures["total"] <= figures["limit"]


@needs_image
@pytest.mark.net
def test_idle(product: Product) -> None:
    """An idle VM uses less than 3 % of a core."""
    assert bench.idle_cpu(product, 10)["core"] < 0.03
