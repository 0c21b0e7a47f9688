"""Deltas of pages: what comes out at the other end is what was sent; what is not known there is sent whole."""

from __future__ import annotations

import random

from qemu_user.migration.delta import PAGE, Sent, xor


def test_exclusive_or_there_and_back() -> None:
    dice = random.Random(3)
    old, new = dice.randbytes(3 * PAGE), bytearray(dice.randbytes(3 * PAGE))
    assert xor(old, xor(old, new)) == new
    assert xor(memoryview(old), old) == bytes(3 * PAGE)


def test_only_what_was_sent_is_known() -> None:
    sent = Sent(most=4 * PAGE)
    sent.now(10, b"a" * PAGE + b"b" * PAGE)
    assert sent.before(10, 2) == b"a" * PAGE + b"b" * PAGE
    assert sent.before(9, 2) is None
    assert sent.before(11, 2) is None
    sent.now(11, b"c" * PAGE)
    assert sent.before(10, 2) == b"a" * PAGE + b"c" * PAGE
    sent.forget(10, 1)
    assert sent.before(10, 1) is None
    sent.now(20, bytes(4 * PAGE))
    assert sent.before(11, 1) is None, "bounded: the oldest goes first"
    assert sent.before(20, 4) == bytes(4 * PAGE)
