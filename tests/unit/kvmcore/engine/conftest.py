"""Fixtures of the engine's tests: the image, and bare guests on it (tests/framework/bare_guest.py)."""

from __future__ import annotations

import pytest

from kvmcore.engine.loader import Image
from tests.framework.bare_guest import Guest


@pytest.fixture(scope="session")
def image() -> Image:
    return Image.load()


@pytest.fixture
def guest(image):
    def make(source: str, **options: int) -> Guest:
        return Guest(image, source, **options)

    return make
