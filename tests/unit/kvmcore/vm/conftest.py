"""A Vm on a real session and a real I/O loop, without an engine: what memslots, buses and the AIA's parts
need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from kvmcore import ioctl
from kvmcore.server.loop import EventLoop
from kvmcore.server.quotas import Quotas
from kvmcore.server.session import ClientSession, Peer
from kvmcore.vm.address_space import InlineSegment
from kvmcore.vm.objects import Handle, HostFile
from kvmcore.vm.vm import Vm
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.channel.shared_memory import PAGE, PROT_READ, PROT_WRITE, create_memfd

ARGUMENT = 0x7000_0000
POINTEE = 0x7001_0000


class Kernel:
    """A session with one VM, driven by ioctl(handle, name, **members) as the dispatcher would be."""

    def __init__(self, compat: Compat = Compat.DEFAULT) -> None:
        self.loop = EventLoop()
        self.session = ClientSession(
            ClientSession.new_id(), Peer(os.getpid(), os.getuid()), Quotas.of_this_process(), compat=compat
        )
        self.vm = Vm(self.session, self.loop, name="unit")
        self.number = self.session.install(self.vm)
        self.pointee = bytearray()
        self.out = b""
        self._next_file = 100

    def ioctl(self, handle: Handle, name: str, pointee: bytes = b"", **members: object) -> int:
        """Build the row's struct, call it, keep what came back in `out` and `pointee`."""
        row = BY_NAME[name]
        assert row.argument is not None
        data = InlineSegment(ARGUMENT, bytearray(row.argument.build(**members)))
        extra = InlineSegment(POINTEE, bytearray(pointee))
        with self.session.mm.overlay([data, extra]):
            result = ioctl.call(handle, row.number, ARGUMENT)
        self.out, self.pointee = bytes(data.data), extra.data
        assert isinstance(result, int)
        return result

    def call(self, handle: Handle, name: str, argument: int = 0) -> int:
        """An ioctl whose argument is an integer."""
        result = ioctl.call(handle, BY_NAME[name].number, argument)
        assert isinstance(result, int)
        return result

    def errno(self, handle: Handle, name: str, pointee: bytes = b"", **members: object) -> int:
        """As ioctl(), for those that fail: 0 when it did not."""
        try:
            self.ioctl(handle, name, pointee, **members)
        except KvmError as error:
            return error.errno or 0
        return 0

    def map(self, va: int, size: int, prot: int = PROT_READ | PROT_WRITE) -> int:
        """A segment of fresh memory at va; the memfd."""
        fd = create_memfd("unit", size)
        self.session.mm.map(va, size, HostFile(fd), 0, prot)
        return fd

    def region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0, **more: int) -> int:
        """KVM_SET_USER_MEMORY_REGION2's errno, 0 on success."""
        return self.errno(
            self.vm, "SET_USER_MEMORY_REGION2", slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size,
            userspace_addr=hva, **more,
        )  # fmt: skip

    def eventfd(self) -> tuple[int, int]:
        """(the client's number, our descriptor of it)."""
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        self._next_file += 1
        self.session.table.pass_file(self._next_file, os.dup(fd))
        return self._next_file, fd

    def turn(self) -> None:
        """Let the I/O loop serve what is ready."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.loop.run()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel()
    yield made
    made.session.close()


@pytest.fixture
def strict() -> Iterator[Kernel]:
    made = Kernel(Compat.STRICT)
    yield made
    made.session.close()


__all__ = ["ARGUMENT", "PAGE", "POINTEE", "Kernel"]
