"""Split virtqueues, the device's side (virtio 1.2, section 2.7): rings in guest memory in, chains of buffers
out.

Called by devices/virtio/mmio.py (set-up) and the devices (pop, push). Everything in the rings is the guest's
and may change under our eyes: each field is read once, every address, length and index is checked, and what
breaks the rules raises QueueError, which the transport answers with DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import msgspec

from qemu_user.devices.device import StateError, require
from qemu_user.devices.memory import GuestMemory, OutOfRange
from qemu_user.devices.virtio.flight import Flight

NEXT, WRITE, INDIRECT = 1, 2, 4
"""Descriptor flags (2.7.5)."""
NO_INTERRUPT, NO_NOTIFY = 1, 1
"""avail.flags, used.flags (2.7.6, 2.7.8)."""
MAX_CHAIN_BYTES = 1 << 32
"""A driver must not make a chain longer than 2^32 bytes (2.7.5.2)."""
LONGEST_INDIRECT = 1024
"""Descriptors of an indirect chain. 2.7.5.3.1 allows as many as the queue has; QEMU takes this many, and drivers that
make their rings smaller than their seg_max rely on it.
"""
_DESCRIPTOR = struct.Struct("<QIHH")
_HIGHEST_ADDRESS = 1 << 64


class QueueError(Exception):
    """The driver broke a rule of the specification; the message names it."""


class QueueState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One queue: addresses as the driver set them, indices modulo 2^16."""

    size: int
    ready: bool
    descriptors: int
    available: int
    used: int
    next_available: int
    next_used: int
    again: list[int] = []
    """Heads of requests that a device process which died had taken and not answered: they come before the others."""


