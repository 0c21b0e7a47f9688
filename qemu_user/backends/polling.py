"""Polling: for some microseconds after it has served a queue an I/O thread looks whether the driver has put more into it,
instead of being called and woken for it (QEMU's poll-max-ns, vhost-net's busyloop_timeout).

It looks without the GIL, by code that kvmcore gives (protocol/channel/vdso.py). Looks in vain are paid out of a budget,
so that they cost a part of a core at most, and next to nothing when there is little to do; a look during which somebody
else had the core is dearer. Used by io_loop.py, fed by devices/virtio/transport.py.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from protocol.channel.vdso import CHANGED, CROWDED, GATHERED, IN_VAIN, WANTED, Vdso

LONGEST_US, SETTLE_US, GAP_US, GATHER_US = 50.0, 5.0, 37.0, 1000.0
"""How long it looks; after how much of that drivers are told of what has been answered; how long others may have the core; how
long output that was taken (devices/virtio/drain.py) may wait for more."""
SHARE = 0.5
"""Of a core, for looks in vain."""
_MOST_SECONDS = 0.005
"""What can be saved of that share."""
_VAIN_SECONDS, _CROWDED_SECONDS = LONGEST_US * 1e-6, 0.001
_MOST_WORDS = 16
Callback = Callable[[], None]
Pace = tuple[int, int, int, int]
DrainCall = Callable[[Vdso, Pace, int, int], int | None]


class Watched:
    """A queue that may be looked at. `serve`: there is more; `settle`: nothing for a while; `rest`: the look is over, the
    driver has to call. `drain`, if it is the only one: takes what there is without Python (transport.py), and says why it has
    stopped, as the code's drain(); None: it cannot now. All are called on the I/O thread.
    """

    __slots__ = ("address", "drain", "known", "rest", "serve", "settle")

    def __init__(self, serve: Callback, settle: Callback, rest: Callback, drain: DrainCall | None = None) -> None:
        self.serve, self.settle, self.rest, self.drain = serve, settle, rest, drain
        self.address = self.known = 0
        """Of a u16 in memory that stays, and what it is when there is nothing new."""

    @property
    def changed(self) -> bool:
        return ctypes.c_uint16.from_address(self.address).value != self.known


class Poller:
    """Of one I/O thread. `code`: kvmcore's; None: it cannot be had, and nobody polls."""

    def __init__(self, code: Vdso | None) -> None:
        self._code = code
        self._budget, self._at = 0.0, time.monotonic()
        self._watched: list[Watched] = []
        self.streaming = False
        """Whether the last look found something: there is much to do."""
        self.drained = False
        """Whether it was no mere look: time has gone by."""
        self._bell = ctypes.c_uint16(0)
        self._state = (ctypes.c_uint64 * (3 + 2 * _MOST_WORDS))()
        self._address = ctypes.addressof(self._state)
        if code is not None:
            self._ticks = [int(us * code.ticks_per_us) for us in (SETTLE_US, LONGEST_US - SETTLE_US)]
            idle, gap, settle, longest = (int(us * code.ticks_per_us) for us in (LONGEST_US, GAP_US, SETTLE_US, GATHER_US))
            self._pace = idle, gap, settle, longest
            self._state[1] = int(GAP_US * code.ticks_per_us)
            self._state[3] = ctypes.addressof(self._bell)

    @property
    def watching(self) -> bool:
        """Whether there are queues to look at."""
        return bool(self._watched)

    def ring(self) -> None:
        """Ends a look. Any thread."""
        self._bell.value = (self._bell.value + 1) & 0xFFFF

    def watch(self, queue: Watched, address: int, known: int) -> bool:
        """Look at `queue` when this turn is over; False: that cannot be afforded now."""
        if self._code is None or len(self._watched) >= _MOST_WORDS - 1:
            return False
        now = time.monotonic()
        self._budget = min(_MOST_SECONDS, self._budget + SHARE * (now - self._at))
        self._at = now
        if self._budget < 0:
            self.streaming = False
            return False
        queue.address, queue.known = address, known
        if queue not in self._watched:
            self._watched.append(queue)
        return True

    def look(self) -> list[Callback]:
        """Look; what is to be called then. Queues that are not served are watched on, or rest."""
        watched, bell = self._watched, self._bell.value
        drained = self._drain(watched[0], bell) if len(watched) == 1 else None
        self.drained = drained is not None
        if drained is not None:
            outcome = drained
        else:
            outcome = self._spin(watched, bell, self._ticks[0])
            if outcome == IN_VAIN:
                for queue in watched:
                    queue.settle()
                outcome = self._spin(watched, bell, self._ticks[1])
        self.streaming = outcome in (CHANGED, GATHERED)
        if outcome == GATHERED:
            return []
        if outcome == CHANGED:
            changed = [queue for queue in watched if queue.changed]
            self._watched = [queue for queue in watched if queue not in changed]
            return [queue.serve for queue in changed]
        self._budget -= _CROWDED_SECONDS if outcome == CROWDED else _VAIN_SECONDS
        self._watched = []
        return [queue.rest for queue in watched]

    def _drain(self, queue: Watched, bell: int) -> int | None:
        code, outcome = self._code, None
        if queue.drain is not None and code is not None:
            while (outcome := queue.drain(code, self._pace, ctypes.addressof(self._bell), bell)) == WANTED:
                queue.settle()
        return outcome

    def _spin(self, watched: list[Watched], bell: int, ticks: int) -> int:
        assert self._code is not None
        state = self._state
        state[0], state[2], state[4] = ticks, 1 + len(watched), bell
        at = 5
        for queue in watched:
            state[at], state[at + 1] = queue.address, queue.known
            at += 2
        return int(self._code.watch(self._address))
