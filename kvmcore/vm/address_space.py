"""The address space of a session, the analogue of a Linux process's mm.

A client registers segments [va, va + size) backed by a memfd it passed; every 64-bit pointer in a KVM struct
(userspace_addr, dirty_bitmap, one_reg.addr, device_attr.addr) is an address in here. A request may carry small
pointees inline: they overlay the segments, for the thread that serves the request, until it is answered.
Called by the ioctl dispatch and the ioctl handlers. Must never hand out host memory beyond a segment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST, EFAULT, EINVAL
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, PROT_READ, PROT_WRITE

if TYPE_CHECKING:
    from kvmcore.vm.objects import HostFile
    from protocol.channel.shared_memory import Mapping

#: The end of user space in the address space of a session: TASK_SIZE of a 48-bit (Sv48) RISC-V process is 2^47.
TASK_SIZE = 1 << 47


@dataclass(eq=False)
class Segment:
    """A mapped piece of a session's address space: `size` bytes at `va`, at `host_address` in this process."""

    va: int
    size: int
    prot: int
    mapping: Mapping

    @property
    def view(self) -> memoryview:
        return self.mapping.view

    @property
    def host_address(self) -> int:
        return self.mapping.address

    @property
    def end(self) -> int:
        return self.va + self.size


class InlineSegment:
    """A pointee that travelled in the request: bytes at `va`; `dirty` once written, so that it is copied out."""

    __slots__ = ("data", "dirty", "size", "va", "writable")

    def __init__(self, va: int, data: bytes | bytearray, writable: bool = True) -> None:
        self.va, self.data, self.size, self.writable = va, data, len(data), writable
        self.dirty = False

    def write(self, start: int, data: bytes) -> None:
        """The caller has looked whether it fits."""
        if not self.dirty:
            self.data, self.dirty = bytearray(self.data), True
        self.data[start : start + len(data)] = data  # type: ignore[index]


class AddressSpace:
    """Segments by address. Thread-safe: vCPU threads copy while the I/O thread may map and unmap."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[int, int], None]] = []
        """Called with (va, size) after a segment was mapped or unmapped there: memslots follow."""
        self._segments: list[Segment] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    # -- mappings -------------------------------------------------------------------------------------------

    def map(self, va: int, size: int, file: HostFile, offset: int, prot: int) -> Segment:
        """Map `size` bytes of `file` at `offset` to `va`. The descriptor may be closed: the mapping holds the memory.

        EINVAL: not page aligned, empty, outside user space, no sealed memfd, or beyond the end of the file (a later touch
        would be SIGBUS). EEXIST: overlaps another segment.
        """
        if va % PAGE or size % PAGE or offset % PAGE or size <= 0 or va < 0 or va + size > TASK_SIZE:
            raise KvmError(EINVAL, reason="segments are page aligned, not empty, below 2^47")
        if prot & ~(PROT_READ | PROT_WRITE) or not prot & PROT_READ:
            raise KvmError(EINVAL, reason="prot is READ or READ|WRITE")
        segment = Segment(va, size, prot, file.mapped(offset, size, prot))
        with self._lock:
            if any(s.va < va + size and va < s.end for s in self._segments):
                raise KvmError(EEXIST, reason="segment overlaps another one")
            self._segments = sorted([*self._segments, segment], key=lambda s: s.va)
        self._tell(va, size)
        return segment

    def unmap(self, va: int, size: int) -> None:
        """Forget the segment that is exactly [va, va + size). EINVAL if there is none.

        Memory that a memslot still refers to stays mapped until that slot lets go of its Segment.
        """
        with self._lock:
            for segment in self._segments:
                if segment.va == va and segment.size == size:
                    self._segments = [s for s in self._segments if s is not segment]
                    break
            else:
                raise KvmError(EINVAL, reason="no such segment")
        self._tell(va, size)

    def _tell(self, va: int, size: int) -> None:
        for listener in list(self.listeners):
            listener(va, size)

    def find(self, va: int) -> Segment | None:
        """The segment that holds address `va`, or None."""
        for segment in self._segments:
            if segment.va <= va < segment.end:
                return segment
        return None

    def pieces(self, va: int, size: int) -> list[Segment]:
        """The segments that overlap [va, va + size), in order; there may be holes between them."""
        return [s for s in self._segments if s.va < va + size and va < s.end]

    # -- copies ---------------------------------------------------------------------------------------------

    def lay_over(self, segments: Sequence[InlineSegment]) -> None:
        """Let this thread see `segments` before the mapped ones; none any more when the request is done."""
        self._local.inline = segments

    @contextmanager
    def overlay(self, segments: Sequence[InlineSegment]) -> Iterator[None]:
        """lay_over() for the time of a with block."""
        self.lay_over(segments)
        try:
            yield
        finally:
            self.lay_over(())

    def copy_from_user(self, va: int, size: int) -> bytes:
        """`size` bytes at `va`; EFAULT if any of them is not readable."""
        if size == 0:
            return b""
        for inline in self._inline():
            start = va - inline.va
            if 0 <= start <= inline.size - size:
                return bytes(inline.data[start : start + size])
        out = bytearray()
        for segment, start, length in self._walk(va, size, PROT_READ):
            out += segment.view[start : start + length]
        return bytes(out)

    def copy_to_user(self, va: int, data: bytes) -> None:
        """Write `data` at `va`; EFAULT if any byte is not writable (nothing is written then)."""
        if not data:
            return
        for inline in self._inline():
            start = va - inline.va
            if inline.writable and 0 <= start <= inline.size - len(data):
                inline.write(start, data)
                return
        done = 0
        for segment, start, length in self._walk(va, len(data), PROT_READ | PROT_WRITE):
            segment.view[start : start + length] = data[done : done + length]
            done += length

    def _inline(self) -> Sequence[InlineSegment]:
        inline: Sequence[InlineSegment] = getattr(self._local, "inline", ())
        return inline

    def _walk(self, va: int, size: int, prot: int) -> list[tuple[Segment, int, int]]:
        """The (segment, start, length) pieces that make up [va, va + size); EFAULT at the first hole."""
        pieces: list[tuple[Segment, int, int]] = []
        end = va + size
        while va < end:
            segment = self.find(va) if 0 <= va < TASK_SIZE else None
            if segment is None or segment.prot & prot != prot:
                raise KvmError(EFAULT, reason=f"bad address {va:#x}")
            length = min(end, segment.end) - va
            pieces.append((segment, va - segment.va, length))
            va += length
        return pieces
