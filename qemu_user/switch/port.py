"""A port: what is plugged into the switch, its settings, counters, and the bounded queue of what goes out.

Frames cross the switch as pieces of "framed" memory, each frame behind its length in 4 bytes (protocol/codec/ethernet_stream),
with a virtio-net header in front where `header` says so. put() takes what flush() writes at the end of a batch; what the other
side does not take waits in a queue of QUEUE_BYTES, and what does not fit there is dropped and counted: nobody waits for
anybody.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qemu_user.backends.io_loop import IoLoop
from qemu_user.switch.settings import PortSettings
from qemu_user.switch.token_bucket import TokenBucket

if TYPE_CHECKING:
    from qemu_user.switch.capture import Capture
    from qemu_user.switch.forwarding import Decision

Piece = bytes | bytearray | memoryview
QUEUE_BYTES = 1 << 20
"""Of frames that wait for who is plugged in; one batch more at most."""
COUNTERS = (
    "rx_frames", "rx_bytes", "rx_broken", "rx_refused", "tx_frames", "tx_bytes", "tx_dropped", "tx_dropped_bytes",
)  # fmt: skip
"""rx: from who is plugged in. broken: no Ethernet frame, or a header that does not fit; refused: of a VLAN that is not the
port's. dropped: the queue was full."""
LENGTH = struct.Struct(">I")


class Port:
    """Subclasses say where frames come from and go to: start(), _emit(), _await_room(), _readable(), _hang_up()."""

    kind = "none"
    header = False
    """Whether frames carry virtio-net headers, either way."""
    is_link = False
    """Whether another switch is there."""

    def __init__(self, name: str, settings: PortSettings, loop: IoLoop) -> None:
        self.name, self.loop = name, loop
        self.number = 0
        """Given by the switch."""
        self.is_up = False
        self.decisions: dict[bytes, Decision] = {}
        self.captures: list[Capture] = []
        self.forward: Callable[[Port, memoryview, int, int], int] = lambda port, view, start, end: end
        """Set by the switch: what came in, framed; where its incomplete rest begins."""
        self.gone: Callable[[Port], None] = lambda port: None
        self.changed: Callable[[Port], None] = lambda port: None
        """It is up, or down, now."""
        self.rx_frames = self.rx_bytes = self.rx_broken = self.rx_refused = 0
        self.tx_frames = self.tx_bytes = self.tx_dropped = self.tx_dropped_bytes = 0
        self._now: list[Piece] = []
        self._queue: deque[tuple[Piece, int]] = deque()
        """(whole frames, how many)."""
        self.queued_bytes = 0
        self._paused = self._shaping = False
        self._fd = -1
        """What frames are read from; -1 when there is nothing."""
        self.configure(settings)

    def configure(self, settings: PortSettings) -> None:
        """New settings, now."""
        now = time.monotonic()
        self.settings = settings
        self.decisions.clear()
        self._bucket_in = TokenBucket(settings.rate_in, settings.burst, now) if settings.rate_in else None
        self._bucket_out = TokenBucket(settings.rate_out, settings.burst, now) if settings.rate_out else None

    def start(self) -> None:
        """Open what there is to open. BackendError."""

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._now.clear()
        self._queue.clear()
        self.queued_bytes = 0
        self.is_up = False

    @property
    def peer(self) -> str:
        """Who is there, for people."""
        return ""

    def counters(self) -> dict[str, int]:
        """By the names in COUNTERS."""
        return {name: getattr(self, name) for name in COUNTERS}

    # -- in ----------------------------------------------------------------------------------------

    def came(self, length: int) -> None:
        """So many bytes came in: where the rate is limited, none are read for a while."""
        if self._bucket_in is not None and (wait := self._bucket_in.take(length, time.monotonic())):
            self._paused = True
            self._rest()
            self.loop.call_later(wait, self._go_on)

    def _go_on(self) -> None:
        self._paused = False
        if self.is_up:
            self._listen()

    def _listen(self) -> None:
        if self._fd >= 0:
            self.loop.add_reader(self._fd, self._readable)

    def _rest(self) -> None:
        if self._fd >= 0:
            self.loop.remove_reader(self._fd)

    def _readable(self) -> None:
        """Something is there to be read from `_fd`."""

    # -- out ---------------------------------------------------------------------------------------

    def put(self, pieces: Sequence[Piece], length: int, frames: int) -> None:
        """Frames to go out at flush(), `length` bytes in all. The pieces are good until then."""
        if not self.is_up:
            return
        if self._queue or self._bucket_out is not None:
            if self.queued_bytes >= QUEUE_BYTES:
                self.tx_dropped += frames
                self.tx_dropped_bytes += length - 4 * frames
                return
            self._wait(pieces, length, frames)
        else:
            self._now += pieces
        self.tx_frames += frames
        self.tx_bytes += length - 4 * frames

    def _wait(self, pieces: Sequence[Piece], length: int, frames: int) -> None:
        if self._bucket_out is not None and frames > 1:
            for frame in split(pieces):
                self._queue.append((b"".join((LENGTH.pack(sum(map(len, frame))), *frame)), 1))
        else:
            self._queue.append((b"".join(pieces), frames))
        self.queued_bytes += length

    def flush(self) -> None:
        """Write what put() was given."""
        if self._now:
            now, self._now = self._now, []
            if rest := self._emit(now):
                self._queue.append((rest, 0))
                self.queued_bytes += len(rest)
                self._await_room()
        elif self._bucket_out is not None and not self._shaping:
            self.drain()

    def drain(self) -> None:
        """There is room again, or time has passed: write what waits."""
        while self._queue and self.is_up:
            if self._bucket_out is not None and (wait := self._bucket_out.wait(time.monotonic())):
                self._shaping = True
                self.loop.call_later(wait, self._shaped)
                return
            data, frames = self._queue.popleft()
            rest = self._emit([data])
            self.queued_bytes -= len(data) - len(rest)
            if self._bucket_out is not None:
                self._bucket_out.take(len(data) - len(rest), time.monotonic())
            if rest:
                self._queue.appendleft((rest, frames))
                self._await_room()
                return
        if not self._queue:
            self.queued_bytes = 0

    def _shaped(self) -> None:
        self._shaping = False
        self.drain()

    def _emit(self, pieces: list[Piece]) -> bytes:
        """Write what goes without blocking; what did not go, framed."""
        return b""

    def _await_room(self) -> None:
        """Call drain() when the other side takes more."""


def split(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The frames (without their length words) in framed pieces: every frame begins in a piece with its whole length word, and
    lies either in one piece or has its last bytes at a piece's end."""
    at = 0
    while at < len(pieces):
        piece = memoryview(pieces[at])
        at += 1
        while len(piece):
            (length,) = LENGTH.unpack_from(piece, 0)
            if 4 + length <= len(piece):
                yield [piece[4 : 4 + length]]
                piece = piece[4 + length :]
                continue
            frame: list[Piece] = [piece[4:]]
            missing = 4 + length - len(piece)
            while missing > 0:
                frame.append(pieces[at])
                missing -= len(pieces[at])
                at += 1
            yield frame
            break
