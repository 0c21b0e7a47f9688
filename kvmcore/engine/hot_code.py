"""The VM's side of translation: what is hot is asked for, what is finished is put into records.

Runs on vCPU threads, in the exit that follows every SAMPLES samples and each new decoded page (Hart.run), so nothing
here needs a thread of its own. What earlier VMs had translated is installed as soon as a page is decoded; what was seen
but never became hot is wished for at the end, for the next VM. Decoded pages stand still meanwhile: with one hart, that
hart is here; with several, native code never changes one, and only who holds the machine's gate drops them. A region
begins where a record says so: installing one is one aligned store. Never imports LLVM; without a translator the
interpreter goes on alone.
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
    ENTRY,
    MAX_LATER,
    MAX_PAGES,
    PAGE,
    BadMessage,
    Hello,
    Known,
    Later,
    Message,
    Regions,
    Totals,
    Translate,
    Used,
    Wanted,
    Wishes,
    encode_wishes,
    identity_of,
    in_memory,
    mark_of,
    receive,
    send,
)
from protocol.channel import fd_passing

if TYPE_CHECKING:
    from kvmcore.engine.loader import Image
    from kvmcore.engine.machine import Hart, Machine

log = logging.getLogger("kvmcore.engine")

#: Samples of one place before it is translated; each stands for hart_state.SLICE instructions.
THRESHOLD = 12
#: Translations that may be under way at once.
AT_ONCE = 2
#: After this many requests without an answer for so long (seconds) they are taken for lost.
_PATIENCE = 5.0
_RECONNECT = 1.0
#: Samples of one place at least before it is wished for, and seconds between two lots of wishes.
_SEEN = 2
_WISHES = 10.0
_TAG = (1 << 64) - PAGE


@dataclass(slots=True)
class HotPage:
    """A decoded page that samples fell on. `heads` are done or under way, `wished` for later; `base` is its address."""

    base: int
    identity: bytes
    heads: set[int] = field(default_factory=set)
    wished: set[int] = field(default_factory=set)


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
        self._expected = b""
        self._flushes = 0
        self._index: dict[bytes, list[tuple[int, int]]] = {}
        """Identity of a page -> (offset of a head, offset in the arena): what was there when the arena began."""
        self._used: list[bytes] = []
        self._next_wishes = time.monotonic() + _WISHES
        self.regions = self.ready_made = self.translated = self.nanoseconds = 0
        """Regions installed so far; those that were there already; those that the translator made for us, and its time."""
        self.host = Totals()
        """What the translator said last of itself."""
        machine.state.watch = 1  # until it is known what there is: the first page leads to the translator

    def take(self, hart: Hart) -> None:
        """Count the hart's samples, install what has come, ask for what has become hot."""
        with self._machine.gate:  # nobody drops decoded pages meanwhile
            if not self._connected():
                hart.state.sample_count = hart.state.fresh_page = 0
                return
            if self._expected:
                self._expect()
            self._read()
            if self._flushes != self._machine.flushes_of_pool:  # what the fetch TLBs say is void, too
                self._forget()
                hart.state.sample_count = hart.state.fresh_page = 0
                return
            if hart.state.fresh_page:
                self._identify(hart.state.fresh_page)
                hart.state.fresh_page = 0
            if hart.state.sample_count == hart_state.SAMPLES:
                self._count(hart)
                hart.state.sample_count = 0

    def close(self) -> None:
        """No hart runs any more: the translator learns what the next VM could use."""
        if not self._machine.gate.acquire(timeout=0.1):
            return  # somebody is stuck; it is about to end with the process
        try:
            if self._sock is not None:
                if self._flushes == self._machine.flushes_of_pool:
                    self._wish()
                self._hang_up()
        finally:
            self._machine.gate.release()

    def _count(self, hart: Hart) -> None:
        """The hart's samples."""
        for pc, times in Counter(hart.state.samples[: hart.state.sample_count]).items():
            found = self._locate(hart, pc)
            if found is not None:
                self._heat[found] += times
                self._where[found] = pc, _blocks(hart)
                self._page(found[0])
        self._ask()
        if time.monotonic() > self._next_wishes:
            self._wish()

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
        self._machine.state.watch = 0

    def _send(self, message: Message, fds: list[int] | None = None) -> bool:
        """False: not now. A translator that is gone is looked for again later."""
        if self._sock is None:
            return False
        try:
            send(self._sock, message, fds)
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
                if isinstance(message, Hello) and len(fds) == 2:
                    self._begin_arena(message, *fds)
                elif isinstance(message, Regions):
                    self._install(message)
                elif isinstance(message, Wanted):
                    self._under_way.pop((message.page, message.offset), None)
                    self._translate((message.page, message.offset), message.numbers, final=True)
                else:
                    self._hang_up()
            finally:
                fd_passing.close_all(fds)

    def _begin_arena(self, hello: Hello, fd: int, index: int) -> None:
        """Everything translated so far is void: forget the decoded pages, and the records with them."""
        if os.fstat(fd).st_size != self._image.arena_bytes:
            self._hang_up()
            return
        with self._machine.quiesce():
            self._machine.forget_decoded()
            self._image.map_arena(fd)
            self._machine.state.regions = self._image.arena
        self._secret, self._arena = hello.secret, hello.arena
        self._index.clear()
        entries = os.pread(index, self._image.arena_bytes, 0)
        for identity, offset, at in ENTRY.iter_unpack(entries[: len(entries) // ENTRY.size * ENTRY.size]):
            self._index.setdefault(identity, []).append((offset, at))
        self._machine.state.watch = int(bool(self._index))

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
        page = self._identify(base)
        if not page.heads:
            self._send(Known(base, page.identity))
        return page

    def _identify(self, base: int) -> HotPage:
        """A decoded page that nobody has looked at yet: what the index has of it is installed."""
        identity = identity_of(self._secret, self._content(base))
        ctypes.c_uint64.from_address(base + machine_state.PAGE_IDENTITY).value = mark_of(identity)
        page = self._pages[base] = HotPage(base, identity)
        found = self._index.get(identity)
        if found:
            self.ready_made += len(found)
            self._put(page, found)
            self._used.append(identity)
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
        self.host = message.host
        self.nanoseconds += message.took
        self.translated += message.took > 0
        if message.offset >= 0:
            self._under_way.pop((message.page, message.offset), None)
        page = self._pages.get(message.page)
        if page is None or page.identity != message.identity or message.arena != self._arena:
            return
        if ctypes.c_uint64.from_address(page.base + machine_state.PAGE_IDENTITY).value != mark_of(page.identity):
            return  # its bytes have changed since
        if message.offset >= 0:
            page.heads.add(message.offset)
        self.ready_made += 0 if message.took else len(message.regions)
        self._put(page, message.regions)

    def _put(self, page: HotPage, regions: list[tuple[int, int]]) -> None:
        content = self._content(page.base)
        for offset, at in regions:
            page.heads.add(offset)
            record = page.base + machine_state.PAGE_RECORDS + offset // 2 * machine_state.RECORD
            operands = self._image.decode(content, offset) & ~_OFFSET
            ctypes.c_uint64.from_address(record).value = operands | (self._image.arena + at)
            self.regions += 1

    # -- for later -------------------------------------------------------------------------------------------------
    def _wish(self) -> None:
        """Tell the translator which pages' regions were of use, and what was seen a few times without being hot."""
        self._next_wishes = time.monotonic() + _WISHES
        if self._used:
            self._send(Used(self._used))
            self._used = []
        places = [
            place for place, times in self._heat.most_common()
            if times >= _SEEN and place in self._where
            and (page := self._page(place[0])) and place[1] not in page.heads | page.wished
        ][:MAX_LATER]  # fmt: skip
        if places and self._say_later(encode_wishes(self._wishes(places))):
            for base, offset in places:
                self._pages[base].wished.add(offset)

    def _say_later(self, wishes: bytes) -> bool:
        fd = in_memory("softkvm-wishes", wishes)
        try:
            return self._send(Later(), [fd])
        finally:
            os.close(fd)

    def _wishes(self, places: list[tuple[int, int]]) -> Wishes:
        spaces: dict[int, int] = {}
        pages: dict[int, int] = {}
        wishes = Wishes([], [])
        for base, offset in places:
            if base not in pages:
                va = self._where[base, offset][0]
                # The kernel's half is one space; a process's pages are not known to belong together.
                space = spaces.setdefault(0 if va >> 63 else base, len(spaces))
                pages[base] = len(wishes.pages)
                wishes.pages.append((space, va >> 12, self._content(base)))
            wishes.heads.append((pages[base], offset))
        return wishes

    # -- another host's ----------------------------------------------------------------------------------------
    def hot_elsewhere(self, wishes: bytes) -> None:
        """Encoded Wishes: what was hot where this VM comes from. Asked for as soon as there is a translator."""
        with self._machine.gate:
            self._expected = wishes
            if self._connected():
                self._expect()

    def _expect(self) -> None:
        wishes, self._expected = self._expected, b""
        if wishes and not self._say_later(wishes):
            self._expected = wishes

    def hot_here(self) -> bytes:
        """Encoded Wishes: the places that have regions, then those that were seen; b"" if there are none."""
        if not self._machine.gate.acquire(timeout=0.1):
            return b""
        try:
            if self._flushes != self._machine.flushes_of_pool:
                return b""
            heads = [
                place for place in self._where if (page := self._pages.get(place[0])) is not None and place[1] in page.heads
            ]  # fmt: skip
            seen = [place for place, times in self._heat.most_common(MAX_LATER) if times >= _SEEN and place in self._where]
            places = list(dict.fromkeys(heads + seen))[:MAX_LATER]
            return encode_wishes(self._wishes(places)) if places else b""
        finally:
            self._machine.gate.release()


def _blocks(hart: Hart) -> int:
    """Host address of a hart's TLBs."""
    return hart.address + hart_state.offset("tlb_blocks")


_PAIR = ctypes.c_uint64 * 2
_WORD = (1 << 64) - 1
_OFFSET = (1 << 32) - 1
