"""Sets of pages as maps: against the obvious way."""

from __future__ import annotations

import random

import pytest

from qemu_user.migration import pages

UNITS = 4000


def some(share: float) -> bytearray:
    chosen = random.Random(share)
    return bytearray(chosen.random() < share for _ in range(UNITS))


SHARES = [0, 0.001, 0.05, 0.5, 0.95, 1]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("most", [1, 7, UNITS])
def test_runs(share: float, most: int) -> None:
    units, again, before = some(share), bytearray(UNITS), 0
    for first, count in pages.runs(units, most):
        assert before <= first
        assert 0 < count <= most
        again[first : first + count] = b"\1" * count
        before = first + count
    assert again == units
    if most == UNITS:  # as few as can be
        assert len(list(pages.runs(units, most))) == bytes(units).count(b"\0\1") + units[0]


@pytest.mark.parametrize("share", SHARES)
def test_units(share: float) -> None:
    units = some(share)
    assert list(pages.indices(units)) == [unit for unit in range(UNITS) if units[unit]]
    assert pages.count(units) == sum(units)


@pytest.mark.parametrize("one", SHARES)
@pytest.mark.parametrize("other", SHARES)
def test_union(one: float, other: float) -> None:
    left, right = some(one), some(other)
    before = bytes(left), bytes(right)
    merged = pages.union(left, right)
    assert merged == bytearray(a | b for a, b in zip(left, right, strict=True))
    merged[0] ^= 1
    assert (bytes(left), bytes(right)) == before  # it is nobody else's
    assert pages.union(b"", left) == pages.union(left, b"") == left
