"""Memory over several channels: frames that need no order among themselves go over whichever is free.

Between two rounds everything has arrived (ROUND goes over each), so a page never overtakes itself. What has an order, and all
of the switch, is the main channel's alone. Used by source.py; what receives them is destination.py's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from qemu_user.migration import messages, steps
from qemu_user.migration.channel import Channel, ChannelError, Payload
from qemu_user.migration.connect import expect

MOST = 16
"""Channels of one migration, the main one included."""
_ANSWER_SECONDS = 60.0
Work = tuple[int, int, int, Payload]
"""Kind, a, b, payload."""


class Spread:
    """`main` is used by who calls send(); each of `more` has a thread, and is ours to close."""

    def __init__(self, main: Channel, more: list[Channel]) -> None:
        self._main, self._more = main, more
        self._work: queue.Queue[Work | None] = queue.Queue(len(more) or 1)
        self._error = ""
        self._threads = [
            threading.Thread(target=self._serve, args=(channel,), name="channel", daemon=True) for channel in more
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, channel: Channel) -> None:
        while (work := self._work.get()) is not None:
            try:
                if not self._error:
                    kind, a, b, payload = work
                    steps.reached("source:extra", channel.cut)
                    channel.send(kind, a, b, payload)
            except ChannelError as error:
                self._error = str(error)
            finally:
                self._work.task_done()

    def send(self, kind: int, a: int, b: int, payload: Payload = b"") -> None:
        """A frame of this round, over the first channel that is free. ChannelError: one of them is broken."""
        self._check()
        try:
            if self._more:
                self._work.put_nowait((kind, a, b, payload))
                return
        except queue.Full:
            pass
        self._main.send(kind, a, b, payload)

    def _check(self) -> None:
        if self._error:
            raise ChannelError(f"one of several connections broke: {self._error}")

    def end_of_round(self, number: int) -> None:
        """Wait until the destination has taken everything."""
        self._work.join()
        self._check()
        channels = [self._main, *self._more]
        for channel in channels:
            channel.send(messages.ROUND, number)
        for channel in channels:
            frame = expect(channel, messages.ROUND, _ANSWER_SECONDS)
            if frame.a != number:
                raise ChannelError("rounds out of step")

    def close(self) -> None:
        """After a round: only the main channel is used from now on. Idempotent; never fails."""
        self._join()
        for channel in self._more:
            try:
                if not self._error:
                    channel.send(messages.DONE)
            except ChannelError:
                pass  # the destination notices that it was not told
            channel.close()
        self._more = []

    def _join(self) -> None:
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []


class Gathered:
    """The destination's side: a thread for each extra channel. `take` deals with a frame of memory; `failed` is called when
    something goes wrong, once."""

    def __init__(self, channels: list[Channel], take: Callable[[Channel], bool], failed: Callable[[], None]) -> None:
        self._channels, self._take, self._failed = channels, take, failed
        self.error: Exception | None = None
        self._threads = [
            threading.Thread(target=self._serve, args=(channel,), name="channel", daemon=True) for channel in channels
        ]
        for thread in self._threads:
            thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            while self._take(channel):
                pass
        except Exception as error:
            if self.error is None:
                self.error = error
                self._failed()
        finally:
            channel.close()

    def finish(self, seconds: float) -> None:
        """The state has come: they have been told so before. ChannelError: they have not."""
        for thread in self._threads:
            thread.join(seconds)
            if thread.is_alive():
                raise ChannelError("memory is still coming over another connection")
        if self.error is not None:
            raise ChannelError(f"one of several connections broke: {self.error}")

    def close(self) -> None:
        """It is over: threads that still wait end. Idempotent."""
        for channel, thread in zip(self._channels, self._threads, strict=True):
            if thread.is_alive():
                self.error = self.error or ChannelError("given up")
                try:
                    channel.cut()
                except OSError:
                    pass  # it is closed at this moment
