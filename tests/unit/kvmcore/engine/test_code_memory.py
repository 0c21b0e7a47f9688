"""Memory for code: seen by who maps it, in large pages where the host has them, written by nobody else."""

from __future__ import annotations

import mmap
import os

import pytest

from kvmcore.engine.code_memory import LARGE, CodeMemory
from kvmcore.engine.loader import TEMPLATE_BYTES, Image


def test_others_see_what_is_written_and_cannot_write() -> None:
    memory = CodeMemory("test", 3 * LARGE)
    other = os.dup(memory.fd)
    pieces = [(0, b"first"), (LARGE - 3, b"on two pieces"), (3 * LARGE - 4, b"last")]
    with mmap.mmap(other, 3 * LARGE, prot=mmap.PROT_READ) as mapped:
        for at, code in pieces:
            memory.write(at, code)
            assert mapped[at : at + len(code)] == code
        memory.close()
        assert [mapped[at : at + len(code)] for at, code in pieces] == [code for _, code in pieces], "it is the same when moved"
    with pytest.raises(PermissionError):
        mmap.mmap(other, LARGE)
    with pytest.raises(AssertionError):
        memory.write(3 * LARGE - 4, b"too long")
    os.close(other)


def test_code_lies_where_the_host_can_use_large_pages() -> None:
    image = Image.load()
    decode = image.address("decode")
    assert (decode + image.templates) % LARGE == 0
    assert image.arena - image.templates == TEMPLATE_BYTES
    assert TEMPLATE_BYTES % LARGE == 0
