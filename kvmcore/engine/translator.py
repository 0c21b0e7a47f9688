"""The translator: one process per host that makes machine code of the hot regions of all its VMs.

Run by kvmcore/server/translator.py. VM processes connect; each gets the arena, a sealed
memfd that only this process can write. The main thread answers what is known, a second one compiles (LLVM works with
the GIL released). A crash costs speed, not VMs. The only process that imports LLVM while VMs run.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from kvmcore.engine.code_cache import CodeCache, secret
from kvmcore.engine.code_memory import CodeMemory
from kvmcore.engine.idle_translator import Answer, IdleWork, Request, Wish
from kvmcore.engine.loader import ARENA_BYTES, Image
from kvmcore.engine.regions import Code, discover
from kvmcore.engine.template_code import Assembler, TemplateMemory
from kvmcore.engine.translation import (
    ENTRY,
    MAX_ASSEMBLED,
    MAX_KNOWN,
    MAX_PAGES,
    PAGE,
    WANTED,
    Answered,
    Assemble,
    Assembled,
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
    decode_wishes,
    identity_of,
    in_memory,
    mark_of,
    receive,
    send,
)

log = logging.getLogger("kvmcore.translator")

#: Requests of one VM that may wait; more are dropped, the VM asks again.
_WAITING = 64
_ALIGN = 64
#: Bytes of code that the first arena begins with; the rest is for what is new.
_FROM_BEFORE = ARENA_BYTES // 2
#: Seconds that the thread which compiles may keep the one that answers from running: a VM's page waits for template code.
_SWITCH = 0.0002
#: Of the thread that compiles: guests and their devices go first where there are not enough cores for all.
_NICE = 5


class Arena:
    """Finished code. Sealed against writing by anybody who maps it later."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.memory = CodeMemory(f"softkvm-regions-{number}", ARENA_BYTES, large=False)
        self.used = 0
        self.placed: dict[bytes, dict[int, int]] = {}

    def place(self, identity: bytes, offset: int, code: bytes) -> bool:
        """Put a region's code in; False when it is full."""
        if not code:
            return True
        if self.used + len(code) > ARENA_BYTES:
            return False
        self.memory.write(self.used, code)
        self.placed.setdefault(identity, {})[offset] = self.used
        self.used = -(-(self.used + len(code)) // _ALIGN) * _ALIGN
        return True

    def index(self) -> bytes:
        """What is in it, as ENTRY after ENTRY."""
        return b"".join(
            ENTRY.pack(identity, offset, at) for identity, heads in self.placed.items() for offset, at in heads.items()
        )


@dataclass(eq=False)
class Client:
    """A connected VM process."""

    sock: socket.socket
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """A region that a VM has asked for. `behind`: nobody has, but another one was cut there (Region.cut)."""

    client: Client
    message: Translate
    code: Code
    identities: dict[int, bytes]
    behind: bool = False


class Translator:
    """The whole of it. serve() runs until the process is killed."""

    def __init__(self, path: str, waiting: mmap.mmap | None = None) -> None:
        """`waiting`: 8 bytes, always how many regions have yet to be translated (little-endian)."""
        self._shown = waiting
        engine = Image.load()
        self._offsets = engine.functions
        self._assembler = Assembler(engine)
        self._templates = TemplateMemory(1, self._assembler)
        self._secret = secret()
        self._cache = CodeCache(self._secret)
        self._asked: dict[bytes, dict[int, bytes]] = {}
        self._arena = Arena(1)
        for identity, offset, code in self._cache.recent(_FROM_BEFORE):
            self._arena.place(identity, offset, code)
        self._clients: set[Client] = set()
        self._work: queue.Queue[Work] = queue.Queue()
        self._done: queue.Queue[tuple[Work, Answer, int]] = queue.Queue()
        self._compiled = self._nanoseconds = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._idle = IdleWork(self._selector, self._offsets, self._prepare, self._finished_idly)
        self._last_hot = 0.0
        with suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen(128)
        self._listener.setblocking(False)

    def serve(self) -> None:
        sys.setswitchinterval(_SWITCH)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._finished)
        threading.Thread(target=self._compile_for_ever, name="compiler", daemon=True).start()
        while True:
            timeout = self._idle.next(time.monotonic() - self._last_hot)
            if self._shown is not None:
                self._shown[:] = self._waiting.to_bytes(len(self._shown), "little")
            for key, _ in self._selector.select(timeout):
                key.data()

    @property
    def _totals(self) -> Totals:
        return Totals(self._compiled, self._nanoseconds, self._waiting, self._arena.used, self._templates.used)

    @property
    def _waiting(self) -> int:
        return self._work.qsize() + len(self._idle)

    # -- clients -----------------------------------------------------------------------------------------------
    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            log.warning("no connection taken: %s", error)
            return
        client = Client(sock)
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(client))
        self._greet(client)

    def _greet(self, client: Client) -> None:
        templates = self._templates.index()
        index = in_memory("softkvm-index", self._arena.index() + templates)
        try:
            hello = Hello(self._secret, self._arena.number, self._templates.number)
            self._send(client, hello, [self._templates.memory.fd, self._arena.memory.fd, index])
        finally:
            os.close(index)

    def _send(self, client: Client, message: Message, fds: list[int] | None = None) -> None:
        try:
            send(client.sock, message, fds)
        except OSError:  # gone, or not reading: a VM that gets no regions runs without
            if isinstance(message, Hello):
                self._drop(client)

    def _drop(self, client: Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._selector.unregister(client.sock)
            client.sock.close()

    def _serve(self, client: Client) -> None:
        try:
            message, fds = receive(client.sock)
        except BlockingIOError:
            return
        except (OSError, BadMessage):
            self._drop(client)
            return
        try:
            self._take(client, message, fds)
        except BadMessage as error:
            log.warning("a VM process is not answered any more: %s", error)
            self._drop(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _take(self, client: Client, message: Message | None, fds: list[int]) -> None:
        if isinstance(message, Known) and len(message.pages) <= MAX_KNOWN:
            self._known(client, message)
        elif isinstance(message, Used):
            self._cache.used(message.identities)
        elif isinstance(message, Later) and len(fds) == 1:
            self._later(fds[0])
        elif isinstance(message, Translate) and self._sound(message):
            self._translate(client, message)
        elif isinstance(message, Assemble) and len(message.pages) <= MAX_ASSEMBLED:
            self._assemble(client, message)
        else:
            self._drop(client)

    @staticmethod
    def _sound(message: Translate) -> bool:
        numbers = [number for number, _ in message.pages]
        return (
            0 < len(numbers) <= MAX_PAGES
            and numbers[0] == 0
            and len(set(numbers)) == len(numbers)
            and all(len(content) == PAGE for _, content in message.pages)
            and 0 <= message.offset < PAGE
            and message.offset % 2 == 0
        )

    def _assemble(self, client: Client, message: Assemble) -> None:
        """Some 50 us a page."""
        placed = []
        for page, content, wanted in message.pages:
            if len(content) != PAGE or len(wanted) != WANTED:
                raise BadMessage("pages that there cannot be")
            identity = identity_of(self._secret, content)
            found = self._templates.place(identity, content, int.from_bytes(wanted, "little"))
            if found is None:
                old, self._templates = self._templates, TemplateMemory(self._templates.number + 1, self._assembler)
                old.memory.close()
                self._greet_all()
                return
            placed.append((page, identity, found.place))
        self._send(client, Assembled(self._templates.number, placed, self._totals))

    def _known(self, client: Client, message: Known) -> None:
        for page, identity in message.pages:
            for offset, code in self._kept(identity).items():
                if offset not in self._arena.placed.get(identity, {}) and not self._place(identity, offset, code):
                    return
            if self._arena.placed.get(identity):
                self._answer(client, page, identity, -1)
        self._send(client, Answered(self._totals))

    def _kept(self, identity: bytes) -> dict[int, bytes]:
        if identity not in self._asked:
            self._asked[identity] = self._cache.find(identity)
        return self._asked[identity]

    def _answer(self, client: Client, page: int, identity: bytes, offset: int, took: int = 0) -> None:
        regions = list(self._arena.placed.get(identity, {}).items())
        if offset >= 0:
            regions = [(head, at) for head, at in regions if head == offset]
        self._send(client, Regions(page, identity, self._arena.number, offset, regions, took, self._totals))

    def _translate(self, client: Client, message: Translate) -> None:
        identities = {number: identity_of(self._secret, content) for number, content in message.pages}
        known = self._kept(identities[0])
        if message.offset in known:
            if self._place(identities[0], message.offset, known[message.offset]):
                self._answer(client, message.page, identities[0], message.offset)
            return
        code = Code(dict(message.pages), message.offset)
        if not message.final:
            discover(code)
            if code.wanted:
                numbers = sorted(code.wanted, key=abs)[: MAX_PAGES - len(message.pages)]
                self._send(client, Wanted(message.page, message.offset, numbers))
                return
        if client.waiting < _WAITING:
            client.waiting += 1
            self._last_hot = time.monotonic()
            self._work.put(Work(client, message, code, identities))

    def _later(self, fd: int) -> None:
        """What a VM wishes for others."""
        wishes = decode_wishes(fd)
        spaces: dict[int, dict[int, bytes]] = {}
        for space, number, content in wishes.pages:
            spaces.setdefault(space, {})[number] = content
        for index, offset in wishes.heads:
            space, number, _ = wishes.pages[index]
            self._idle.add(Wish(spaces[space], number, offset))

    def _prepare(self, wish: Wish) -> tuple[bytes, Request] | None:
        """What the process for idle time is to do; None when it is done already. Takes some milliseconds."""
        identity = identity_of(self._secret, wish.pages[wish.number])
        if wish.offset in self._kept(identity):
            return None
        code = Code({0: wish.pages[wish.number]}, wish.offset)
        discover(code)
        others = [delta for delta in sorted(code.wanted, key=abs) if wish.number + delta in wish.pages]
        pages = {delta: wish.pages[wish.number + delta] for delta in (0, *others[: MAX_PAGES - 1])}
        marks = {delta: mark_of(identity_of(self._secret, content)) for delta, content in pages.items()}
        return identity, Request(wish.offset, pages, marks, wish.behind)

    def _finished_idly(self, identity: bytes, offset: int, code: bytes) -> None:
        """For VMs to come: it is placed while there is room, and kept in any case."""
        if offset in self._kept(identity):
            return
        self._kept(identity)[offset] = code
        self._cache.store(identity, offset, code)
        if self._arena.used < _FROM_BEFORE:
            self._arena.place(identity, offset, code)

    # -- compiling -----------------------------------------------------------------------------------------------
    def _compile_for_ever(self) -> None:
        """The second thread. A region that cannot be compiled is one that the interpreter keeps."""
        os.nice(_NICE)  # Linux: of this thread alone
        while True:
            work = self._work.get()
            answer, begun = Answer(), time.thread_time_ns()
            try:
                region = discover(work.code, behind=work.behind)
                if region is not None:
                    from kvmcore.engine.region_compiler import compile_region  # LLVM, at the first hot region

                    marks = {number: mark_of(identity) for number, identity in work.identities.items()}
                    answer = Answer(compile_region(work.code, region, self._offsets, marks), region.cut)
            except Exception:
                log.exception("a region at offset %#x of its page is not translated", work.message.offset)
            self._done.put((work, answer, time.thread_time_ns() - begun))
            os.write(self._wake_write, b"x")

    def _finished(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while True:
            try:
                work, answer, took = self._done.get_nowait()
            except queue.Empty:
                return
            client, message, identity = work.client, work.message, work.identities[0]
            client.waiting -= 1
            self._compiled += 1
            self._nanoseconds += took
            self._last_hot = time.monotonic()
            self._kept(identity)[message.offset] = answer.code
            self._cache.store(identity, message.offset, answer.code)
            if self._place(identity, message.offset, answer.code):
                self._answer(client, message.page, identity, message.offset, took)
            if answer.cut is not None:
                self._go_on(work, message.offset + answer.cut)

    def _go_on(self, work: Work, at: int) -> None:
        """Straight code that goes on behind a region: in the same page for the one who has asked, else for VMs to come."""
        client, message = work.client, work.message
        if not 0 <= at < PAGE:
            self._idle.add_behind(dict(message.pages), 0, at)
        elif at not in self._kept(work.identities[0]) and client in self._clients and client.waiting < _WAITING:
            client.waiting += 1
            more = Translate(message.page, at, message.pages, final=True)
            self._work.put(Work(client, more, Code(dict(message.pages), at), work.identities, behind=True))

    def _place(self, identity: bytes, offset: int, code: bytes) -> bool:
        """Into the arena; a full one is left to those who use it, and everybody is given a new one (False)."""
        if offset in self._arena.placed.get(identity, {}) or self._arena.place(identity, offset, code):
            return True
        old, self._arena = self._arena, Arena(self._arena.number + 1)
        old.memory.close()
        self._asked.clear()
        self._greet_all()
        return False

    def _greet_all(self) -> None:
        for client in list(self._clients):
            self._greet(client)
