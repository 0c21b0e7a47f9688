"""Fixtures for tests that boot whole guests through the softkvm command."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.framework.product import Product, have_image


@pytest.fixture
def product() -> Iterator[Product]:
    with Product() as running:
        yield running


@pytest.fixture
def busybox() -> None:
    """Debian's kernel and busybox, from the cache or, the first time, from the archive."""
    if not have_image():
        with Product() as fetching:
            done = fetching.run("pull", "busybox", seconds=900)
        if done.returncode:
            pytest.skip(f"no image: {done.stderr.decode(errors='replace').strip()}")
