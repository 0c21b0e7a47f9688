"""Translation of what is not hot, for VMs to come: a process that runs only when the host has nothing else to do.

`IdleWork` is the translator's hold on it: a bounded list, one request under way at a time, begun when no hot region was
asked for lately. The process (`work`) has the lowest priority there is, imports LLVM, and ends when the list is empty. It
is one of its own because LLVM in Python compiles one thing at a time: a hot region must not wait for a slow thread.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvmcore.engine.regions import PAGE, Code, discover
from kvmcore.engine.translation import MAX_WAITING

log = logging.getLogger("kvmcore.translator")

#: Seconds without a hot region before it begins.
_PAUSE = 1.0
_MAX_PACKET = 192 << 10
#: Ends of the process in a row after which nothing more is tried with what waits.
_MOST_FAILURES = 3
Done = Callable[[bytes, int, bytes], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """A place that may be translated: its page's number, its offset there, and pages that it may go on in, by number.
    `behind`: another region was cut there."""

    pages: Mapping[int, bytes]
    number: int
    offset: int
    behind: bool = False


class Request(msgspec.Struct, array_like=True):
    """Pages by number, the head's being 0, their marks, and the head's offset."""

    offset: int
    pages: dict[int, bytes]
    marks: dict[int, int]
    behind: bool


class Answer(msgspec.Struct, array_like=True):
    """The region's code, b"" if there is none, and where straight code goes on behind it (Region.cut)."""

    code: bytes = b""
    cut: int | None = None


class IdleWork:
    """`prepare` makes a request of a wish when its turn has come, with the identity of its page, or says that it is done;
    `done` gets (identity, offset, code). Both on the selector's thread."""

    def __init__(
        self,
        selector: selectors.BaseSelector,
        offsets: Mapping[str, int],
        prepare: Callable[[Wish], tuple[bytes, Request] | None],
        done: Done,
    ) -> None:
        self._selector, self._offsets, self._prepare, self._done = selector, offsets, prepare, done
        self._waiting: deque[Wish] = deque()
        self._under_way: tuple[Wish, bytes] | None = None
        self._failures = 0
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __len__(self) -> int:
        return len(self._waiting) + (self._under_way is not None)

    def add(self, wish: Wish) -> None:
        """One more, at the end; forgotten when there are too many."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(wish)

    def add_behind(self, pages: Mapping[int, bytes], number: int, at: int) -> None:
        """One more, `at` bytes behind the beginning of page `number`, if that page is at hand."""
        number += at // PAGE
        if number in pages:
            self.add(Wish(pages, number, at % PAGE, behind=True))

    def next(self, quiet: float) -> float | None:
        """Begin the next one if there was `quiet` enough; seconds after which to call again, None if nothing waits."""
        if self._under_way is not None:
            return None
        if not self._waiting:
            self._end()
            return None
        if quiet < _PAUSE:
            return _PAUSE - quiet
        wish = self._waiting.popleft()
        prepared = self._prepare(wish)
        if prepared is None:
            return 0.0
        identity, request = prepared
        self._under_way = wish, identity
        try:
            self._start()
            assert self._socket is not None
            self._socket.send(msgspec.msgpack.encode(request))
        except OSError as error:
            log.warning("nothing is translated in idle time: %s", error)
            self._give_up()
        return None

    def _start(self) -> None:
        if self._process is not None:
            return
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _MAX_PACKET)
        with theirs:
            command = [sys.executable, "-m", "kvmcore.server.translator", "--idle", str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
            )
            self._socket.send(msgspec.msgpack.encode(dict(self._offsets)))
        self._selector.register(self._socket, selectors.EVENT_READ, self._answered)

    def _answered(self) -> None:
        assert self._socket is not None
        try:
            answer = self._socket.recv(1 << 20)
        except OSError:
            answer = b""
        if not answer or self._under_way is None:
            log.warning("the process for idle time has ended; what it was at is left out")
            self._failures += 1
            self._give_up(all_of_it=self._failures >= _MOST_FAILURES)
            return
        self._failures = 0
        (wish, identity), self._under_way = self._under_way, None
        region = msgspec.msgpack.decode(answer, type=Answer)
        self._done(identity, wish.offset, region.code)
        if region.cut is not None:
            self.add_behind(wish.pages, wish.number, wish.offset + region.cut)

    def _give_up(self, all_of_it: bool = True) -> None:
        self._under_way = None
        if all_of_it:
            self._waiting.clear()
        self._end()

    def _end(self) -> None:
        if self._socket is not None:
            if self._process is not None:
                self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def work(fd: int) -> None:
    """In the process: translate what comes over the socket `fd` until that is closed."""
    from kvmcore.engine.region_compiler import compile_region

    os.nice(19)
    with suppress(OSError):  # some sandboxes forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with suppress(OSError):  # where the host has autogroups (sched(7)) niceness counts within a session only
        os.setsid()
        Path("/proc/self/autogroup").write_text("19")
    sock = socket.socket(fileno=fd)
    offsets = msgspec.msgpack.decode(sock.recv(1 << 20), type=dict[str, int])
    while data := sock.recv(2 * _MAX_PACKET):
        request = msgspec.msgpack.decode(data, type=Request)
        code = Code(request.pages, request.offset)
        answer = Answer()
        try:
            region = discover(code, behind=request.behind)
            if region is not None:
                answer = Answer(compile_region(code, region, offsets, request.marks), region.cut)
        except Exception:
            log.exception("a region at offset %#x of its page is not translated", request.offset)
        sock.send(msgspec.msgpack.encode(answer))
