"""Where sequences run: a process of kvmcore, our connection to it, and what of it outlives a sequence.

Memory that the session has mapped and descriptors that it has passed are no VM's: they are used again, cleared, by the
sequences that follow. Used by executor.py.
"""

from __future__ import annotations

import ctypes
import os

from protocol.channel.shared_memory import PROT_READ, PROT_WRITE, create_memfd
from protocol.client import Vm
from protocol.codec import control
from protocol.codec.session import Op as Message
from qemu_user.fuzz import rules
from qemu_user.fuzz.wire import Wire

SEGMENTS = 64
"""Segments that a sequence may name."""
_BASE = 0x10_0000_0000
_STRETCH = SEGMENTS * rules.MAP_SIZE
_EVENTS = 4
"""eventfds that are kept for the next sequence."""


class Place:
    """A process of kvmcore. Sequences take turns in it, or are there side by side, with a Slot each."""

    def __init__(self, vm: Vm, system: int | None) -> None:
        """`vm`: the first one. `system`: the process's /dev/kvm, where others are made; None if it has but this one."""
        self.vm, self.system = vm, system
        self.wire = Wire(vm.link)
        self.used = 0
        """Sequences that have begun here."""
        self._slots: list[Slot] = []

    @property
    def usable(self) -> bool:
        """Whether the process lives and answers."""
        return not self.wire.failed and self.vm.link.alive

    @property
    def busy(self) -> bool:
        """Whether a sequence is under way."""
        return any(slot.busy for slot in self._slots)

    def slot(self) -> Slot:
        """A free one, taken."""
        self.used += 1
        free = next((slot for slot in self._slots if not slot.busy), None)
        if free is None:
            free = Slot(self, _BASE + len(self._slots) * _STRETCH)
            self._slots.append(free)
        free.busy = True
        return free

    def quiet(self) -> None:
        """Close the VMs of sequences that are over, and unmap their memory. Hang, Gone."""
        frames = [frame for slot in self._slots if not slot.busy for frame in slot.clean_up(set())]
        if frames:
            self.wire.batch([frame for _, frame in frames])
            for sequence, _ in frames:
                self.wire.wait(sequence)

    def close(self) -> None:
        """The VM goes, and with the last one the process. Never raises for a server that is gone."""
        self.wire.close()
        for slot in self._slots:
            slot.close()
        if self.system is not None or self.wire.failed:
            self.vm.link.close()
            return
        try:
            self.vm.close()
        except OSError:
            pass


class Slot:
    """What one sequence at a time has of a place: a stretch of the session's address space, and eventfds."""

    def __init__(self, place: Place, base: int) -> None:
        self.place, self.base = place, base
        self.busy = False
        self.left: list[tuple[int, int]] = []
        """(handle, CLOSE or CLOSE_VM): what the last sequence has made, which goes when the next one comes."""
        self.mapped: set[int] = set()
        """Segments that are there."""
        self._memory: dict[int, int] = {}
        self._spare: dict[int, int] = {}
        """Memory that is mapped next, where it is not known yet whether what was mapped has been unmapped."""
        self._events: list[int] = []
        self._closing: list[int] = []
        self._ended: list[int] = []
        """Eventfds that are too many; and those whose numbers are ours until the server has answered that they are closed."""
        for index in range(rules.MAPS):  # all that most sequences need, so that what is left over is the same after each
            self._memory_of(index)
            self._spare_of(index)
        for _ in range(_EVENTS):
            self._events.append(self._new_event())

    def clean_up(self, stay: set[int]) -> list[tuple[int, bytes]]:
        """Requests that end what the last sequence has left, but for the segments in `stay`, which are empty from now on."""
        wire = self.place.wire
        frames = [wire.frame(number, request) for number, request in self.left]
        self.left = []
        for fd in self._ended:
            os.close(fd)
        frames += [wire.frame(fd, control.CLOSE) for fd in self._closing]
        self._ended, self._closing = self._closing, []
        frames += [self.unmap(wire, index) for index in self.mapped - stay]
        self.mapped &= stay
        for index in self.mapped:
            self.clear(index)
        return frames

    def address(self, offset: int) -> int:
        """Where {"map": offset} is."""
        return self.base + offset

    def map(self, wire: Wire, index: int) -> tuple[int, bytes]:
        """The request that maps a segment."""
        return self._map(wire, index, self._memory_of(index))

    def map_again(self, wire: Wire, index: int) -> tuple[int, bytes]:
        """The request that maps other memory there, all zeros: for a segment that requests which are on their way may unmap. If
        it is granted, mapped_again() is to be called; only then may it be made again.
        """
        _punch(self._spare_of(index))
        return self._map(wire, index, self._spare_of(index))

    def mapped_again(self, index: int) -> None:
        """The segment's memory is the other one now."""
        self._memory[index], self._spare[index] = self._spare[index], self._memory[index]

    def _map(self, wire: Wire, index: int, fd: int) -> tuple[int, bytes]:
        segment = control.SEGMENT.pack(rules.MAP_SIZE, 0, PROT_READ | PROT_WRITE)
        return wire.frame(fd, control.MAP, self.base + index * rules.MAP_SIZE, payload=segment)

    def _memory_of(self, index: int) -> int:
        return self._memory[index] if index in self._memory else self._new_memory(self._memory, index)

    def _spare_of(self, index: int) -> int:
        return self._spare[index] if index in self._spare else self._new_memory(self._spare, index)

    def _new_memory(self, kept: dict[int, int], index: int) -> int:
        fd = kept[index] = create_memfd("fuzz", rules.MAP_SIZE)
        try:
            self._pass(fd)
        except BaseException:
            del kept[index]
            raise
        return fd

    def unmap(self, wire: Wire, index: int) -> tuple[int, bytes]:
        """The request that unmaps it."""
        segment = control.SEGMENT.pack(rules.MAP_SIZE, 0, 0)
        return wire.frame(0, control.UNMAP, self.base + index * rules.MAP_SIZE, payload=segment)

    def clear(self, index: int) -> None:
        """Make the memory of a segment all zeros again."""
        if index in self._memory:
            _punch(self._memory[index])

    def event(self, value: int) -> int:
        """An eventfd with this count, passed to the session under its number here. KvmError: EMFILE."""
        if self._events:
            fd = self._events.pop()
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                pass
        else:
            fd = self._new_event()
        os.eventfd_write(fd, value)
        return fd

    def _new_event(self) -> int:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pass(fd)
        return fd

    def event_back(self, fd: int) -> None:
        """It is still passed, and no longer in use."""
        if len(self._events) < _EVENTS:
            self._events.append(fd)
        else:
            self._closing.append(fd)

    def _pass(self, fd: int) -> None:
        try:
            self.place.vm.link.say(Message.PASS_FILE, "sendmsg", fd, fds=[fd])
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Give descriptors back."""
        for fd in (*self._memory.values(), *self._spare.values(), *self._events, *self._closing, *self._ended):
            os.close(fd)
        self._closing, self._ended = [], []
        self._memory.clear()
        self._spare.clear()
        self._events.clear()


_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _punch(memory: int) -> None:
    """All zeros again."""
    _fallocate(memory, _PUNCH_HOLE | _KEEP_SIZE, 0, rules.MAP_SIZE)
