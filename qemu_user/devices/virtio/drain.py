"""Output in small pieces taken by native code: a console's driver writes some bytes, and waits in a loop for its buffer.

Instead of only looking whether there is more (backends/polling.py) an I/O thread lets kvmcore's code take such requests, as
long as they are one buffer each in memory that is all there (protocol/channel/vdso.py, DRAIN). The rest is Python's. Called
by transport.py, under the device's lock.
"""

from __future__ import annotations

import ctypes

from protocol.channel.vdso import DRAIN, Vdso
from qemu_user.devices.memory import GuestMemory
from qemu_user.devices.virtio.queue import Queue

ROOM = 4096
"""Bytes that are gathered before Python looks at them, at most."""
_AT = {name: index for index, name in enumerate(DRAIN)}
_FIRST, _SECOND, _THIRD, _FILLED = (_AT[name] for name in ("next_available", "next_used", "signalled", "filled"))


class Drain:
    """Of one queue."""

    def __init__(self, queue: Queue, memory: GuestMemory) -> None:
        self._queue, self._memory = queue, memory
        self._state = (ctypes.c_uint64 * len(DRAIN))()
        self._buffer = ctypes.create_string_buffer(ROOM)

    def run(self, code: Vdso, pace: tuple[int, int, int, int], bell: int, known: int, room: int) -> tuple[int, bytes]:
        """Serve the queue, which is drainable, until something else is to be done: what, and the bytes that came, at most
        `room`. `pace`: the first four words of DRAIN; the call ends when the u16 at `bell` is not `known`.
        """
        queue, memory, state = self._queue, self._memory, self._state
        flat = memory.flat
        assert flat is not None
        base, end, _ = flat
        state[:] = [
            *pace, bell, known, memory.address(queue.available), memory.address(queue.used), memory.address(queue.descriptors),
            queue.size - 1, base, end - base, memory.address(base), ctypes.addressof(self._buffer), min(room, ROOM),
            *queue.indices(), 0, 0,
        ]  # fmt: skip
        outcome = int(code.drain(ctypes.addressof(state)))
        queue.moved(state[_FIRST], state[_SECOND], state[_THIRD])
        return outcome, self._buffer.raw[: state[_FILLED]]
