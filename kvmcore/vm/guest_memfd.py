"""guest_memfd: guest memory that kvmcore owns and the client may map (KVM_ABI 1.13, x86's MMAP|INIT_SHARED).

Made by KVM_CREATE_GUEST_MEMFD, bound to memslots by KVM_SET_USER_MEMORY_REGION2. The file is a sealed
memfd, so nobody can shrink it under a running guest. It keeps its VM alive while its handle is open; slots
keep the memory after that. On RISC-V this is a declared extension.
"""

from __future__ import annotations

import os
import threading
from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING

from kvmcore.vm.objects import GuestMemfdBase
from protocol.abi import structs
from protocol.abi.capabilities import GUEST_MEMFD_FLAGS
from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import PAGE, Mapping, create_memfd

if TYPE_CHECKING:
    from kvmcore.vm.vm import Vm


class GuestMemfd(GuestMemfdBase):
    """`size` bytes of guest memory in the memfd `fd`. A byte may be bound to one slot at a time."""

    def __init__(self, vm: Vm, size: int, flags: int) -> None:
        """EINVAL: unknown flags, or a size that is zero, negative as an s64, or not whole pages."""
        if flags & ~GUEST_MEMFD_FLAGS:
            raise KvmError(EINVAL, reason=f"guest_memfd flags {flags:#x}")
        if not 0 < size < 1 << 63 or size % PAGE:
            raise KvmError(EINVAL, reason="a guest_memfd has whole pages")
        super().__init__(vm)
        self.size = size
        self.flags = flags
        try:
            self.fd = create_memfd("kvm-guest-memfd", size)
        except OSError as error:
            raise KvmError(ENOMEM, reason=str(error)) from error
        self._mapping: Mapping | None = None
        self._bound: list[tuple[int, int]] = []
        self._numbers = 0
        self._lock = threading.Lock()

    @classmethod
    def bindable(cls, vm: Vm, number: int, offset: int, size: int) -> GuestMemfd:
        """The guest_memfd that `number` stands for, if [offset, offset + size) of it may be bound in `vm`.

        EBADF: no such number. EINVAL: something else, another VM's, beyond its end, or bound already.
        """
        gmem = vm.session.lookup(number)
        if not isinstance(gmem, GuestMemfd) or gmem.vm is not vm:
            raise KvmError(EINVAL, reason="not a guest_memfd of this VM")
        if offset + size > gmem.size:
            raise KvmError(EINVAL, reason="beyond the end of the guest_memfd")
        if any(start < offset + size and offset < start + length for start, length in gmem._bound):
            raise KvmError(EINVAL, reason="this part of the guest_memfd is bound to a slot")
        gmem.address()
        return gmem

    def address(self) -> int:
        """Host address of the file's first byte; mapped on first use. ENOMEM when it cannot be."""
        with self._lock:
            if self._mapping is None:
                try:
                    self._mapping = Mapping([(self.fd, 0, self.size)])
                except OSError as error:
                    raise KvmError(ENOMEM, reason=str(error)) from error
            return self._mapping.address

    def bind(self, offset: int, size: int) -> None:
        """A slot uses [offset, offset + size)."""
        self._bound.append((offset, size))

    def unbind(self, offset: int, size: int) -> None:
        """The slot is gone; no hart can touch the memory any more."""
        self._bound.remove((offset, size))
        self._release()

    def shared_fds(self) -> list[int]:
        """The memfd, when it was made with the MMAP flag."""
        return [self.fd] if self.flags & structs.GUEST_MEMFD_FLAG_MMAP and self._numbers else []

    def opened(self) -> None:
        self._numbers += 1
        super().opened()

    def closed(self) -> None:
        self._numbers -= 1
        self._release()
        super().closed()

    def _release(self) -> None:
        if self._numbers or self._bound:
            return
        with self._lock:
            mapping, self._mapping = self._mapping, None
            fd, self.fd = self.fd, -1
        if mapping is not None:
            mapping.close()
        if fd >= 0:
            os.close(fd)
