"""The guest's physical memory: memslots, and how they resolve to memory of this process (KVM_ABI 1.7, 1.13).

A slot maps guest-physical pages either to the client's address space (userspace_addr) or to a guest_memfd.
Called by kvmcore/ioctl/vm.py, by exits.py (was that a hole?) and by the SBI (buffers). Changes reach the
engine as a new list of SlotView while no hart runs guest code: once an ioctl returns, no vCPU can touch
what it removed. The dirty log and ring are in dirty.py. Must never hand out host memory that no slot
covers.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST, EFAULT, EINVAL, EPERM
from typing import TYPE_CHECKING, NamedTuple

from kvmcore.vm.address_space import TASK_SIZE
from kvmcore.vm.dirty import DirtyBitmap, DirtyTracking
from kvmcore.vm.guest_memfd import GuestMemfd
from protocol.abi import structs
from protocol.abi.capabilities import NR_MEMSLOTS
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, PROT_WRITE

if TYPE_CHECKING:
    from kvmcore.vm.address_space import Segment
    from kvmcore.vm.vm import Vm

MAX_PAGES = (1 << 31) - 1
_LOG, _READONLY, _GMEM = structs.MEM_LOG_DIRTY_PAGES, structs.MEM_READONLY, structs.MEM_GUEST_MEMFD
_USERFAULT = structs.MEM_USERFAULT


class Piece(NamedTuple):
    """Part of a slot with one backing: [gpa, gpa + size) is host memory at `host`, or nothing when host is
    0.
    """

    gpa: int
    size: int
    host: int


class Slot:
    """One memslot. Immutable but for `bitmap` and `pieces`; a change makes a new Slot."""

    def __init__(
        self,
        number: int,
        flags: int,
        gpa: int,
        size: int,
        hva: int,
        gmem: GuestMemfd | None,
        gmem_offset: int,
    ) -> None:
        self.number = number
        self.flags = flags
        self.gpa = gpa
        self.size = size
        self.hva = hva
        self.gmem = gmem
        self.gmem_offset = gmem_offset
        self.bitmap: DirtyBitmap | None = None
        """Pages written since they were last cleared; the engine sets bits in it. None when nothing logs."""
        self.ring_shadow: bytearray | None = None
        """With dirty rings: the pages that are in some ring already."""
        self.userfault = 0
        """Host address of the bitmap of pages that user space has yet to put there; 0: all are."""
        self.userfault_segment: Segment | None = None
        self.pieces: list[Piece] = []
        self._segments: list[Segment] = []

    @property
    def end(self) -> int:
        return self.gpa + self.size

    @property
    def pages(self) -> int:
        return self.size // PAGE

    @property
    def readonly(self) -> bool:
        return bool(self.flags & _READONLY)

    def resolve(self, segments: list[Segment]) -> None:
        """Work out the pieces anew. `segments` are those of the session that overlap [hva, hva + size)."""
        if self.gmem is not None:
            self.pieces = [Piece(self.gpa, self.size, self.gmem.address() + self.gmem_offset)]
            return
        self._segments = segments  # keeps their mappings while the engine uses them
        pieces: list[Piece] = []
        at, end = self.hva, self.hva + self.size
        for segment in segments:
            start, stop = max(at, segment.va), min(end, segment.end)
            if at < start:
                pieces.append(Piece(self.gpa + at - self.hva, start - at, 0))
            host = segment.host_address + start - segment.va
            pieces.append(Piece(self.gpa + start - self.hva, stop - start, host))
            at = stop
        if at < end:
            pieces.append(Piece(self.gpa + at - self.hva, end - at, 0))
        self.pieces = pieces

    def host(self, gpa: int) -> int:
        """Host address of a guest-physical address inside this slot; 0 where the client has nothing mapped.
        """
        for piece in self.pieces:
            if piece.gpa <= gpa < piece.gpa + piece.size:
                return piece.host + gpa - piece.gpa if piece.host else 0
        return 0


class Memory:
    """The slots of one VM. `lock` is Linux's slots_lock: below vm.lock and vcpu.mutex."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.lock = threading.RLock()
        self.dirty = DirtyTracking(self)
        self._slots: dict[int, Slot] = {}
        self._map: tuple[list[Slot], list[int]] = ([], [])
        """Slots by guest address, and where they start. Replaced as a whole: vCPU threads look without a lock."""
        vm.session.mm.listeners.append(self._remapped)

    # -- looking -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self._map[0])

    def slot(self, number: int) -> Slot | None:
        """The slot with this number (address space 0)."""
        return self._slots.get(number)

    def lookup(self, gpa: int) -> Slot | None:
        """The slot that covers a guest-physical address."""
        slots, starts = self._map
        index = bisect_right(starts, gpa) - 1
        if index >= 0 and index < len(slots) and gpa < slots[index].end:
            return slots[index]
        return None

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes of guest memory. KvmError(EFAULT) when any of them is not RAM."""
        with self.lock:
            return b"".join(ctypes.string_at(host, length) for host, length, _ in self._walk(gpa, size))

    def write(self, gpa: int, data: bytes) -> None:
        """Write guest memory and log it as dirty. EFAULT (nothing written) when any byte is not writable
        RAM.
        """
        with self.lock:
            at = 0
            for host, length, slot in list(self._walk(gpa, len(data), writable=True)):
                ctypes.memmove(host, data[at : at + length], length)
                if slot.bitmap is not None:
                    self.dirty.wrote = True
                    slot.bitmap.set_range(
                        (gpa + at - slot.gpa) // PAGE, (gpa + at + length - 1 - slot.gpa) // PAGE
                    )
                at += length

    def _walk(self, gpa: int, size: int, writable: bool = False) -> Iterator[tuple[int, int, Slot]]:
        while size > 0:
            slot = self.lookup(gpa)
            piece = next((p for p in slot.pieces if p.gpa <= gpa < p.gpa + p.size), None) if slot else None
            if slot is None or piece is None or piece.host == 0 or (writable and slot.readonly):
                raise KvmError(EFAULT, reason=f"guest address {gpa:#x} is not memory")
            length = min(size, piece.gpa + piece.size - gpa)
            yield piece.host + gpa - piece.gpa, length, slot
            gpa += length
            size -= length

    # -- KVM_SET_USER_MEMORY_REGION(2) -------------------------------------------------------------

    def set_region(
        self,
        number: int,
        flags: int,
        gpa: int,
        size: int,
        hva: int,
        *,
        allowed_flags: int = _LOG | _READONLY,
        gmem_number: int = 0,
        gmem_offset: int = 0,
        userfault: int = 0,
    ) -> None:
        """Create, change, move or delete a slot (size 0). The order of the checks is Linux's (section 1.7).
        """
        self._check(number, flags, gpa, size, hva, allowed_flags, gmem_offset)
        with self.lock:
            old = self._slots.get(number)
            if size == 0:
                if old is None:
                    raise KvmError(EINVAL, reason=f"slot {number} does not exist")
                self._replace(old, None)
                return
            if old is not None:
                same_gmem = self._check_change(old, flags, gpa, size, hva, gmem_number, gmem_offset)
                if gpa == old.gpa and flags == old.flags and not same_gmem:
                    return
            if (old is None or gpa != old.gpa) and self._overlaps(number, gpa, gpa + size):
                raise KvmError(EEXIST, reason="slots may not overlap")
            gmem = old.gmem if old is not None else None
            if flags & _GMEM and old is None:
                gmem = GuestMemfd.bindable(self.vm, gmem_number, gmem_offset, size)
            new = Slot(number, flags, gpa, size, hva, gmem, gmem_offset)
            self._check_arch(new)
            if flags & _USERFAULT:
                self._find_bitmap(new, userfault)
            self._replace(old, new)

    def _check(
        self, number: int, flags: int, gpa: int, size: int, hva: int, allowed_flags: int, gmem_offset: int
    ) -> None:
        if flags & ~allowed_flags or (flags & _GMEM and flags & _READONLY):
            raise KvmError(EINVAL, reason=f"flags {flags:#x}")
        if size % PAGE or gpa % PAGE or hva % PAGE:
            raise KvmError(EINVAL, reason="size, guest address and user address must be page aligned")
        if hva + size > TASK_SIZE:
            raise KvmError(EINVAL, reason="userspace_addr is outside user space")
        if flags & _GMEM and (gmem_offset % PAGE or gmem_offset + size >= 1 << 64):
            raise KvmError(EINVAL, reason="guest_memfd_offset")
        if number >= NR_MEMSLOTS:
            raise KvmError(EINVAL, reason=f"slot {number} (there is one address space, {NR_MEMSLOTS} slots)")
        if gpa + size >= 1 << 64 and gpa:
            raise KvmError(EINVAL, reason="guest addresses wrap")
        if size // PAGE > MAX_PAGES:
            raise KvmError(EINVAL, reason="slot too large")

    @staticmethod
    def _check_change(
        old: Slot, flags: int, gpa: int, size: int, hva: int, gmem_number: int, gmem_offset: int
    ) -> bool:
        """Whether `old` may become this. Returns True for a guest_memfd slot (whose LOG_DIRTY flag alone
        changes).
        """
        if flags & _GMEM:
            # Linux: immutable. Ours may have its dirty log switched on and off, which migration needs.
            if (
                old.gmem is None
                or (gpa, size, hva, gmem_offset) != (old.gpa, old.size, old.hva, old.gmem_offset)
                or flags == old.flags
                or (flags ^ old.flags) & ~(_LOG | _USERFAULT)
                or old.gmem is not old.gmem.vm.session.lookup(gmem_number)
            ):
                raise KvmError(EINVAL, reason="a slot on a guest_memfd can only be deleted")
            return True
        if size != old.size or hva != old.hva or (flags ^ old.flags) & (_READONLY | _GMEM):
            raise KvmError(EINVAL, reason="delete the slot first")
        return False

    def _overlaps(self, number: int, gpa: int, end: int) -> bool:
        slots, starts = self._map
        for slot in slots[max(bisect_right(starts, gpa) - 1, 0) :]:
            if slot.gpa >= end:
                return False
            if slot.end > gpa and slot.number != number:
                return True
        return False

    def _check_arch(self, new: Slot) -> None:
        if new.end >= 1 << self.vm.caps.gpa_bits:
            raise KvmError(EFAULT, reason="beyond the guest-physical address width")
        if new.gmem is None and not new.readonly:
            for segment in self.vm.session.mm.pieces(new.hva, new.size):
                if not segment.prot & PROT_WRITE:
                    raise KvmError(EPERM, reason="a writable slot over read-only user memory")

    def _find_bitmap(self, new: Slot, va: int) -> None:
        """The userfault bitmap at `va`: in one segment of the session, in whole words. EINVAL, EFAULT."""
        size = (new.pages + 63) // 64 * 8
        if va % 8:
            raise KvmError(EINVAL, reason="the userfault bitmap is not aligned to 8 bytes")
        segments = [s for s in self.vm.session.mm.pieces(va, size) if s.va <= va and va + size <= s.end]
        if not segments:
            raise KvmError(EFAULT, reason="the userfault bitmap is not mapped in one piece")
        new.userfault_segment = segments[0]
        new.userfault = segments[0].host_address + va - segments[0].va

    def _replace(self, old: Slot | None, new: Slot | None) -> None:
        """Put `new` in the place of `old`, in the tables and in the engine."""
        if new is not None:
            if new.flags & _LOG:
                if old is not None and old.bitmap is not None:
                    new.bitmap, new.ring_shadow = old.bitmap, old.ring_shadow
                else:
                    new.bitmap = self.dirty.new_bitmap(new.pages)
            new.resolve(self.vm.session.mm.pieces(new.hva, new.size) if new.gmem is None else [])
            if new.userfault and any((piece.gpa - new.gpa) // PAGE % 64 for piece in new.pieces):
                raise KvmError(EINVAL, reason="user memory under a userfault bitmap comes in pieces of 64 pages")
        with self.quiesced():
            if new is not None:
                self._slots[new.number] = new
            elif old is not None:
                del self._slots[old.number]
            slots = sorted(self._slots.values(), key=lambda slot: slot.gpa)
            self._map = (slots, [slot.gpa for slot in slots])
            self._hand_over()
        if old is not None and old.gmem is not None and (new is None or new.gmem is None):
            old.gmem.unbind(old.gmem_offset, old.size)
        elif old is None and new is not None and new.gmem is not None:
            new.gmem.bind(new.gmem_offset, new.size)

    # -- the engine --------------------------------------------------------------------------------

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """No hart runs guest code inside. Cheap as long as none ever has."""
        if self.vm.tells_engine:
            with self.vm.machine.quiesce():
                yield
        else:
            yield

    def publish(self) -> None:
        """Guests are about to run: give the engine the slots."""
        with self.lock, self.quiesced():
            self._hand_over()

    def flush_write_permissions(self) -> None:
        """Make every hart ask again before its next store to a page. Call inside quiesced()."""
        for vcpu in self.vm.vcpus:
            vcpu.hart.flush_tlb()

    def _hand_over(self) -> None:
        if not self.vm.tells_engine:
            return
        from kvmcore.engine.machine import SlotView

        views = []
        for slot in self._map[0]:
            if slot.bitmap is not None:
                slot.bitmap.gather()
            for piece in slot.pieces:
                bitmap = (
                    slot.bitmap.part((piece.gpa - slot.gpa) // PAGE, piece.size // PAGE) if slot.bitmap else 0
                )
                userfault = slot.userfault + (piece.gpa - slot.gpa) // PAGE // 8 if slot.userfault else 0
                views.append(SlotView(piece.gpa, piece.size, piece.host, slot.readonly, bitmap, userfault))
        self.vm.machine.set_slots(views)

    def hand_over_parts(self) -> None:
        """After DirtyBitmap.gather(): give the engine new parts, if there were unaligned ones."""
        if any(len(slot.pieces) > 1 for slot in self._map[0]):
            self._hand_over()

    def _remapped(self, va: int, size: int) -> None:
        """The client mapped or unmapped [va, va + size): slots over it have other memory now, or none."""
        with self.lock:
            touched = [
                slot
                for slot in self._map[0]
                if slot.gmem is None and slot.hva < va + size and va < slot.hva + slot.size
            ]
            if not touched:
                return
            with self.quiesced():
                for slot in touched:
                    slot.resolve(self.vm.session.mm.pieces(slot.hva, slot.size))
                self._hand_over()

    def release(self) -> None:
        """The VM is gone: let go of mappings and of the session's address space."""
        listeners = self.vm.session.mm.listeners
        if self._remapped in listeners:
            listeners.remove(self._remapped)
        with self.lock:
            slots, self._slots = list(self._slots.values()), {}
            self._map = ([], [])
        for slot in slots:
            if slot.gmem is not None:
                slot.gmem.unbind(slot.gmem_offset, slot.size)
