"""irqfds that are MSIs, delivered by native code: a thread that waits in epoll without the GIL and sets bits of IMSICs.

Used by irqfd.py, on the I/O thread, for signals that lead to one interrupt file and nowhere else; all others are the I/O
loop's. What the thread reads is a block that only we write (engine/native_bus.serve_irqfds).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct
import threading
from typing import TYPE_CHECKING

from kvmcore.engine import native_bus
from protocol.channel.latency import woken_soon

if TYPE_CHECKING:
    from kvmcore.engine.loader import Image

CAPACITY = 1024
_SIZE = -(-(native_bus.IRQ_TARGETS + CAPACITY * native_bus.IRQ_TARGET) // mmap.PAGESIZE) * mmap.PAGESIZE
_BELL = CAPACITY
"""The slot of the eventfd that calls the thread back to Python."""
_HAND_SHAKE_SECONDS = 5.0
_EPOLL_CTL_ADD = 1
_epoll_ctl = ctypes.CDLL(None, use_errno=True).epoll_ctl
_epoll_ctl.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p)


class NativeIrqfds:
    """Slots of {eventfd, target}."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._block = mmap.mmap(-1, _SIZE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._free = list(range(CAPACITY - 1, -1, -1))
        self._back = threading.Event()
        self._closed = False
        head = self._address + native_bus.IRQ_EVENT
        struct.pack_into("<Q", self._block, native_bus.IRQ_EPOLL, self._epoll.fileno())
        struct.pack_into("<QQ", self._block, native_bus.IRQ_IOVEC, head, 8)
        struct.pack_into("<Q", self._block, native_bus.IRQ_COUNT, CAPACITY)
        self._watch(self._bell, _BELL)
        self._thread = threading.Thread(target=self._serve, name="irqfds", daemon=True)
        self._thread.start()

    def add(self, fd: int, target: int) -> int | None:
        """Deliver signals of `fd` to `target` (Aia.native_target). The slot; None: there is no room."""
        if not self._free:
            return None
        slot = self._free.pop()
        struct.pack_into("<QQ", self._block, self._at(slot), fd, target)
        self._watch(fd, slot)
        return slot

    def retarget(self, slot: int, target: int) -> None:
        """Another message, from now on."""
        ctypes.c_uint64.from_buffer(self._block, self._at(slot) + 8).value = target

    def remove(self, slot: int) -> None:
        """When this returns nothing is delivered any more, and the descriptor may be closed."""
        (fd,) = struct.unpack_from("<Q", self._block, self._at(slot))
        self._epoll.unregister(fd)
        self._shake_hands()
        struct.pack_into("<QQ", self._block, self._at(slot), 0, native_bus.FOR_PYTHON)
        self._free.append(slot)

    def close(self) -> None:
        """The thread ends."""
        self._closed = True
        os.eventfd_write(self._bell, 1)
        self._thread.join(_HAND_SHAKE_SECONDS)
        self._epoll.close()
        os.close(self._bell)

    def _at(self, slot: int) -> int:
        return native_bus.IRQ_TARGETS + slot * native_bus.IRQ_TARGET

    def _watch(self, fd: int, slot: int) -> None:
        """epoll_ctl(2) by hand: Python's gives descriptors back, not what we call them."""
        event = struct.pack("<IQ", select.EPOLLIN, slot)
        if _epoll_ctl(self._epoll.fileno(), _EPOLL_CTL_ADD, fd, event):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def _shake_hands(self) -> None:
        self._back.clear()
        os.eventfd_write(self._bell, 1)
        self._back.wait(_HAND_SHAKE_SECONDS)

    def _serve(self) -> None:
        woken_soon()
        while not self._closed:
            if self._image.serve_irqfds(self._address) == _BELL:
                os.eventfd_read(self._bell)
                self._back.set()