class Chain:
    """One request: buffers that the device may read, then buffers that it may write, without empty ones."""

    __slots__ = ("again", "head", "readable", "targets", "writable")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        targets: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.head, self.readable, self.writable = head, readable, writable
        self.targets = targets
        """(guest address, length) of the writable buffers, for the log of what devices write."""
        self.again = False
        """Whether a device process that died had taken it before."""

    @property
    def readable_bytes(self) -> int:
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        return sum(map(len, self.writable))

    def take(self, count: int) -> bytes:
        """Copy and consume the first `count` readable bytes. QueueError if there are fewer."""
        if not self.readable:
            if count:
                raise QueueError(f"a buffer is {count} bytes too short")
            return b""
        first = self.readable[0]
        if len(first) == count:
            del self.readable[0]
            return bytes(first)
        head, self.readable = split(self.readable, count)
        return b"".join(head)

    def fill(self, data: bytes | bytearray | memoryview) -> int:
        """Copy `data` to the start of the writable buffers, as far as it fits; returns how many bytes."""
        source, done = memoryview(data), 0
        for view in self.writable:
            part = source[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
            if done == len(source):
                break
        return done


def split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """(the first `count` bytes, the rest) of a list of buffers. QueueError if there are fewer."""
    front: list[memoryview] = []
    for index, view in enumerate(views):
        if count < len(view):
            if count:
                front.append(view[:count])
                return front, [view[count:], *views[index + 1 :]]
            return front, views[index:]
        front.append(view)
        count -= len(view)
    if count:
        raise QueueError(f"a buffer is {count} bytes too short")
    return front, []


class Queue:
    """One virtqueue. `max_size` is a power of two."""

    def __init__(self, index: int, max_size: int) -> None:
        self.index, self.max_size = index, max_size
        self.event_index = False
        """VIRTIO_F_EVENT_IDX was negotiated."""
        self.indirect = False
        """VIRTIO_F_INDIRECT_DESC was negotiated."""
        self.flight: Flight | None = None
        """Where requests in flight are noted, if the VM is to outlive this process."""
        self.index_address = 0
        """Of a ready queue: where in this process the available ring's index lies."""
        self.before_push: Callable[[Queue, int, int], None] | None = None
        """Called with head and length before an answer is published: for devices that have to note more than that."""
        self.reset()

    def reset(self) -> None:
        """Back to what a reset of the device leaves (4.2.2)."""
        self.size = self.max_size
        self.ready = False
        self.descriptors = self.available = self.used = 0
        self._next_available = self._next_used = self._signalled_used = 0
        self._event_valid = False
        self._again: list[int] = []
        self._memory: GuestMemory | None = None
        if self.flight is not None:
            self.flight.start(0, 0)

    # -- set-up ------------------------------------------------------------------------------------

    def enable(self, memory: GuestMemory) -> None:
        """The driver says that the rings are in place. QueueError if they cannot be."""
        self._open(memory)
        self._next_available = self._next_used = self._signalled_used = 0
        self._event_valid = False
        if self.flight is not None:
            self.flight.start(0, 0)

    def _open(self, memory: GuestMemory) -> None:
        if not (0 < self.size <= self.max_size and self.size & (self.size - 1) == 0):
            raise QueueError(f"queue {self.index}: size {self.size} is no power of two up to {self.max_size}")
        if self.descriptors & 15 or self.available & 1 or self.used & 3:
            raise QueueError(f"queue {self.index}: a ring is misaligned")
        try:
            self._table = memory.view(self.descriptors, 16 * self.size)
            self._available_ring = memory.view(self.available, 6 + 2 * self.size).cast("H")
            self._used_ring = memory.view(self.used, 4 + 8 * self.size).cast("I")
            self._used_head = memory.view(self.used, 4).cast("H")
            # avail_event belongs to the ring only with EVENT_IDX, but 2.7.2 gives the ring's size with it
            # always
            self._used_event = memory.view(self.used + 4 + 8 * self.size, 2).cast("H")
            self.index_address = memory.address(self.available + 2)
        except OutOfRange as error:
            raise QueueError(f"queue {self.index}: a ring lies outside: {error}") from error
        self._memory = memory
        self.ready = True

    def rings(self) -> list[tuple[int, int]]:
        """(guest address, bytes) of the rings, none if it is not ready."""
        if not self.ready:
            return []
        return [(self.descriptors, 16 * self.size), (self.available, 6 + 2 * self.size), (self.used, 6 + 8 * self.size)]

    # -- the driver's requests ---------------------------------------------------------------------

    def pop(self) -> Chain | None:
        """The next request, None if there is none. QueueError."""
        if not self.ready:
            return None
        if self._again:
            chain = self._chain(self._again.pop(0))
            chain.again = True
            return chain
        waiting = (self._available_ring[1] - self._next_available) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise QueueError(f"queue {self.index}: {waiting} requests in a ring of {self.size}")
        head = self._available_ring[2 + self._next_available % self.size]
        chain = self._chain(head)
        self._next_available = (self._next_available + 1) & 0xFFFF
        if self.flight is not None:
            self.flight.heads[head] = 1
            self.flight.next_available = self._next_available
        return chain

    def _chain(self, head: int) -> Chain:
        table, length, index, left = self._table, self.size, head, self.size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        targets: list[tuple[int, int]] = []
        total, indirect = 0, False
        memory = self._memory
        assert memory is not None
        while True:
            if index >= length:
                raise QueueError(f"queue {self.index}: descriptor {index} of {length}")
            if not left:
                raise QueueError(f"queue {self.index}: a chain longer than the queue, or a loop")
            left -= 1
            address, size, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            try:
                view = memory.view(address, size)
            except OutOfRange as error:
                raise QueueError(f"queue {self.index}: {error}") from error
            if flags & INDIRECT:
                if indirect or flags & NEXT or size & 15 or not size or not self.indirect:
                    raise QueueError(f"queue {self.index}: a bad indirect descriptor")
                if (chain := self._straight(head, view, memory)) is not None:
                    return chain
                table, length, index, indirect = view, size // 16, 0, True
                left = max(self.size, LONGEST_INDIRECT)
                continue
            total += size
            if total > MAX_CHAIN_BYTES:
                raise QueueError(f"queue {self.index}: a chain of more than 2^32 bytes")
            if flags & WRITE:
                if size:
                    writable.append(view)
                    targets.append((address, size))
            elif writable:
                raise QueueError(f"queue {self.index}: a readable buffer after a writable one")
            elif size:
                readable.append(view)
            if not flags & NEXT:
                return Chain(head, readable, writable, targets)
            index = following

    def _straight(self, head: int, table: memoryview, memory: GuestMemory) -> Chain | None:
        """The chain of an indirect table whose descriptors follow one another and keep the rules, as drivers make them, with
        one look at each. Buffers that touch become one. None: anything else, which _chain() judges.
        """
        if memory.flat is None:
            return None
        base, end, ram = memory.flat
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        targets: list[tuple[int, int]] = []
        start = stop = 0
        kind, total, expected, most = -1, 0, 1, max(self.size, LONGEST_INDIRECT)
        for address, size, flags, following in _DESCRIPTOR.iter_unpack(table):
            after, way = address + size, flags & WRITE
            if address < base or after > end or flags & ~(NEXT | WRITE) or way < kind or expected > most:
                return None
            if address == stop and way == kind:
                stop = after
            elif size:
                if kind == WRITE:
                    writable.append(ram[start - base : stop - base])
                    targets.append((start, stop - start))
                elif kind == 0:
                    readable.append(ram[start - base : stop - base])
                start, stop, kind = address, after, way
            total += size
            if not flags & NEXT:
                break
            if following != expected:
                return None
            expected += 1
        else:
            return None
        if total > MAX_CHAIN_BYTES:
            return None
        if kind == WRITE:
            writable.append(ram[start - base : stop - base])
            targets.append((start, stop - start))
        elif kind == 0:
            readable.append(ram[start - base : stop - base])
        return Chain(head, readable, writable, targets)

    def unpop(self, chain: Chain) -> None:
        """`chain`, the last one that pop() gave, has not been looked at: it will be given again. Of several the last first."""
        if chain.again:
            self._again.insert(0, chain.head)
            return
        self._next_available = (self._next_available - 1) & 0xFFFF
        if self.flight is not None:
            self.flight.next_available = self._next_available
            self.flight.heads[chain.head] = 0

    # -- the device's answers ----------------------------------------------------------------------

    def push(self, chain: Chain, written: int) -> None:
        """Give a request back, with `written` bytes in its writable buffers."""
        self.push_all(((chain, written),))

    def push_all(self, answers: Sequence[tuple[Chain, int]]) -> None:
        """Give requests back at once: a driver that looks meanwhile sees all of them or none."""
        for chain, written in answers:
            if self.before_push is not None:
                self.before_push(self, chain.head, written)
            at = 1 + 2 * (self._next_used % self.size)
            self._used_ring[at] = chain.head
            self._used_ring[at + 1] = written & 0xFFFFFFFF
            self._next_used = (self._next_used + 1) & 0xFFFF
        # The elements are in place before the index moves: x86 keeps stores in order, and so does CPython.
        self._used_head[1] = self._next_used
        if self.flight is not None:
            for chain, _ in answers:
                self.flight.heads[chain.head] = 0
            self.flight.next_used = self._next_used
        memory = self._memory
        if memory is not None and memory.logging:
            for chain, _ in answers:
                for gpa, length in chain.targets:
                    memory.wrote(gpa, length)
            self._wrote_ring(memory)

    def _wrote_ring(self, memory: GuestMemory) -> None:
        memory.wrote(self.used, 6 + 8 * self.size)

    def wants_interrupt(self) -> bool:
        """Whether the driver asks to be told of what was pushed since the last call (2.7.7, 2.7.10)."""
        if not self.ready or (self._next_used == self._signalled_used and self._event_valid):
            return False
        old, new, valid = self._signalled_used, self._next_used, self._event_valid
        self._signalled_used, self._event_valid = new, True
        if self.event_index:
            event = self._available_ring[2 + self.size]
            return not valid or (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self._available_ring[0] & NO_INTERRUPT

    def suppress_kicks(self) -> None:
        """While the device works on the queue the driver need not call."""
        if self.ready and not self.event_index:
            self._used_head[0] = NO_NOTIFY
            if self._memory is not None and self._memory.logging:
                self._wrote_ring(self._memory)

    def allow_kicks(self) -> bool:
        """The device is about to wait; True if more came meanwhile (call pop() again)."""
        if not self.ready:
            return False
        if self.event_index:
            self._used_event[0] = self._next_available
        else:
            self._used_head[0] = 0
        if self._memory is not None and self._memory.logging:
            self._wrote_ring(self._memory)
        return bool(self._again) or self._available_ring[1] != self._next_available

    @property
    def has_requests(self) -> bool:
        """Whether pop() would find something."""
        return self.ready and (bool(self._again) or self._available_ring[1] != self._next_available)

    @property
    def rests(self) -> bool:
        """Whether there is nothing to do: no request, and the driver calls when there is one."""
        if not self.ready:
            return True
        if self.has_requests:
            return False
        return self._used_event[0] == self._next_available if self.event_index else not self._used_head[0] & NO_NOTIFY

    @property
    def next_available(self) -> int:
        """What the available ring's index is when pop() finds nothing new."""
        return self._next_available

    @property
    def answered(self) -> bool:
        """Whether anything has been given back since the queue was set up."""
        return self.ready and self._next_used != 0

    # -- native code that serves it (drain.py) -----------------------------------------------------

    @property
    def drainable(self) -> bool:
        """Whether answers need nothing beside the ring: no notes of what is in flight, no log of what devices write."""
        memory = self._memory
        return (
            self.ready and self.event_index and self._event_valid and not self._again and self.flight is None
            and self.before_push is None and memory is not None and memory.flat is not None and not memory.logging
        )  # fmt: skip

    def indices(self) -> tuple[int, int, int]:
        """(next available, next used, what the driver was told of last)."""
        return self._next_available, self._next_used, self._signalled_used

    def moved(self, next_available: int, next_used: int, signalled: int) -> None:
        """Requests were taken and answered by somebody else, by the rules of this class."""
        self._next_available, self._next_used, self._signalled_used = next_available, next_used, signalled

    # -- state -------------------------------------------------------------------------------------

    def save(self) -> QueueState:
        return QueueState(
            size=self.size,
            ready=self.ready,
            descriptors=self.descriptors,
            available=self.available,
            used=self.used,
            next_available=self._next_available,
            next_used=self._next_used,
            again=list(self._again),
        )

    def check(self, state: QueueState, memory: GuestMemory) -> None:
        """StateError unless restore() can take `state`."""
        what = f"queue {self.index}"
        require(0 <= state.size <= 0xFFFF, f"{what}: size out of range")
        for address in (state.descriptors, state.available, state.used):
            require(0 <= address < _HIGHEST_ADDRESS, f"{what}: address out of range")
        require(0 <= state.next_available <= 0xFFFF, f"{what}: next_available out of range")
        require(0 <= state.next_used <= 0xFFFF, f"{what}: next_used out of range")
        require(len(state.again) <= state.size, f"{what}: more requests in flight than descriptors")
        require(all(0 <= head < state.size for head in state.again), f"{what}: a head out of range")
        try:
            Queue(self.index, self.max_size).restore(state, memory)
        except QueueError as error:
            raise StateError(str(error)) from error

    def restore(self, state: QueueState, memory: GuestMemory) -> None:
        """Take over a checked state."""
        self.reset()
        self.size = state.size
        self.descriptors, self.available, self.used = state.descriptors, state.available, state.used
        if state.ready:
            self._open(memory)
        self._next_available, self._next_used = state.next_available, state.next_used
        self._signalled_used = state.next_used
        self._again = list(state.again)

    # -- a process that dies -----------------------------------------------------------------------

    def note_in(self, flight: Flight) -> None:
        """From now on requests in flight are noted there; the device has none in hand."""
        self.flight = flight
        flight.start(self._next_available, self._next_used)
        for head in self._again:
            flight.heads[head] = 1

    def recover(self, flight: Flight, answered: tuple[int, int, int] | None = None) -> None:
        """After restore() of a state whose indices are old: what is in flight, by a dead process's notes, is given by pop()
        again. `answered`: (head, length, used index before) of an answer that was due to be published.
        """
        if not self.ready:
            self.note_in(flight)
            return
        self.flight = flight
        if answered is not None:
            head, written, before = answered
            if self._used_head[1] == before and head < self.size and flight.heads[head]:
                at = 1 + 2 * (before % self.size)
                self._used_ring[at], self._used_ring[at + 1] = head, written & 0xFFFFFFFF
                self._used_head[1] = (before + 1) & 0xFFFF
        used = self._used_head[1]
        while flight.next_used != used:  # published, and the process died before it could note that
            head = self._used_ring[1 + 2 * (flight.next_used % self.size)]
            if head < self.size:
                flight.heads[head] = 0
            flight.next_used = (flight.next_used + 1) & 0xFFFF
        self._next_used = self._signalled_used = used
        self._next_available = flight.next_available
        if self._available_ring[1] != self._next_available:  # noted, and the process died before it counted it
            head = self._available_ring[2 + self._next_available % self.size]
            if head < self.size:
                flight.heads[head] = 0
        order = {}
        for back in range(self.size, 0, -1):
            order[self._available_ring[2 + (self._next_available - back) % self.size]] = -back
        flying = [head for head in range(self.size) if flight.heads[head]]
        self._again = sorted(flying, key=lambda head: order.get(head, 0))
