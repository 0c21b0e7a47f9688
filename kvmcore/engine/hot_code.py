"""The VM's side of translation: what is hot is asked for, what is finished is put into records.

Runs on vCPU threads, in the exit that follows every SAMPLES samples (Hart.run), so nothing here needs a thread of its
own. Decoded pages stand still meanwhile: with one hart, that hart is here; with several, native code never changes one,
and only who holds the machine's gate drops them. A region begins where a record says so: installing one is one aligned
store. Never imports LLVM; without a translator the interpreter goes on alone.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmcore.engine import hart_state, machine_state
from kvmcore.engine.translation import (
    MAX_PAGES,
    PAGE,
    BadMessage,
    Hello,
    Known,
    Message,
    Regions,
    Translate,
    Wanted,
    identity_of,
    mark_of,
    receive,
    send,
)
from protocol.channel import fd_passing

if TYPE_CHECKING:
    from kvmcore.engine.loader import Image
    from kvmcore.engine.machine import Hart, Machine

log = logging.getLogger("kvmcore.engine")

#: Samples of one place before it is translated; each stands for routines.SLICE instructions.
THRESHOLD = 12
#: Translations that may be under way at once.
AT_ONCE = 2
#: After this many requests without an answer for so long (seconds) they are taken for lost.
_PATIENCE = 5.0
_RECONNECT = 1.0
_TAG = (1 << 64) - PAGE


@dataclass(slots=True)
class HotPage:
    """A decoded page that samples fell on. `heads` are done or under way; `base` is its address."""

    base: int
    identity: bytes
    heads: set[int] = field(default_factory=set)


class HotCode:
    """Of one machine. `take` is called with a hart's samples."""

    def __init__(self, machine: Machine, image: Image, path: str) -> None:
        """`path`: the translator's socket."""
        self._machine, self._image, self._path = machine, image, path
        self._sock: socket.socket | None = None
        self._next_try = 0.0
        self._secret = b""
        self._arena = 0
        self._pages: dict[int, HotPage] = {}
        self._heat: Counter[tuple[int, int]] = Counter()
        self._where: dict[tuple[int, int], tuple[int, int]] = {}
        """Place -> (a virtual address of it, the TLBs of the hart that was there)."""
        self._under_way: dict[tuple[int, int], float] = {}
        self._flushes = 0
        self.regions = 0
        """Regions installed so far."""

    def take(self, hart: Hart) -> None:
        """Count the hart's samples, install what has come, ask for what has become hot."""
        count = hart.state.sample_count
        samples = hart.state.samples[:count]
        with self._machine.gate:  # nobody drops decoded pages meanwhile
            if not self._connected():
                hart.state.sample_count = 0
                return
            self._read()
            if self._flushes != self._machine.flushes_of_pool:  # what the fetch TLBs say is void, too
                self._forget()
                hart.state.sample_count = 0
                return
            for pc, times in Counter(samples).items():
                found = self._locate(hart, pc)
                if found is not None:
                    self._heat[found] += times
                    self._where[found] = pc, _blocks(hart)
                    self._page(found[0])
            self._ask()
        hart.state.sample_count = 0

    # -- the translator ----------------------------------------------------------------------------------------
    def _connected(self) -> bool:
        if self._sock is not None:
            return True
        if time.monotonic() < self._next_try:
            return False
        self._next_try = time.monotonic() + _RECONNECT
        try:
            self._sock = fd_passing.connect(self._path)
        except OSError:
            return False  # not there yet, or crashed and not back
        self._arena = 0
        self._under_way.clear()
        return True

    def _hang_up(self) -> None:
        assert self._sock is not None
        self._sock.close()
        self._sock = None

    def close(self) -> None:
        """The machine is gone."""
        if self._sock is not None:
            self._hang_up()

    def _send(self, message: Message) -> bool:
        """False: not now. A translator that is gone is looked for again later."""
        if self._sock is None:
            return False
        try:
            send(self._sock, message)
        except BlockingIOError:
            return False
        except OSError:
            self._hang_up()
            return False
        return True

    def _read(self) -> None:
        while self._sock is not None:
            try:
                message, fds = receive(self._sock)
            except BlockingIOError:
                return
            except (OSError, BadMessage):
                self._hang_up()
                return
            try:
                if isinstance(message, Hello) and len(fds) == 1:
                    self._begin_arena(message, fds[0])
                elif isinstance(message, Regions):
                    self._install(message)
                elif isinstance(message, Wanted):
                    self._under_way.pop((message.page, message.offset), None)
                    self._translate((message.page, message.offset), message.numbers, final=True)
                else:
                    self._hang_up()
            finally:
                fd_passing.close_all(fds)

    def _begin_arena(self, hello: Hello, fd: int) -> None:
        """Everything translated so far is void: forget the decoded pages, and the records with them."""
        if os.fstat(fd).st_size != self._image.arena_bytes:
            self._hang_up()
            return
        with self._machine.quiesce():
            self._machine.forget_decoded()
            self._image.map_arena(fd)
            self._machine.state.regions = self._image.arena
        self._secret, self._arena = hello.secret, hello.arena

    def _forget(self) -> None:
        self._flushes = self._machine.flushes_of_pool
        self._pages.clear()
        self._heat.clear()
        self._where.clear()
        self._under_way.clear()

    # -- pages ---------------------------------------------------------------------------------------------------
    def _locate(self, hart: Hart, pc: int) -> tuple[int, int] | None:
        """(decoded page, offset in it) of a virtual address that the hart has fetched from lately."""
        base = self._mapped(_blocks(hart), pc)
        return (base, pc & (PAGE - 1)) if base is not None else None

    def _mapped(self, blocks: int, va: int) -> int | None:
        """The decoded page at a virtual address, by any of the fetch TLBs."""
        entry = hart_state.FETCH_TLB_OFFSET + ((va >> 12) & (hart_state.FETCH_TLB_ENTRIES - 1)) * 16
        for block in range(hart_state.TLB_BANKS * hart_state.TLB_BLOCKS):
            tag, ab = _PAIR.from_address(blocks + block * hart_state.TLB_BLOCK + entry)
            if tag == va & _TAG:
                return int((((va & _TAG) << 2) + ab - machine_state.PAGE_RECORDS) & _WORD)
        return None

    def _page(self, base: int) -> HotPage | None:
        """What is known of a decoded page; the translator is asked about a new one."""
        if not self._secret:
            return None
        page = self._pages.get(base)
        mark = ctypes.c_uint64.from_address(base + machine_state.PAGE_IDENTITY)
        if page is not None and mark.value:
            return page
        identity = identity_of(self._secret, self._content(base))
        mark.value = mark_of(identity)
        page = self._pages[base] = HotPage(base, identity)
        self._send(Known(base, identity))
        return page

    @staticmethod
    def _content(base: int) -> bytes:
        return ctypes.string_at(base + machine_state.PAGE_COPY, PAGE)

    # -- regions -------------------------------------------------------------------------------------------------
    def _ask(self) -> None:
        """Have the hottest places translated."""
        now = time.monotonic()
        for place, since in list(self._under_way.items()):
            if now - since > _PATIENCE:
                del self._under_way[place]
        for place, times in self._heat.most_common(16):
            if times < THRESHOLD or len(self._under_way) >= AT_ONCE:
                return
            page = self._page(place[0])
            if page is None:
                return
            if place[1] not in page.heads:
                self._translate(place, [], final=False)
            del self._heat[place]

    def _translate(self, place: tuple[int, int], wanted: list[int], final: bool) -> None:
        base, offset = place
        page = self._pages.get(base)
        if page is None or place not in self._where:
            return
        pc, blocks = self._where[place]
        pages = [(0, self._content(base))]
        for number in wanted[: MAX_PAGES - 1]:
            other = self._mapped(blocks, (pc + number * PAGE) & _WORD)
            if number and other is not None and self._page(other) is not None:
                pages.append((number, self._content(other)))
        if self._send(Translate(base, offset, pages, final)):
            self._under_way[place] = time.monotonic()

    def _install(self, message: Regions) -> None:
        """Let the records of the heads lead to the regions."""
        if message.offset >= 0:
            self._under_way.pop((message.page, message.offset), None)
        page = self._pages.get(message.page)
        if page is None or page.identity != message.identity or message.arena != self._arena:
            return
        if ctypes.c_uint64.from_address(page.base + machine_state.PAGE_IDENTITY).value != mark_of(page.identity):
            return  # its bytes have changed since
        if message.offset >= 0:
            page.heads.add(message.offset)
        content = self._content(page.base)
        for offset, at in message.regions:
            page.heads.add(offset)
            record = page.base + machine_state.PAGE_RECORDS + offset // 2 * machine_state.RECORD
            operands = self._image.decode(content, offset) & ~_OFFSET
            ctypes.c_uint64.from_address(record).value = operands | (self._image.arena + at)
            self.regions += 1


def _blocks(hart: Hart) -> int:
    """Host address of a hart's TLBs."""
    return hart.address + hart_state.offset("tlb_blocks")


_PAIR = ctypes.c_uint64 * 2
_WORD = (1 << 64) - 1
_OFFSET = (1 << 32) - 1
