"""The guest's console, shared: several devices on one side, several terminals on the other, with a
scrollback.

The UART, hvc0 and SBI's debug console each get a channel; our own terminal and whoever attaches to
console.sock are the terminals. All see all output and all may type; what is typed goes to the device that wrote last, for
that is where the prompt is; the window's size is that of the terminal that changed last. Terminals hold the guest back; an
attached one that takes nothing for STALL_SECONDS is dropped.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time

from qemu_user.backends.chardev.attach import FrameError, FrameReader
from qemu_user.backends.chardev.chardev import LAST_LIMIT, Chardev, Frontend, NoFrontend
from qemu_user.backends.chardev.descriptor import DescriptorChardev
from qemu_user.backends.io_loop import IoLoop
from qemu_user.backends.unix_address import listen_unix

SCROLLBACK = 64 * 1024
STALL_SECONDS = 2.0


class Channel(Chardev):
    """A device's side of the hub."""

    def __init__(self, hub: Hub, name: str) -> None:
        super().__init__(name)
        self._hub = hub

    def write(self, data: bytes | bytearray | memoryview, last: bool = False) -> int:
        return self._hub.output(self, data, last)

    def room(self, last: bool = False) -> int:
        return self._hub.room(last)

    def resume_input(self) -> None:
        self._hub.resume_terminals()

    def poke(self) -> None:
        self._hub.poke()

    def drain(self, seconds: float) -> None:
        self._hub.drain(seconds)


class Attached(DescriptorChardev):
    """A terminal at console.sock: output as it is, input in frames (attach.py)."""

    def __init__(self, hub: Hub, sock: socket.socket) -> None:
        sock.setblocking(False)
        fd = sock.detach()
        super().__init__("attached", fd, fd, own=True)
        self._hub = hub
        self._frames = FrameReader()
        self.connect(_AttachedFront(hub))
        self.taken_at = time.monotonic()
        """When it last took something, or had nothing to take."""

    def _emit(self, data: bytes) -> int:
        sent = super()._emit(data)
        if sent:
            self.taken_at = time.monotonic()
        return sent

    def write(self, data: bytes | bytearray | memoryview, last: bool = False) -> int:
        if not self.pending:
            self.taken_at = time.monotonic()
        return super().write(data, last)

    def _input_room(self) -> int:
        # A frame cannot be cut: take one when what it may hold fits somewhere, else leave it in the socket.
        return 4096 if self._hub.take_waiting() else 0

    def _received(self, data: bytes) -> None:
        try:
            keys, size = self._frames.feed(data)
        except FrameError:
            self._hub.detach(self)
            return
        if size is not None:
            self._hub.resized(*size)
        if keys:
            self._hub.typed(keys)

    def _end_of_input(self) -> None:
        self._hub.detach(self)

    def _lost_reader(self, count: int) -> int:
        self._hub.detach(self)
        return count


