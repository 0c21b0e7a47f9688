"""Queue notifications as ioeventfds: a guest's store signals an eventfd, and the device's I/O thread serves it.

A virtio-mmio kick stays where it is; a virtio-pci one moves with its BAR. Made by machine/machine.py, handed to
machine/build.py. Where no ioeventfd can be had (two BARs at one address), stores exit and devices see them as writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError
from protocol.abi.structs import IOEVENTFD_FLAG_DEASSIGN
from qemu_user.backends.io_loop import IoLoop
from qemu_user.devices.device import Doorbell

if TYPE_CHECKING:
    from protocol.client import Vm


class Kicks:
    """All doorbells of one machine."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._fds: list[tuple[IoLoop, int]] = []

    def make(self, loop: IoLoop, callback: Callable[[], None], length: int, match: int | None = None) -> Doorbell:
        """Stores of `length` bytes (of the value `match`, if one is given) call back on the thread of `loop`."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.append((loop, fd))

        def serve() -> None:
            try:
                os.eventfd_read(fd)
            except BlockingIOError:
                return
            callback()

        loop.add_reader(fd, serve)
        return _Kick(self._vm, fd, length, match)

    def close(self) -> None:
        """Give the descriptors back."""
        fds, self._fds = self._fds, []
        for loop, fd in fds:
            loop.remove(fd)
            os.close(fd)


class _Kick:
    def __init__(self, vm: Vm, fd: int, length: int, match: int | None) -> None:
        self._vm, self._fd, self._length, self._match = vm, fd, length, match
        self._address: int | None = None

    def place(self, address: int | None) -> None:
        if address == self._address:
            return
        if self._address is not None:
            with contextlib.suppress(KvmError):  # kvmcore is gone, and its ioeventfds with it
                self._vm.ioeventfd(self._fd, self._address, self._length, self._match, IOEVENTFD_FLAG_DEASSIGN)
        self._address = None
        if address is not None:
            with contextlib.suppress(KvmError):
                self._vm.ioeventfd(self._fd, address, self._length, self._match)
                self._address = address
