"""Queue notifications as ioeventfds: a guest's store signals an eventfd, and the device's I/O thread serves it.

A virtio-mmio kick stays where it is; a virtio-pci one moves with its BAR. Made by machine/machine.py, handed to
machine/build.py. Where no ioeventfd can be had (two BARs at one address), stores exit and devices see them as writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from protocol.abi.errors import KvmError
from protocol.abi.structs import IOEVENTFD_FLAG_DEASSIGN
from qemu_user.backends.io_loop import IoLoop
from qemu_user.devices.device import Doorbell

if TYPE_CHECKING:
    from protocol.client import Vm
    from protocol.client.batch import Answer


class Kicks:
    """All doorbells of one machine."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._fds: list[tuple[IoLoop, int]] = []
        self._gathered: list[tuple[_Kick, int, int]] | None = None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """What is placed inside, by this thread alone, is made known to kvmcore at the end, in one message."""
        self._gathered = []
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            self._tell(gathered)

    def _tell(self, placed: list[tuple[_Kick, int, int]]) -> None:
        with contextlib.suppress(KvmError):  # kvmcore is gone, and its ioeventfds with it
            batch = self._vm.batch()
            answers = [
                (kick, address, flags, batch.ioeventfd(self._vm, kick.fd, address, kick.length, kick.match, flags))
                for kick, address, flags in placed
            ]
            batch.send()
            for kick, address, flags, answer in answers:
                if not flags:
                    kick.placed(address, answer)

    def change(self, kick: _Kick, address: int, flags: int) -> None:
        """Of a kick that is placed at `address`, or no longer (IOEVENTFD_FLAG_DEASSIGN)."""
        if self._gathered is not None:
            self._gathered.append((kick, address, flags))
        else:
            self._tell([(kick, address, flags)])

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
        return _Kick(self, fd, length, match)

    def close(self) -> None:
        """Give the descriptors back."""
        fds, self._fds = self._fds, []
        for loop, fd in fds:
            loop.remove(fd)
            os.close(fd)


class _Kick:
    def __init__(self, kicks: Kicks, fd: int, length: int, match: int | None) -> None:
        self._kicks, self.fd, self.length, self.match = kicks, fd, length, match
        self.address: int | None = None
        """Where it is, as far as kvmcore could be told."""

    def place(self, address: int | None) -> None:
        if address == self.address:
            return
        if self.address is not None:
            self._kicks.change(self, self.address, IOEVENTFD_FLAG_DEASSIGN)
        self.address = address
        if address is not None:
            self._kicks.change(self, address, 0)

    def placed(self, address: int, answer: Answer) -> None:
        """What became of it: two BARs may be at one address."""
        try:
            answer.checked()
        except KvmError:
            if self.address == address:
                self.address = None
