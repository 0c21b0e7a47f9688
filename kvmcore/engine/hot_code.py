"""The VM's side of translation: what is hot is asked for, what is finished is put into records.

Runs on vCPU threads, in the exit that follows some dozens or hundreds of samples (Hart.run), so nothing here needs a thread of
its own. What is there already native code installs as soon as a page is decoded (page_identity.py); what was seen but never
became hot is wished for at the end, for the next VM. Decoded pages stand still meanwhile: with one hart, that hart is here;
with several, native code never changes one, and only who holds the machine's gate drops them. A region begins where a record
says so: installing one is one aligned store. Never imports LLVM; without a translator the interpreter goes on alone.
"""

from __future__ import annotations

import ctypes
import heapq
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmcore.engine import hart_state, machine_state, warm_pages
from kvmcore.engine.cold_code import ColdCode
from kvmcore.engine.known_pages import KnownPages
from kvmcore.engine.translation import (
    MAX_KNOWN,
    MAX_LATER,
    MAX_PAGES,
    MAX_WAITING,
    PAGE,
    Answered,
    Assembled,
    BadMessage,
    Elsewhere,
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
    decode_elsewhere,
    encode_elsewhere,
    encode_wishes,
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
#: Between two looks for a translator, seconds: at first, when it may be starting as the VM does, and after so long.
_RECONNECT_SOON, _RECONNECT, _SOON = 0.02, 1.0, 5.0
#: Of the places that are to be translated so many are put in order at once, and for so long (seconds).
_QUEUE, _REORDER = 16, 0.25
#: Pages that are not decoded any more but remembered, and places of known address spaces, at most.
_AWAY, _MAPPED = 8192, 65536
#: Samples of one place at least before it is wished for, and seconds between two lots of wishes.
_SEEN = 2
_WISHES = 10.0
#: Seconds between two looks at how much code there is.
_BOUND = 0.25
#: Before a VM that comes from elsewhere runs the translator is waited for so long, if it is there at all.
_HELLO_SECONDS, _HELLO_PAUSE = 0.05, 0.001


@dataclass(slots=True, eq=False)
class HotPage:
    """A page of code that samples fell on. `base`: of the decoded page, 0 when it had to go and is away.

    heads: regions that are there or under way; wished: for later; heat: samples of other places; seen: where it was
    last (number of the virtual page, satp, the TLBs of the hart); asked: whether the translator was asked what it has of it.
    cold: samples that the interpreter had on it, up to which window; patience: how many let it be asked for; assembled: what it
    was asked for (cold_code.py).
    """

    base: int
    identity: bytes
    heads: set[int] = field(default_factory=set)
    wished: set[int] = field(default_factory=set)
    heat: dict[int, int] = field(default_factory=dict)
    seen: tuple[int, int, int] | None = None
    asked: bool = False
    cold: int = 0
    window: int = 0
    patience: int = 1
    assembled: int = 0


class HotCode:
    """Of one machine. `take` is called with a hart's samples."""

    def __init__(self, machine: Machine, image: Image, path: str) -> None:
        """`path`: the translator's socket."""
        self._machine, self._image, self._path = machine, image, path
        self._sock: socket.socket | None = None
        self._next_try = 0.0
        self._begun = time.monotonic()
        self._secret = b""
        self._arena = self._templates = 0
        self._pages: dict[int, HotPage] = {}
        """By the decoded page's address."""
        self._away: dict[bytes, HotPage] = {}
        """By identity: what was decoded once. A page that comes back is as hot as it was."""
        self._hot: dict[tuple[bytes, int], HotPage] = {}
        """Places, by identity and offset, that are to be translated."""
        self._mapped: dict[tuple[int, int], int] = {}
        """(satp, or 0 in the kernel's half, number of a virtual page) -> the decoded page that samples saw there."""
        self._queue: list[tuple[bytes, int]] = []
        """The hottest of them, some moments ago; the hottest one last."""
        self._next_queue = 0.0
        self._under_way: dict[tuple[int, int], float] = {}
        self._unknown: list[HotPage] = []
        """Pages that the translator is about to be asked about."""
        self._expected = b""
        self._pages_elsewhere: list[int] = []
        self._known = KnownPages(machine)
        self._next_wishes = time.monotonic() + _WISHES
        self._next_bound = 0.0
        self.cold = ColdCode(machine)
        self._counted = False
        """Whether samples were counted since the translator was asked for anything."""
        self._awaited = 0
        """Answers that the translator gives at once."""
        self._regions = self._ready_made = self.translated = self.nanoseconds = 0
        """Regions installed here so far; those that were there already; those that the translator made for us, and its time."""
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
            hart.state.fresh_page = 0
            if hart.state.sample_count >= hart.state.samples_wanted:
                self._machine.pool_grows()
                self._count(hart)
                self._counted = True
            if self._counted:
                self._counted = False
                more = self._ask()  # as long as it executes what was not seen before it is looked at more often
                wanted = hart_state.FEW_SAMPLES if more else 2 * hart.state.samples_wanted
                hart.state.samples_wanted = min(wanted, hart_state.SAMPLES)
                now = time.monotonic()
                if now > self._next_wishes:
                    self._wish()
                if now > self._next_bound:
                    self._next_bound = now + _BOUND
                    self._machine.bound_code()
            self._watch()

    @property
    def regions(self) -> int:
        """Installed so far."""
        return self._regions + int(self._machine.state.regions_laid)

    @property
    def ready_made(self) -> int:
        """Those of them that were there already."""
        return self._ready_made + int(self._machine.state.regions_laid)

    def close(self) -> None:
        """No hart runs any more: the translator learns what the next VM could use."""
        if not self._machine.gate.acquire(timeout=0.1):
            return  # somebody is stuck; it is about to end with the process
        try:
            if self._sock is not None:
                self._wish()
                self._hang_up()
        finally:
            self._machine.gate.release()

    def pages_go(self, bases: AbstractSet[int] | None) -> None:
        """These decoded pages, or all of them, are about to be dropped; no hart is in native code. How hot they are is kept."""
        with self._machine.gate:
            gone = self._pages.keys() if bases is None else bases
            for hart in self._machine.harts:
                if self._sock is not None and hart.state.sample_count:
                    self._count(hart)
                    self._counted = True
                if bases is None or hart.state.fresh_page in gone:
                    hart.state.fresh_page = 0
            leaving = self._pages.keys() & gone
            self._wish_for([self._pages[base] for base in leaving])  # as long as their bytes are here
            for base in leaving:
                self._put_away(self._pages.pop(base))
            if bases is None:
                self._mapped.clear()
            self._watch()

    def came_back(self, bases: list[int]) -> None:
        """These pages have been decoded without a hart's entering them; none is in native code."""
        with self._machine.gate:
            for base in bases if self._secret else ():
                self._image.know(self._machine.harts[0].address, base)

    def _put_away(self, page: HotPage) -> None:
        page.base = 0
        self._away.pop(page.identity, None)
        self._away[page.identity] = page
        if len(self._away) > _AWAY:
            self._forget(self._away.pop(next(iter(self._away))))

    def _forget(self, page: HotPage) -> None:
        for offset in page.heat:
            self._hot.pop((page.identity, offset), None)

    def _count(self, hart: Hart) -> None:
        """The hart's samples."""
        state, blocks = hart.state, hart.address + hart_state.offset("tlb_blocks")
        count, state.sample_count = state.sample_count, 0
        records = state.sample_records[:count]
        places = dict(zip(records, zip(state.samples[:count], state.sample_spaces[:count], strict=True), strict=True))
        pool = range(self._machine.state.pool, self._machine.state.pool + self._machine.state.pool_used)
        pages: dict[int, HotPage | None] = {}
        for record, times in Counter(records).items():  # some hundred, every few milliseconds
            pc, satp = places[record]
            offset = pc & (PAGE - 1)
            base = record - (offset << 2) - machine_state.PAGE_RECORDS
            if base in pages:
                page = pages[base]
            else:
                page = pages[base] = self._page(base) if base in pool else None
                if page is not None:
                    page.seen = pc >> 12, satp, blocks
                    self._note_mapped(pc >> 12, satp, base)
            if page is None:
                continue
            self.cold.count(page, record, times)
            page.heat[offset] = heat = page.heat.get(offset, 0) + times
            if heat >= THRESHOLD:
                self._heated(page, offset)

    def _heated(self, page: HotPage, offset: int) -> None:
        if offset in page.heads:
            del page.heat[offset]
        else:
            self._hot[page.identity, offset] = page

    def _note_mapped(self, number: int, satp: int, base: int) -> None:
        if len(self._mapped) > _MAPPED:
            self._mapped.clear()
        self._mapped[_space(satp, number), number] = base

    # -- the translator ----------------------------------------------------------------------------------------
    def _connected(self) -> bool:
        if self._sock is not None:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        self._next_try = now + (_RECONNECT_SOON if now - self._begun < _SOON else _RECONNECT)
        try:
            self._sock = fd_passing.connect(self._path)
        except OSError:
            return False  # not there yet, or crashed and not back
        self._arena = self._awaited = 0
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

    def _send_and_wait(self, message: Message) -> bool:
        sent = self._send(message)
        self._awaited += sent
        return sent

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
                if isinstance(message, Hello) and len(fds) == 3:
                    self._begin_arena(message, *fds)
                elif isinstance(message, Assembled):
                    self._assembled(message)
                elif isinstance(message, Regions):
                    self._install(message)
                elif isinstance(message, Answered):
                    self.host = message.host
                    self._awaited = max(0, self._awaited - 1)
                elif isinstance(message, Wanted):
                    self._under_way.pop((message.page, message.offset), None)
                    self._translate((message.page, message.offset), message.numbers, final=True)
                else:
                    self._hang_up()
            finally:
                fd_passing.close_all(fds)

    def _begin_arena(self, hello: Hello, templates: int, regions: int, index: int) -> None:
        """Everything translated so far is void: forget the decoded pages, and the records with them."""
        sizes = [os.fstat(fd).st_size for fd in (templates, regions)]
        if sizes != [self._image.template_bytes, self._image.arena_bytes]:
            self._hang_up()
            return
        with self._machine.quiesce():
            self._machine.forget_decoded()
            self._image.map_templates(templates)
            self._image.map_arena(regions)
            self._machine.state.templates, self._machine.state.regions = self._image.templates, self._image.arena
            self._known.begin(hello.secret, os.pread(index, self._image.arena_bytes, 0))
        same = hello.arena == self._arena  # only template code begins anew
        self._secret, self._arena, self._templates = hello.secret, hello.arena, hello.templates
        self._under_way.clear()
        for page in self._unknown:
            page.asked = False
        self._unknown.clear()
        for page in self._away.values():  # all of them are
            if not same:
                page.heads.clear()
                page.asked = False
            page.patience, page.assembled = 1, 0
        self.cold.begin()
        self._awaited = 0
        self._watch()

    def _watch(self) -> None:
        """Whether a hart comes back when it has decoded a page: something is about to be answered, or to be asked for."""
        self._machine.state.watch = int(not self._secret or self._awaited > 0 or self._counted)

    # -- pages ---------------------------------------------------------------------------------------------------
    def _neighbour(self, place: tuple[int, int, int], number: int) -> int | None:
        """The decoded page so many pages behind one that was seen: by the fetch TLBs of the hart, or as samples saw it."""
        first, satp, blocks = place
        wanted = (first + number) & _NUMBER
        entry = hart_state.FETCH_TLB_OFFSET + (wanted & (hart_state.FETCH_TLB_ENTRIES - 1)) * 16
        for block in range(hart_state.TLB_BANKS * hart_state.TLB_BLOCKS):
            tag, ab = _PAIR.from_address(blocks + block * hart_state.TLB_BLOCK + entry)
            if tag == wanted << 12:
                return int(((tag << 2) + ab - machine_state.PAGE_RECORDS) & _WORD)
        base = self._mapped.get((_space(satp, wanted), wanted))
        return base if base in self._pages else None

    def _page(self, base: int) -> HotPage | None:
        """What is known of a decoded page; the translator is asked about a new one."""
        if not self._secret:
            return None
        page, mark = self._pages.get(base), _mark(base)
        if page is not None and mark == mark_of(page.identity):
            return page
        if page is not None:  # its bytes have changed, or it had to go and another one came
            self._put_away(self._pages.pop(base))
        if not mark:  # a hart has found it changed, and does not use it any more
            return None
        halves = (machine_state.PAGE_IDENTITY, machine_state.PAGE_IDENTITY_END)
        identity = b"".join(ctypes.string_at(base + half, 8) for half in halves)
        page = self._away.pop(identity, None)
        if page is None:
            page = HotPage(base, identity)
            page.heads.update(self._known.heads(identity))
        page.base = base
        self._pages[base] = page
        if not page.heads and not page.asked:
            page.asked = True
            self._unknown.append(page)
        return page

    @staticmethod
    def _content(base: int) -> bytes:
        return ctypes.string_at(base + machine_state.PAGE_COPY, PAGE)

    # -- regions -------------------------------------------------------------------------------------------------
    def _ask(self) -> bool:
        """Have pages that the interpreter runs assembled, and the hottest places translated. Whether there were such pages."""
        self._ask_what_is_known()
        more = self.cold.ask(self._send_and_wait)
        now = time.monotonic()
        for place, since in list(self._under_way.items()):
            if now - since > _PATIENCE:
                del self._under_way[place]
        if len(self._under_way) < AT_ONCE and (not self._queue or now > self._next_queue):  # big programs have thousands
            self._queue = heapq.nlargest(_QUEUE, self._hot, key=lambda hot: self._hot[hot].heat.get(hot[1], 0))[::-1]
            self._next_queue = now + _REORDER
        while self._queue and len(self._under_way) < AT_ONCE:
            hottest = self._queue.pop()
            page, offset = self._hot.pop(hottest, None), hottest[1]
            if page is None or not page.base:
                continue  # it is away: if it comes back and is still hot, its next sample tells
            page.heat.pop(offset, None)
            if offset not in page.heads:
                self._translate((page.base, offset), [], final=False)
        return more

    def _ask_what_is_known(self) -> None:
        pages, self._unknown = self._unknown, []
        for first in range(0, len(pages), MAX_KNOWN):
            some = pages[first : first + MAX_KNOWN]
            if not self._send_and_wait(Known([(page.base, page.identity) for page in some])):
                for page in some:
                    page.asked = False

    def _translate(self, place: tuple[int, int], wanted: list[int], final: bool) -> None:
        base, offset = place
        page = self._pages.get(base)
        if page is None or page.seen is None:
            return
        pages = [(0, self._content(base))]
        for number in wanted[: MAX_PAGES - 1]:
            other = self._neighbour(page.seen, number)
            if number and other is not None and self._page(other) is not None:
                pages.append((number, self._content(other)))
        if self._send(Translate(base, offset, pages, final)):
            self._under_way[place] = time.monotonic()

    def _assembled(self, message: Assembled) -> None:
        """Let the records lead to template code."""
        self.host = message.host
        self._awaited = max(0, self._awaited - 1)  # 0: it was asked for before the memory was a new one
        if message.templates != self._templates:
            return
        self.cold.taken = message.host.templates
        for base, identity, place in message.pages:
            self._known.template(identity, place)
            page = self._pages.get(base)
            if page is not None and self._is(page, identity):
                self.cold.install(page, place)

    @staticmethod
    def _is(page: HotPage, identity: bytes) -> bool:
        """Whether a decoded page still has the bytes that somebody was told of."""
        return page.identity == identity and _mark(page.base) == mark_of(identity)

    def _install(self, message: Regions) -> None:
        """Let the records of the heads lead to the regions."""
        self.host = message.host
        self.nanoseconds += message.took
        self.translated += message.took > 0
        if message.offset >= 0:
            self._under_way.pop((message.page, message.offset), None)
        if message.arena != self._arena:
            return
        for offset, at in message.regions:
            self._known.region(message.identity, offset, at)
        away = self._away.get(message.identity)
        if away is not None:
            away.heads.update(offset for offset, _ in message.regions)
        page = self._pages.get(message.page)
        if page is None or not self._is(page, message.identity):
            return  # it had to go meanwhile, and when it comes back it gets them; or its bytes have changed since
        if message.offset >= 0:
            page.heads.add(message.offset)
        self._ready_made += 0 if message.took else len(message.regions)
        self._put(page, message.regions)

    def _put(self, page: HotPage, regions: list[tuple[int, int]]) -> None:
        content = self._content(page.base)
        for offset, at in regions:
            page.heads.add(offset)
            record = page.base + machine_state.PAGE_RECORDS + offset // 2 * machine_state.RECORD
            operands = self._image.decode(content, offset) & ~_OFFSET
            ctypes.c_uint64.from_address(record).value = operands | (self._image.arena + at)
            self._regions += 1

    # -- for later -------------------------------------------------------------------------------------------------
    def _wish(self) -> None:
        """Tell the translator which pages' regions were of use, and what was seen a few times without being hot."""
        self._next_wishes = time.monotonic() + _WISHES
        used = self._known.used() if self._secret else []
        if used:
            self._send(Used(used))
        self._wish_for(self._pages.values())

    def _wish_for(self, pages: Iterable[HotPage]) -> None:
        if self.host.waiting >= MAX_WAITING:
            return  # it would forget others' wishes
        places = self._seen(pages)
        if places and self._say_later(encode_wishes(self._wishes(places))):
            for page, offset in places:
                page.wished.add(offset)

    @staticmethod
    def _seen(pages: Iterable[HotPage], again: bool = False) -> list[tuple[HotPage, int]]:
        """Places of these decoded pages that were seen a few times and have no region, the most often seen first; `again`: also
        those that were wished for."""
        found = [
            (times, page, offset)
            for page in pages
            for offset, times in page.heat.items()
            if times >= _SEEN and offset not in page.heads and (again or offset not in page.wished)
        ]
        found.sort(key=lambda place: -place[0])
        return [(page, offset) for _, page, offset in found[:MAX_LATER]]

    def _say_later(self, wishes: bytes) -> bool:
        fd = in_memory("softkvm-wishes", wishes)
        try:
            return self._send(Later(), [fd])
        finally:
            os.close(fd)

    def _wishes(self, places: list[tuple[HotPage, int]]) -> Wishes:
        spaces: dict[int, int] = {}
        pages: dict[HotPage, int] = {}
        wishes = Wishes([], [])
        for page, offset in places:
            if page not in pages:
                assert page.seen is not None  # by samples
                number, satp, _ = page.seen
                space = spaces.setdefault(_space(satp, number), len(spaces))
                pages[page] = len(wishes.pages)
                wishes.pages.append((space, number, self._content(page.base)))
            wishes.heads.append((pages[page], offset))
        return wishes

    # -- another host's ----------------------------------------------------------------------------------------
    def hot_elsewhere(self, told: bytes) -> None:
        """What hot_here() says where this VM comes from. Translated as soon as there is a translator; prepare() decodes the
        pages. BadMessage: it makes no sense."""
        elsewhere = decode_elsewhere(told)
        with self._machine.gate:
            self._expected, self._pages_elsewhere = elsewhere.wishes, elsewhere.pages
            if self._connected():
                self._expect()

    def prepare(self) -> None:
        """The guest is about to run for the first time, its memory is there: decode the pages that it has used elsewhere, and
        install what there is of them, for to do so page by page would let it wait."""
        pages, self._pages_elsewhere = self._pages_elsewhere, []
        end = time.monotonic() + _HELLO_SECONDS
        with self._machine.quiesce():
            while pages and self._connected() and not self._secret and time.monotonic() < end:
                self._read()
                time.sleep(_HELLO_PAUSE)
            made = warm_pages.make(self._machine, pages)
            self.came_back(made)

    def _expect(self) -> None:
        wishes, self._expected = self._expected, b""
        if wishes and not self._say_later(wishes):
            self._expected = wishes

    def hot_here(self) -> bytes:
        """Encoded Elsewhere: the pages that are in use; the places that have regions, then those that were seen. b"" if
        there is nothing."""
        if not self._machine.gate.acquire(timeout=0.1):
            return b""
        try:
            heads = [(page, offset) for page in self._pages.values() if page.seen is not None for offset in page.heads]
            places = (heads + self._seen(self._pages.values(), again=True))[:MAX_LATER]
            pages = warm_pages.in_use(self._machine)
            if not pages and not places:
                return b""
            return encode_elsewhere(Elsewhere(pages, encode_wishes(self._wishes(places)) if places else b""))
        finally:
            self._machine.gate.release()


def _mark(base: int) -> int:
    """Of a decoded page."""
    return ctypes.c_uint64.from_address(base + machine_state.PAGE_IDENTITY).value


def _space(satp: int, number: int) -> int:
    """What tells the address space of a virtual page apart: the kernel's half is the same in all of them."""
    return 0 if number >> 51 else satp


_PAIR = ctypes.c_uint64 * 2
_WORD, _NUMBER = (1 << 64) - 1, (1 << 52) - 1
_OFFSET = (1 << 32) - 1
