"""Requests in flight, kept where they survive the process: which heads of a queue the device has taken and not given back.

What vhost-user calls an inflight region (VHOST_USER_GET_INFLIGHT_FD). Queue (queue.py) keeps it up to date, one or two
stores a request; a process that takes a dead one's place finds in it, and in the used ring, what is still to be done.
"""

from __future__ import annotations

_HEADER = 8


class Flight:
    """Of one queue, in shared memory: next_available u16, next_used u16, 4 bytes of nothing; a byte per descriptor."""

    def __init__(self, view: memoryview) -> None:
        self._words = view[:_HEADER].cast("H")
        self.heads = view[_HEADER:]

    @staticmethod
    def size(descriptors: int) -> int:
        """Bytes for a queue of so many descriptors."""
        return _HEADER + descriptors

    @property
    def next_available(self) -> int:
        return self._words[0]

    @next_available.setter
    def next_available(self, index: int) -> None:
        self._words[0] = index

    @property
    def next_used(self) -> int:
        """Answers up to here are not in `heads` any more."""
        return self._words[1]

    @next_used.setter
    def next_used(self, index: int) -> None:
        self._words[1] = index

    def start(self, next_available: int, next_used: int) -> None:
        """Nothing is in flight."""
        self.heads[:] = bytes(len(self.heads))
        self._words[0], self._words[1] = next_available, next_used
