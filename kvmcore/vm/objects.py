"""What the objects behind handles have in common, and what they may ask of the server above them.

`Handle` is the base of Vm, Vcpu, Device, GuestMemfd and Stats; `Session` and `Loop` are the interfaces that
kvmcore/server implements (vm never imports server). Called by kvmcore/vm/*, kvmcore/ioctl/*, kvmcore/server/*.

How an ioctl handler of kvmcore/ioctl/{system,vm,vcpu,device}.py is called
    fn(handle, argument) -> int | bytes | Handle | Deferred | None,  raising KvmError(errno)
* `handle` is the object itself (Vm, Vcpu, ...). `handle.session.mm` is the caller's address space
  (copy_from_user / copy_to_user raise EFAULT); `handle.session.lookup(number)` resolves an "fd" in a struct.
* `argument`: a row with a struct of fixed size gets it copied in and parsed; a row without one gets the plain
  integer; a row of variable size (GET_REG_LIST, SET_GSI_ROUTING, SET_SIGNAL_MASK) gets the integer, the pointer,
  and copies for itself.
* result: an int is the ioctl's return value, None is 0, bytes are copied out to the argument's pointer (0), a
  Handle is installed in the session and its number is the return value. A number that goes *into* a struct
  (create_device.fd) comes from `handle.session.install(object)`.
* vCPU handlers run with vcpu.mutex held, on the vCPU's thread or on the I/O thread when it is idle; VM and device
  handlers run on the I/O thread and must not block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EBADF, EINVAL
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Protocol

from protocol.abi.errors import KvmError
from protocol.channel.shared_memory import Mapping, is_sealed

if TYPE_CHECKING:
    from kvmcore.vm.address_space import AddressSpace
    from kvmcore.vm.vm import Vm
    from protocol.abi.compat import Compat


class Loop(Protocol):
    """The I/O loop of a VM process, as eventfd and timer code may use it. Callbacks run on the I/O thread."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` whenever `fd` is readable (level triggered). One callback per fd."""

    def remove_reader(self, fd: int) -> None:
        """Stop watching `fd`; harmless if it is not watched. Must come before os.close(fd)."""

    def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the I/O thread soon. Any thread may call it."""


class Session(Protocol):
    """A client process as its VMs see it: an address space and a table of numbers (handles and passed files)."""

    mm: AddressSpace
    compat: Compat

    def install(self, handle: Handle) -> int:
        """Give `handle` an unguessable number (a positive s32) in this session's table. EMFILE when it is full."""

    def lookup(self, number: int) -> Handle | HostFile:
        """What `number` (u32 or s32) stands for; KvmError(EBADF) if nothing."""


class HostFile:
    """A descriptor that the client passed, known under the client's own number for it (an eventfd mostly).

    Whoever keeps it beyond the call must `dup()` it: the client may close its number at any time.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._mapping: tuple[tuple[int, int, int], Mapping] | None = None

    @cached_property
    def eventfd_id(self) -> int | None:
        """The kernel's id of this eventfd, the same for every descriptor of it; None: it is something else."""
        with open(f"/proc/self/fdinfo/{self.fd}", encoding="ascii") as info:
            lines = dict(line.split(":", 1) for line in info if line.startswith("eventfd-"))
        if "eventfd-count" not in lines:
            return None
        if "eventfd-id" in lines:
            return int(lines["eventfd-id"])
        status = os.fstat(self.fd)  # Linux before 5.2 shows no id
        return status.st_dev << 32 | status.st_ino

    def mapped(self, offset: int, size: int, prot: int) -> Mapping:
        """A piece of this sealed memfd. The last one is kept as long as the descriptor is passed, for who maps it again and
        again. EINVAL: the size may change, or does not reach so far; OSError.
        """
        key = (offset, size, prot)
        if self._mapping is None or self._mapping[0] != key:
            if not is_sealed(self.fd):
                raise KvmError(EINVAL, reason="segments need a memfd sealed with F_SEAL_SHRINK|F_SEAL_GROW")
            if offset + size > os.fstat(self.fd).st_size:
                raise KvmError(EINVAL, reason="segment ends beyond its file")
            self._mapping = key, Mapping([(self.fd, offset, size)], prot)
        return self._mapping[1]

    def dup(self) -> int:
        """A new close-on-exec descriptor of the same open file, owned by the caller. KvmError(EMFILE)."""
        try:
            return os.dup(self.fd)
        except OSError as error:
            raise KvmError(error.errno or EBADF, reason="no descriptor left for it") from error

    def close(self) -> None:
        os.close(self.fd)


def eventfd_of(session: Session, number: int) -> HostFile:
    """The eventfd behind `number`. EBADF: no such number; EINVAL: it is something else."""
    file = session.lookup(number)
    if not isinstance(file, HostFile) or file.eventfd_id is None:
        raise KvmError(EINVAL, reason="not an eventfd")
    return file


class Handle:
    """An object that a session holds under a number. `kind` selects the rows of the ioctl table that apply."""

    kind: ClassVar[str] = ""
    session: Session
    dead: bool = False
    """Whether its VM is: every ioctl is EIO then."""

    def opened(self) -> None:
        """The object has got its number."""

    def closed(self) -> None:
        """The last number of the object is gone (CLOSE, or the session died)."""

    def shared_fds(self) -> list[int]:
        """Descriptors that a client may map (mmap of the Linux fd), borrowed. Nothing mappable: empty."""
        return []

    def read(self, offset: int, size: int) -> bytes:
        """pread() on the handle, for those that are files (statistics)."""
        raise KvmError(EINVAL, reason=f"{self.kind} handles cannot be read")


class System(Handle):
    """Base of the /dev/kvm handle. The daemon's own subclass knows how to make a VM process."""

    kind = "system"

    def __init__(self, session: Session) -> None:
        self.session = session

    def create_vm(self, machine_type: int) -> int | Handle | Deferred:
        """KVM_CREATE_VM, for the handler of that name to call and to return the result of."""
        raise KvmError(EINVAL, reason="this process makes no VMs")


class Deferred:
    """Returned by a handler whose answer comes later: the server sends the reply when it is there."""


class VmChild(Handle):
    """A handle that keeps its VM alive while it is open: vCPU, device, guest_memfd, statistics (KVM_ABI 1.14)."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.session = vm.session

    @property
    def dead(self) -> bool:  # type: ignore[override]
        return self.vm.dead

    def opened(self) -> None:
        self.vm.get()

    def closed(self) -> None:
        self.vm.put()


class Device(VmChild):
    """Base of what KVM_CREATE_DEVICE makes. Attributes are (group u32, attr u64, addr pointer)."""

    kind = "device"


class GuestMemfdBase(VmChild):
    """Base of what KVM_CREATE_GUEST_MEMFD makes: `fd` is the sealed memfd, `size` its bytes."""

    kind = "guest_memfd"


class StatsBase(VmChild):
    """Base of what KVM_GET_STATS_FD makes: a read-only file (header, id, descriptors, data)."""

    kind = "stats"


def not_found(number: int) -> KvmError:
    """The error for a number that stands for nothing: the same for stale, foreign and invented ones."""
    return KvmError(EBADF, reason=f"no handle {number}")
