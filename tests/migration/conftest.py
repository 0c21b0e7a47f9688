"""Fixtures for migration: a kvmcore daemon for all of a module's VMs, and helpers that wait for guests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.framework import memory_guest
from tests.framework.full_stack import Daemon
from tests.framework.product import Product, have_image
from tests.migration.hosts import HostUnderTest


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with Daemon() as daemon:
        yield daemon.endpoint


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[HostUnderTest, HostUnderTest]]:
    """Two hosts without VMs, which end with the test."""
    one, two = HostUnderTest(tmp_path, "a"), HostUnderTest(tmp_path, "b")
    yield one, two
    one.close()
    two.close()


@pytest.fixture
def busybox() -> None:
    """Debian's kernel and busybox, from the cache or, the first time, from the archive."""
    if not have_image():
        with Product() as fetching:
            done = fetching.run("pull", "busybox", seconds=900)
        if done.returncode:
            pytest.skip(f"no image: {done.stderr.decode(errors='replace').strip()}")


@pytest.fixture
def goes_on(tmp_path: Path) -> Callable[[str], int]:
    """goes_on(name): waits until the guest has done some more rounds under that name; how many there are."""

    def wait(name: str, more: int = 3, seconds: float = 60) -> int:
        wanted = memory_guest.rounds(tmp_path, name) + more
        end = time.monotonic() + seconds
        while (done := memory_guest.rounds(tmp_path, name)) < wanted:
            assert time.monotonic() < end, f"the guest {name} stands at round {done}"
            time.sleep(0.01)
        return done

    return wait