class _AttachedFront(NoFrontend):
    """What an attached terminal tells the hub: that it takes output again."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def output_ready(self) -> None:
        self._hub.output_ready()


class Hub(Chardev):
    """`terminal`: our own, if any; `socket_path`: where others attach."""

    def __init__(self, name: str, terminal: Chardev | None = None, socket_path: str = "") -> None:
        super().__init__(name)
        self.terminal, self._socket_path = terminal, socket_path
        self._channels: list[Channel] = []
        self._active: Frontend = NoFrontend()
        self._active_channel: Channel | None = None
        self._attached: list[Attached] = []
        self._waiting = b""
        self._scrollback = bytearray()
        self._listener: socket.socket | None = None
        self._size = (0, 0)
        self._watching = False
        if terminal is not None:
            terminal.connect(self)

    def channel(self, name: str) -> Channel:
        """A new device side; the first one gets what is typed until another writes."""
        channel = Channel(self, name)
        self._channels.append(channel)
        if self._active_channel is None:
            self._active_channel = channel
        return channel

    def start(self, loop: IoLoop) -> None:
        super().start(loop)
        if self._socket_path:
            self._listener = listen_unix(self._socket_path, f"chardev {self.name}")
            self._listener.setblocking(False)
            loop.add_reader(self._listener.fileno(), self._accept)
        if self.terminal is not None:
            self.terminal.start(loop)

    # -- devices to terminals ----------------------------------------------------------------------

    def output(self, channel: Channel, data: bytes | bytearray | memoryview, last: bool = False) -> int:
        """A device writes; returns how much was taken. Any thread."""
        if channel is not self._active_channel:
            self._active_channel = channel
            self.resume_terminals()
        with self._lock:  # all get the same, or none
            terminals = self._terminals()
            full = [terminal for terminal in terminals if terminal.room(last) < len(data)]
            data = memoryview(data)[: min((terminal.room(last) for terminal in full), default=len(data))]
            for terminal in terminals:
                terminal.write(data, last)
            self._scrollback += data
            if len(self._scrollback) > 2 * SCROLLBACK:
                del self._scrollback[:-SCROLLBACK]
            self._note(data)
        for terminal in full:
            terminal.await_room()
        if full and not self._watching and self._loop is not None:
            self._watching = True
            self._loop.call_later(STALL_SECONDS / 4, self._watch)
        return len(data)

    def _terminals(self) -> list[Chardev]:
        return [*self._attached] if self.terminal is None else [self.terminal, *self._attached]

    def room(self, last: bool = False) -> int:
        return min((terminal.room(last) for terminal in self._terminals()), default=LAST_LIMIT)

    def _watch(self) -> None:
        """While the guest waits for terminals: drop those that do not read."""
        self._watching = False
        now = time.monotonic()
        waiting = [other for other in self._attached if other.pending]
        for other in waiting:
            if now - other.taken_at > STALL_SECONDS:
                self.detach(other)
                self.output_ready()
        if waiting and not self._watching and self._loop is not None:
            self._watching = True
            self._loop.call_later(STALL_SECONDS / 4, self._watch)

    def output_ready(self) -> None:
        for channel in self._channels:
            channel.frontend.output_ready()

    def poke(self) -> None:
        if self._loop is not None:
            self._loop.call_soon(self.output_ready)

    def recent(self) -> bytes:
        """The end of what was written."""
        with self._lock:
            return bytes(self._scrollback[-SCROLLBACK:])

    # -- terminals to devices ----------------------------------------------------------------------

    def _frontend(self) -> Frontend:
        return self._active_channel.frontend if self._active_channel is not None else self._active

    def input_room(self) -> int:
        return self._frontend().input_room() if self.take_waiting() else 0

    def receive(self, data: bytes) -> None:
        self.typed(data)

    def typed(self, data: bytes) -> None:
        """Keys for the active device; what it has no room for now waits. I/O thread."""
        self._waiting += data
        self.take_waiting()

    def take_waiting(self) -> bool:
        """Hand over what waits; True if nothing waits any more. I/O thread."""
        while self._waiting:
            frontend = self._frontend()
            room = frontend.input_room()
            if not room:
                return False
            part, self._waiting = self._waiting[:room], self._waiting[room:]
            frontend.receive(part)
        return True

    def resume_terminals(self) -> None:
        """A device has room again. Any thread."""
        if self._loop is None:
            return
        if self._waiting:
            self._loop.call_soon(self._resume)
        else:
            self._resume_all()

    def _resume(self) -> None:
        if self.take_waiting():
            self._resume_all()

    def _resume_all(self) -> None:
        if self.terminal is not None:
            self.terminal.resume_input()
        for other in tuple(self._attached):
            other.resume_input()

    def resized(self, rows: int, columns: int) -> None:
        self._size = (rows, columns)
        for channel in self._channels:
            channel.frontend.resized(rows, columns)

    def opened(self) -> None:
        pass

    def closed(self) -> None:
        pass  # our own terminal's end of file: others may attach

    # -- attaching ---------------------------------------------------------------------------------

    def _accept(self) -> None:
        if self._listener is None or self._loop is None:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        other = Attached(self, sock)
        with self._lock:
            past = bytes(self._scrollback[-SCROLLBACK:])
            if len(past) == SCROLLBACK:
                past = past[past.find(b"\n") + 1 :]
            other.write(past)
            self._attached.append(other)
        other.start(self._loop)

    def detach(self, other: Attached) -> None:
        """An attached terminal goes."""
        with self._lock:
            if other not in self._attached:
                return
            self._attached.remove(other)
        other.close()

    def drain(self, seconds: float) -> None:
        for terminal in (self.terminal, *self._attached):
            if terminal is not None:
                terminal.drain(min(seconds, 1.0) if terminal is not self.terminal else seconds)

    def close(self) -> None:
        super().close()
        if self.terminal is not None:
            self.terminal.close()
        for other in tuple(self._attached):
            self.detach(other)
        listener, self._listener = self._listener, None
        if listener is not None:
            if self._loop is not None:
                self._loop.remove(listener.fileno())
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(self._socket_path)
