"""Dirty tracking: the bitmap of a slot, the dirty log ioctls, the dirty rings (KVM_ABI 1.8).

The engine sets a bit in a slot's bitmap when a hart first gets write permission for a page (slow path of the
TLB); clearing bits therefore takes the permission away, in every hart, while none runs. Called by memory.py
and kvmcore/ioctl/vm.py. What the client writes through its own mapping is never logged here, as in Linux.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from errno import E2BIG, EINVAL, ENOENT, ENXIO
from typing import TYPE_CHECKING

from protocol.abi import run_page, structs
from protocol.abi.capabilities import (
    INITIALLY_SET,
    MANUAL_PROTECT_ENABLE,
    MAX_DIRTY_RING_BYTES,
    NR_MEMSLOTS,
)
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, Mapping, create_memfd

if TYPE_CHECKING:
    from kvmcore.vm.memory import Memory, Slot
    from kvmcore.vm.vcpu import Vcpu

RING_RESERVED = 64
"""Entries that stay free beyond the soft limit: a ring of 256 makes RUN return after 192."""
_CHUNK = 4096
_SMALL = 4096
"""Bytes of a bitmap that is not worth a mapping of its own."""


class DirtyBitmap:
    """One bit per page of a slot, bit i of byte i // 8, at a fixed address that native code writes
    atomically.
    """

    def __init__(self, pages: int, initially_set: bool = False) -> None:
        self.pages = pages
        self.size = (pages + 63) // 64 * 8
        self._memory = mmap.mmap(-1, self.size) if self.size > _SMALL else bytearray(self.size)  # never resized
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._sides: list[tuple[int, int, mmap.mmap, int]] = []
        if initially_set:
            self._memory[:] = ((1 << pages) - 1).to_bytes(self.size, "little")

    def part(self, first_page: int, pages: int) -> int:
        """Address of a bitmap whose bit 0 is `first_page`, for the engine to set bits in."""
        if first_page % 64 == 0:
            return self._address + first_page // 8
        side = mmap.mmap(-1, (pages + 63) // 64 * 8)
        address = ctypes.addressof(ctypes.c_char.from_buffer(side))
        self._sides.append((first_page, pages, side, address))
        return address

    def gather(self) -> None:
        """Take the bits of the unaligned parts in and forget those parts. No hart may run."""
        for first_page, pages, side, _ in self._sides:
            bits = int.from_bytes(side[:], "little")
            while bits:
                page = (bits & -bits).bit_length() - 1
                if page < pages:
                    self.set_range(first_page + page, first_page + page)
                bits &= bits - 1
        self._sides.clear()

    def get(self) -> bytes:
        """All bits; those beyond the last page are 0."""
        return bytes(self._memory[:])

    def set_range(self, first: int, last: int) -> None:
        """Mark pages first..last, both included."""
        for page in range(first, last + 1):
            self._memory[page // 8] |= 1 << page % 8

    def put(self, bits: bytes) -> None:
        """Set every bit that is set in `bits` (as long as the bitmap)."""
        merged = int.from_bytes(self._memory[:], "little") | int.from_bytes(bits, "little")
        self._memory[:] = merged.to_bytes(self.size, "little")

    def clear_all(self) -> None:
        self._memory[:] = bytes(self.size)

    def clear(self, first_page: int, bits: bytes) -> None:
        """Clear the pages whose bit is set in `bits`, whose bit 0 is `first_page` (a multiple of 64)."""
        start = first_page // 8
        here = self._memory[start : start + len(bits)]
        kept = int.from_bytes(here, "little") & ~int.from_bytes(bits[: len(here)], "little")
        self._memory[start : start + len(here)] = kept.to_bytes(len(here), "little")

    def new_since(self, shadow: bytearray, limit: int) -> list[int]:
        """At most `limit` pages that are set here and not in `shadow`, lowest first; they are set there
        then.
        """
        pages: list[int] = []
        for start in range(0, self.size, _CHUNK):
            now = self._memory[start : start + _CHUNK]
            if now == shadow[start : start + _CHUNK]:
                continue
            bits = int.from_bytes(now, "little") & ~int.from_bytes(shadow[start : start + _CHUNK], "little")
            while bits:
                if len(pages) == limit:
                    return pages
                page = (bits & -bits).bit_length() - 1
                bits &= bits - 1
                shadow[start + page // 8] |= 1 << page % 8
                if start * 8 + page < self.pages:
                    pages.append(start * 8 + page)
        return pages


class DirtyTracking:
    """The dirty log and the dirty rings of one VM. `manual` and `ring_bytes` are set by KVM_ENABLE_CAP."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.manual = 0
        """Flags of MANUAL_DIRTY_LOG_PROTECT2 in force: 0, 1 or 3."""
        self.wrote = False
        """Whether kvmcore itself has dirtied pages since a ring last collected."""
        self.ring_bytes = 0
        """Bytes of each vCPU's dirty ring; 0: the log is used instead."""

    def new_bitmap(self, pages: int) -> DirtyBitmap:
        """The bitmap of a slot that starts logging."""
        return DirtyBitmap(pages, bool(self.manual & INITIALLY_SET) and not self.ring_bytes)

    # -- the log -----------------------------------------------------------------------------------

    def _logging_slot(self, number: int) -> tuple[Slot, DirtyBitmap]:
        if number >= NR_MEMSLOTS:
            raise KvmError(EINVAL, reason=f"slot {number}")
        slot = self._memory.slot(number)
        if slot is None or slot.bitmap is None:
            raise KvmError(ENOENT, reason=f"slot {number} does not log dirty pages")
        return slot, slot.bitmap

    def get_log(self, number: int) -> bytes:
        """KVM_GET_DIRTY_LOG's bitmap, 8 bytes per 64 pages. Clears it too unless manual mode is on."""
        if self.ring_bytes:
            raise KvmError(ENXIO, reason="this VM has dirty rings")
        with self._memory.lock:
            _, bitmap = self._logging_slot(number)
            with self._memory.quiesced():
                bitmap.gather()
                bits = bitmap.get()
                if not self.manual and bits != bytes(len(bits)):
                    bitmap.clear_all()
                    self._memory.flush_write_permissions()
                self._memory.hand_over_parts()
            return bits

    def restore_log(self, number: int, bits: bytes) -> None:
        """What get_log() took could not be delivered: the pages are dirty again."""
        with self._memory.lock:
            _, bitmap = self._logging_slot(number)
            if not self.manual and len(bits) == bitmap.size:
                with self._memory.quiesced():
                    bitmap.put(bits)

    def clear_range(self, number: int, first_page: int, pages: int) -> int:
        """Check KVM_CLEAR_DIRTY_LOG's range; returns the bytes of bitmap that go with it."""
        if self.ring_bytes:
            raise KvmError(ENXIO, reason="this VM has dirty rings")
        if number >= NR_MEMSLOTS or first_page % 64:
            raise KvmError(EINVAL, reason="slot number, or first page not a multiple of 64")
        slot, _ = self._logging_slot(number)
        rest = slot.pages - first_page
        if rest < 0 or pages > rest or (pages < rest and pages % 64):
            raise KvmError(EINVAL, reason="pages beyond the slot, or not a multiple of 64 before its end")
        return (pages + 63) // 64 * 8

    def clear_log(self, number: int, first_page: int, bits: bytes) -> None:
        """Clear the pages whose bit is set. The range has been checked by clear_range()."""
        if bits == bytes(len(bits)):
            return
        with self._memory.lock:
            _, bitmap = self._logging_slot(number)
            with self._memory.quiesced():
                bitmap.gather()
                bitmap.clear(first_page, bits)
                self._memory.flush_write_permissions()
                self._memory.hand_over_parts()

    def enable_manual(self, flags: int, offered: int) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. EINVAL: bits that are not offered, or INITIALLY_SET alone."""
        if flags & ~offered or (flags & INITIALLY_SET and not flags & MANUAL_PROTECT_ENABLE):
            raise KvmError(EINVAL, reason=f"flags {flags:#x}")
        self.manual = flags

    # -- the rings ---------------------------------------------------------------------------------

    def enable_ring(self, size: int) -> None:
        """KVM_CAP_DIRTY_LOG_RING_ACQ_REL with `size` bytes per vCPU.

        EINVAL: not a power of two, below a page or 64 entries plus the reserve, set already, a vCPU exists.
        E2BIG: above 1 MiB.
        """
        if size & (size - 1) or size < PAGE or size < RING_RESERVED * run_page.DIRTY_GFN_SIZE:
            raise KvmError(EINVAL, reason="ring size")
        if size > MAX_DIRTY_RING_BYTES:
            raise KvmError(E2BIG, reason="ring size")
        if self.ring_bytes or self._memory.vm.vcpus:
            raise KvmError(EINVAL, reason="dirty rings are set up once, before the first vCPU")
        self.ring_bytes = size

    def reset_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: harvested pages are watched again. Returns how many. EINVAL without rings.
        """
        if not self.ring_bytes:
            raise KvmError(EINVAL, reason="no dirty rings")
        memory = self._memory
        with memory.lock, memory.quiesced():
            harvested = [entry for vcpu in memory.vm.vcpus for entry in self._ring_of(vcpu).take_harvested()]
            for number, page in harvested:
                slot = memory.slot(number)
                if slot is not None and slot.bitmap is not None and page < slot.pages:
                    bit = bytes([1 << page % 8])
                    slot.bitmap.gather()
                    slot.bitmap.clear(page // 64 * 64, bytes(page % 64 // 8) + bit)
                    self._shadow(slot)[page // 8] &= ~bit[0]
            if harvested:
                memory.flush_write_permissions()
                memory.hand_over_parts()
        return len(harvested)

    @staticmethod
    def _ring_of(vcpu: Vcpu) -> DirtyRing:
        assert vcpu.dirty_ring is not None
        return vcpu.dirty_ring

    @staticmethod
    def _shadow(slot: Slot) -> bytearray:
        if slot.ring_shadow is None:
            assert slot.bitmap is not None
            slot.ring_shadow = bytearray(slot.bitmap.size)
        return slot.ring_shadow

    def collect(self, ring: DirtyRing) -> None:
        """Put pages that became dirty since the last time into `ring`, as far as there is room."""
        with self._memory.lock:
            self.wrote = False
            for slot in self._memory:
                if slot.bitmap is not None and ring.free:
                    for page in slot.bitmap.new_since(self._shadow(slot), ring.free):
                        ring.push(slot.number, page)


class DirtyRing:
    """The dirty ring of one vCPU: kvm_dirty_gfn entries in a memfd that the client maps and harvests.

    An entry goes 0 -> DIRTY (we) -> DIRTY|RESET or RESET (client) -> 0 (RESET ioctl). Everything in it is
    read as hostile: only our own indices say where we are, and a harvested entry's slot and page are our
    copies.
    """

    def __init__(self, size: int, name: str) -> None:
        self.entries = size // run_page.DIRTY_GFN_SIZE
        self.soft_limit = self.entries - RING_RESERVED
        self.budget = 0
        """What the hart's dirty_budget was set to: less there means that it has dirtied pages."""
        self.fd = create_memfd(name, size)
        self._mapping = Mapping([(self.fd, 0, size)])
        self._pushed: list[tuple[int, int]] = []
        self._dirty_index = 0
        self._reset_index = 0

    @property
    def used(self) -> int:
        """Entries pushed and not yet reset."""
        return self._dirty_index - self._reset_index

    @property
    def free(self) -> int:
        return self.entries - self.used

    @property
    def full(self) -> bool:
        """At or above the soft limit: RUN returns KVM_EXIT_DIRTY_RING_FULL instead of entering the guest."""
        return self.used >= self.soft_limit

    def push(self, slot: int, page: int) -> None:
        """A page became dirty. The flags word is written last."""
        at = self._dirty_index % self.entries * run_page.DIRTY_GFN_SIZE
        view = self._mapping.view
        run_page.DIRTY_GFN.pack_into(view, at, 0, slot, page)
        run_page.U32.pack_into(view, at, structs.DIRTY_GFN_DIRTY)
        self._pushed.append((slot, page))
        self._dirty_index += 1

    def take_harvested(self) -> list[tuple[int, int]]:
        """The (slot, page) of entries that the client has marked as harvested, in order; their flags become
        0.
        """
        view = self._mapping.view
        done = 0
        while self._reset_index < self._dirty_index:
            at = self._reset_index % self.entries * run_page.DIRTY_GFN_SIZE
            if not run_page.U32.unpack_from(view, at)[0] & structs.DIRTY_GFN_RESET:
                break
            run_page.U32.pack_into(view, at, 0)
            self._reset_index += 1
            done += 1
        taken, self._pushed = self._pushed[:done], self._pushed[done:]
        return taken

    def close(self) -> None:
        """The vCPU is gone."""
        self._mapping.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
