"""The VM's side of template code: pages that samples see in the interpreter are asked for, and what comes is installed.

One sample is enough, for a page costs the translator some 50 us, while there is much room. Big programs have more code than
room, and most of it is seldom executed: the fuller the memory is the more samples a page needs, and old ones count less. A page
that goes on being seen in the interpreter has instructions that had not been executed when it was asked for; it is asked for
again, after twice as many samples each time.
Called by hot_code.py, with the machine's gate held. Never imports LLVM.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmcore.engine import machine_state
from kvmcore.engine.loader import TEMPLATE_BYTES
from kvmcore.engine.translation import MAX_ASSEMBLED, PAGE, WANTED, Assemble, Message

if TYPE_CHECKING:
    from kvmcore.engine.hot_code import HotPage
    from kvmcore.engine.machine import Machine

_HALVES = PAGE // 2
_RECORDS = _HALVES * machine_state.RECORD
_BIT = bytes([ord("0")]) + bytes([ord("1")]) * 255
_PATIENCE = 64
"""Samples at most between two times that a page is looked at, while there is much room."""
_WINDOW = 1 << 14
"""A sample counts half after so many others (a third of a thousand million instructions)."""
_STEPS = 4
"""So often a page has to be seen twice as much as before, until the memory is full."""


class ColdCode:
    """Of one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._cold: dict[HotPage, None] = {}
        self._installed = self._seen = 0
        self.taken = 0
        """Bytes of the memory for template code that are in use."""

    def begin(self) -> None:
        """A new memory."""
        self._cold.clear()
        self.taken = 0

    @property
    def pages(self) -> int:
        """Decoded pages whose records have been led to template code so far."""
        return self._installed + int(self._machine.state.templates_laid)

    def count(self, page: HotPage, record: int, times: int) -> None:
        """A sample's record."""
        self._seen += times
        if ctypes.c_uint32.from_address(record).value < self._machine.state.templates:
            window = self._seen // _WINDOW
            page.cold = (page.cold >> min(window - page.window, 32)) + times
            page.window = window
            if page.cold >= page.patience << (self.taken * _STEPS // TEMPLATE_BYTES):
                self._cold[page] = None

    def ask(self, send: Callable[[Message], bool]) -> bool:
        """Ask the translator for what is cold; send() says whether it could be asked. Whether there was anything."""
        asked = []
        for page in self._cold:
            if not page.base:
                continue  # it had to go; if it comes back its next sample tells
            page.cold, page.patience = 0, min(2 * page.patience, _PATIENCE)
            wanted = executed(page.base)
            if wanted & ~page.assembled:
                asked.append((page, wanted))
        self._cold.clear()
        for first in range(0, len(asked), MAX_ASSEMBLED):
            some = asked[first : first + MAX_ASSEMBLED]
            pages = [
                (page.base, ctypes.string_at(page.base + machine_state.PAGE_COPY, PAGE), wanted.to_bytes(WANTED, "little"))
                for page, wanted in some
            ]
            if send(Assemble(pages)):
                for page, wanted in some:
                    page.assembled |= wanted
        return bool(asked)

    def install(self, page: HotPage, place: int) -> None:
        """Let the page's records lead to template code; `place`: of its list of heads."""
        self._machine.image.install_templates(page.base, place)
        self._installed += 1


def executed(base: int) -> int:
    """Of a decoded page: bit i is set when halfword i has a record."""
    records = ctypes.string_at(base + machine_state.PAGE_RECORDS, _RECORDS)
    handlers = 0
    for byte in range(4):
        handlers |= int.from_bytes(records[byte :: machine_state.RECORD], "big")
    return int(handlers.to_bytes(_HALVES, "big").translate(_BIT)[::-1], 2)
