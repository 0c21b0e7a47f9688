"""A connection that was lost during post-copy, made again: the VM runs here and part of its memory there, so neither side may
give up. The source calls; the destination waits where it has said that it would (Accept.recover) and lets only the source of
this very move in again. A piece that was asked for and did not come is asked for again: memory that has come is never replaced.

Source: Caller.again(). Destination: Door.again(). Both ask the other's journal, on one machine, whether it still lives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from protocol.channel import fd_passing
from qemu_user.management.registry import made_runtime_directory
from qemu_user.migration import messages
from qemu_user.migration.channel import Channel, ChannelError, StreamChannel, ZmqChannel

RETRY_SECONDS = 0.2
_ANSWER_SECONDS = 5.0


class Hopeless(Exception):
    """The other side is dead, or has given up."""


class Door:
    """The destination's side. `uuid` and `generation` name the move."""

    def __init__(
        self, channel: Channel, uuid: str, generation: int, listener: socket.socket | None = None, path: str = ""
    ) -> None:
        """`listener`, at `path`: the one of a device process that has died. OSError."""
        self._channel, self._uuid, self._generation = channel, uuid, generation
        self._listener = listener
        self.path = path
        """Where the source is to call; "" over tcp, where it calls as before."""
        if listener is not None:
            listener.settimeout(RETRY_SECONDS)
        elif isinstance(channel, StreamChannel):
            own = made_runtime_directory() / f"recover-{os.getpid()}.sock"
            own.unlink(missing_ok=True)
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(str(own))
            self._listener.listen(1)
            self._listener.settimeout(RETRY_SECONDS)
            self.path = str(own)

    def descriptors(self) -> list[int]:
        """What it listens on, for who opens it when we have died."""
        return [self._listener.fileno()] if self._listener is not None else []

    def again(self, gone: Callable[[], bool], seconds: float | None = None) -> None:
        """Wait until the source has called; the channel works as before then. Hopeless: it is `gone`, or has not called in
        time.
        """
        end = None if seconds is None else time.monotonic() + seconds
        while not self._answered():
            if gone():
                raise Hopeless("the source of the migration has died with memory that had not come yet")
            if end is not None and time.monotonic() > end:
                raise Hopeless("the source of the migration does not call again")

    def _answered(self) -> bool:
        channel = self._channel
        try:
            if isinstance(channel, StreamChannel):
                assert self._listener is not None
                connection, _ = self._listener.accept()
                if fd_passing.credentials(connection).uid not in (0, os.geteuid()):
                    connection.close()
                    return False
                channel.renew(connection)
            elif isinstance(channel, ZmqChannel):
                channel.renew()
            frame = channel.receive(RETRY_SECONDS)
            if frame is None or frame.kind != messages.RESUME:
                return False
            if frame.a != self._generation or channel.read() != self._uuid.encode():
                raise ChannelError("another move than this one")
            channel.send(messages.RESUMED, self._generation)
            return True
        except TimeoutError:
            return False
        except (ChannelError, OSError):
            time.sleep(RETRY_SECONDS)
            return False

    def close(self) -> None:
        """Nobody needs to call any more. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                os.unlink(self.path)


class Caller:
    """The source's side. `path`: where the destination waits; "": `redial` makes a new connection (tcp)."""

    def __init__(self, path: str, redial: Callable[[], Channel] | None, uuid: str, generation: int) -> None:
        self._path, self._redial, self._uuid, self._generation = path, redial, uuid, generation

    def again(self) -> Channel | None:
        """A new channel to the same destination; None: not now. Hopeless: there is nobody any more."""
        try:
            channel = self._connect()
        except ChannelError:
            return None
        try:
            channel.send(messages.RESUME, self._generation, payload=self._uuid.encode())
            frame = channel.receive(_ANSWER_SECONDS)
            if frame is not None and frame.kind == messages.RESUMED and frame.a == self._generation:
                return channel
        except ChannelError:
            pass
        channel.close()
        return None

    def _connect(self) -> Channel:
        if self._redial is not None:
            return self._redial()
        if not Path(self._path).is_socket():
            raise Hopeless("the destination has ended, or has everything")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)  # where nobody accepts, as its device process has died and its VM has not, it is busy
        try:
            sock.connect(self._path)
        except ConnectionRefusedError as error:
            sock.close()
            raise Hopeless("the destination has died, and the VM with it") from error
        except OSError as error:
            sock.close()
            raise ChannelError(str(error)) from error
        return StreamChannel(sock)
