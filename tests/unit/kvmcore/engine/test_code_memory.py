"""Memory for code: seen by who maps it, in large pages where the host has them, written by nobody else."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from kvmcore.engine import machine_state
from kvmcore.engine.code_memory import LARGE, CodeMemory
from kvmcore.engine.loader import ARENA_BYTES, TEMPLATE_BYTES, Image
from kvmcore.engine.machine import CODE_BYTES, POOL_BYTES, Machine


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


def test_a_machine_is_in_no_more_code_than_it_may() -> None:
    """Decoded pages and template code have no room for more; what it leaves it can enter as before, and it is counted again."""
    assert POOL_BYTES + TEMPLATE_BYTES <= CODE_BYTES - (6 << 20)
    image = Image.load()
    machine = Machine(image)
    templates, regions = CodeMemory("templates", TEMPLATE_BYTES), CodeMemory("regions", ARENA_BYTES, large=False)
    templates.write(0, b"\x01" * TEMPLATE_BYTES)
    regions.write(0, b"\x02" * ARENA_BYTES)
    image.map_templates(templates.fd)
    image.map_arena(regions.fd)
    zero = image.address("decode")  # what records are relative to

    def enter(at: int, size: int) -> set[int]:
        return {ctypes.string_at(zero + at + offset, 1)[0] for offset in range(0, size, mmap.PAGESIZE)}

    assert machine.code_bytes == 0
    enter(image.templates, TEMPLATE_BYTES)
    machine.bound_code()
    assert machine.code_bytes == TEMPLATE_BYTES, "it is not too much yet"
    machine.state.pool_used = POOL_BYTES // machine_state.PAGE_STRIDE * machine_state.PAGE_STRIDE
    enter(image.arena, ARENA_BYTES)
    assert machine.code_bytes > CODE_BYTES
    machine.bound_code()
    assert machine.code_bytes == machine.state.pool_used
    few = 1 << 20
    assert enter(image.arena, few) == {2}
    assert enter(image.templates, few) == {1}
    machine.bound_code()
    assert machine.state.pool_used + 2 * few <= machine.code_bytes <= CODE_BYTES - 2 * few
    machine.state.pool_used = 0
    for memory in (templates, regions):
        memory.close()
