"""What a decoded page is, natively: the identity that Python makes, and the code that there is of it, without an exit."""

from __future__ import annotations

import ctypes
import os

import pytest

from kvmcore.engine import machine_state
from kvmcore.engine.cold_code import executed
from kvmcore.engine.exits import ExitKind
from kvmcore.engine.known_pages import KnownPages
from kvmcore.engine.loader import Image
from kvmcore.engine.template_code import Assembler, TemplateMemory
from kvmcore.engine.translation import ENTRY, TEMPLATES, identity_of
from tests.framework.bare_guest import RAM, Guest

SECRET = bytes(range(32))
LOOP = "li a0, 0\nli a1, 1000\nloop: add a0, a0, a1\naddi a1, a1, -1\nbnez a1, loop\necall"
RESULT = 1000 * 1001 // 2


def identity(base: int) -> bytes:
    """As the decoded page carries it."""
    halves = (machine_state.PAGE_IDENTITY, machine_state.PAGE_IDENTITY_END)
    return b"".join(ctypes.string_at(base + half, 8) for half in halves)


def content(base: int) -> bytes:
    return ctypes.string_at(base + machine_state.PAGE_COPY, 4096)


def known(g: Guest, index: bytes = b"") -> KnownPages:
    pages = KnownPages(g.machine)
    pages.begin(SECRET, index)
    return pages


def again(g: Guest) -> int:
    """From the beginning, on pages that are decoded anew; what the loop adds up."""
    with g.machine.quiesce():
        g.machine.forget_decoded()
    g.harts[0].state.pc = RAM
    assert g.run() == ExitKind.ECALL
    return int(g.harts[0].state.x[10])


def test_identities_are_those_of_python() -> None:
    g = Guest(Image.load(), "ecall")
    pages = known(g)
    base = g.machine.state.pool
    for secret in (SECRET, os.urandom(32)):
        pages.begin(secret, b"")
        for bytes_ in (bytes(4096), b"\xff" * 4096, *(os.urandom(4096) for _ in range(20))):
            ctypes.memmove(base + machine_state.PAGE_COPY, bytes_, 4096)
            g.machine.image.know(g.harts[0].address, base)
            assert identity(base) == identity_of(secret, bytes_)


@pytest.mark.parametrize("harts", [1, 2])
def test_a_page_whose_bytes_change_is_another_one(harts: int) -> None:
    g = Guest(Image.load(), "addi a0, x0, 1\necall", harts=harts)
    pages = known(g)
    assert g.run() == ExitKind.ECALL
    assert not pages.used()
    assert identity(g.machine.state.pool) == identity_of(SECRET, content(g.machine.state.pool))
    g.put(RAM, "addi a0, x0, 2\necall")
    g.harts[0].flush_icache()
    g.harts[0].state.pc = RAM
    assert g.run() == ExitKind.ECALL
    assert g.harts[0].state.x[10] == 2
    last = g.machine.state.pool + g.machine.state.pool_used - machine_state.PAGE_STRIDE
    assert identity(last) == identity_of(SECRET, content(last))


def test_template_code_is_there_when_a_page_is_decoded() -> None:
    """And is what runs: it is made of other bytes than the page has."""
    g = Guest(Image.load(), LOOP)
    pages = known(g)
    image, state = g.machine.image, g.machine.state
    assert again(g) == RESULT
    memory = TemplateMemory(1, Assembler(image))
    image.map_templates(memory.memory.fd)
    state.templates, state.regions = image.templates, image.arena
    wanted, name = executed(state.pool), identity(state.pool)
    g.put(RAM, LOOP.replace("addi a1, a1, -1", "addi a1, a1, -2"))
    again(g)
    place = memory.place(name, content(state.pool), wanted)
    assert place is not None
    g.put(RAM, LOOP)
    assert again(g) == RESULT
    pages.template(name, place.place)
    assert again(g) == 500 * 501
    assert state.templates_laid == 1
    g.put(RAM, LOOP.replace("1000", "1001"))  # nothing is known of that
    assert again(g) == 1001 * 1002 // 2
    assert state.templates_laid == 1


def test_regions_lie_over_template_code() -> None:
    """Records of the heads lead to the arena, whatever their number; the others are as they were."""
    g = Guest(Image.load(), "ecall\n" + "addi a0, a0, 1\n" * 50)
    image, state = g.machine.image, g.machine.state
    state.templates, state.regions = image.templates, image.arena
    pages = known(g)
    again(g)
    name = identity(state.pool)
    for head in range(8, 100, 4):
        pages.region(name, head, 64 * head)
        pages.region(name, head, 1)  # it is there already
    assert sorted(pages.heads(name)) == list(range(8, 100, 4))
    assert again(g) >= 0
    first = state.pool + machine_state.PAGE_RECORDS
    records = [ctypes.c_uint64.from_address(first + 4 * head).value for head in range(8, 100, 4)]
    assert [record & 0xFFFFFFFF for record in records] == [image.arena + 64 * head for head in range(8, 100, 4)]
    assert {record >> 32 for record in records} == {image.decode(content(state.pool), 8) >> 32}
    assert state.regions_laid == len(records)
    assert pages.used() == [name]
    assert pages.used() == []


def test_a_table_grows_and_keeps_what_it_has() -> None:
    g = Guest(Image.load(), LOOP)
    names = [os.urandom(16) for _ in range(7000)]
    same = [name[:8] + os.urandom(8) for name in names[:100]]  # half an identity is none
    index = b"".join(ENTRY.pack(name, TEMPLATES, number + 1) for number, name in enumerate(names[:2000]))
    index += b"".join(ENTRY.pack(name, head, 5) for name in names[:1000] for head in (2, 6))
    pages = known(g, index + b"some")
    table = g.machine.state.known
    for number, name in enumerate(names[2000:], 2000):
        pages.template(name, number + 1)
        pages.region(name, 4, number)
    assert g.machine.state.known != table
    assert [pages.place(name) for name in names] == list(range(1, 7001))
    assert [pages.heads(name) for name in names] == [[6, 2]] * 1000 + [[]] * 1000 + [[4]] * 5000
    assert [pages.place(name) for name in same] == [0] * 100
    pages.begin(SECRET, b"")
    assert not any(pages.place(name) for name in names)
    assert again(g) == RESULT
