"""The target /dev/kvm: the same sequences on a real KVM, by ioctl(2), for the ioctls that all architectures share.

Linux is reached through `Kernel`, so that the rest can be tested on hosts without /dev/kvm. Runs no guest: what is
compared is the API. Host code and data must have the same meaning on x86 and RISC-V (little-endian, 64 bits).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from errno import EEXIST, EINTR, EINVAL
from typing import Any, Protocol

from protocol.abi import run_page
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs import CREATE_DEVICE_TEST
from qemu_user.fuzz import rules
from qemu_user.fuzz.executor import Outcome, errno_name
from qemu_user.fuzz.sequence import Op

_RUN = BY_NAME["RUN"].number
_NOWHERE = 0x7FFF_FFFF
_POINTEES = 8
"""Pointers of one operation, at most."""
_DESCRIPTORS = ("fd", "resamplefd", "guest_memfd")
_OTHERS = 1 << 24
"""Beyond any descriptor of this process."""


class Kernel(Protocol):
    """What is used of Linux."""

    def open(self) -> int:
        """A descriptor of /dev/kvm. OSError."""

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        """ioctl(2). OSError."""

    def close(self, fd: int) -> None:
        """close(2). OSError."""

    def run_page(self, vcpu: int) -> mmap.mmap:
        """kvm_run of a vCPU. OSError."""


class Linux:
    """The real one."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._path = path
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

    def open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        while (result := int(self._ioctl(fd, request, argument))) < 0:
            number = ctypes.get_errno()
            if number != EINTR or request == _RUN:  # CREATE_VM may be interrupted by whoever stops this process for a while
                raise OSError(number, os.strerror(number))
        return result

    def close(self, fd: int) -> None:
        os.close(fd)

    def run_page(self, vcpu: int) -> mmap.mmap:
        return mmap.mmap(vcpu, mmap.PAGESIZE)


class DevKvm:
    """Performs sequences on /dev/kvm. Mapped memory is one anonymous mapping, with holes where nothing is mapped.

    Closing a VM keeps one waiting for milliseconds: threads do it.
    """

    _CLOSERS = 4
    _MOST_CLOSING = 64

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.system = kernel.open()
        self._segments = Segments()
        self._closers = ThreadPoolExecutor(self._CLOSERS)
        self._closing: deque[Future[None]] = deque()

    def start(self) -> DevKvmSequence:
        """A fresh VM; the sequence before must be closed. OSError."""
        self._segments.reset()
        return DevKvmSequence(self._kernel, self.system, self._segments, self._close_later)

    def _close_later(self, fds: list[int]) -> None:
        self._closing.append(self._closers.submit(self._close_all, fds))
        while self._closing and (self._closing[0].done() or len(self._closing) > self._MOST_CLOSING):
            self._closing.popleft().result()

    def _close_all(self, fds: list[int]) -> None:
        for fd in fds:
            with contextlib.suppress(OSError):
                self._kernel.close(fd)

    def close(self) -> None:
        self._closers.shutdown()
        self._segments.close()
        self._kernel.close(self.system)


class Segments:
    """The memory that {"map": n} points into: a stretch of this process, of which parts are mapped."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        self._libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._size = rules.MAPS * rules.MAP_SIZE + _POINTEES * (rules.MAP_SIZE + rules.PAGE)
        self.base = self._put(None, self._size, 0, 0)
        self._mapped: set[int] = set()
        self._used = self._laid = 0

    def _put(self, address: int | None, size: int, prot: int, fixed: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000 | fixed  # MAP_NORESERVE
        found = self._libc.mmap(address, size, prot, flags, -1, 0)
        if found is None or found == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "mmap")
        return int(found)

    def change(self, index: int, mapped: bool) -> None:
        """Map a segment, or take it away. OSError as kvmcore has it: EEXIST, EINVAL."""
        if (index in self._mapped) == mapped:
            raise OSError(EEXIST if mapped else EINVAL, "segment")
        self._put(self.base + index * rules.MAP_SIZE, rules.MAP_SIZE, 3 * mapped, 0x10)  # MAP_FIXED
        (self._mapped.add if mapped else self._mapped.discard)(index)

    def reset(self) -> None:
        """Nothing is mapped any more."""
        for index in list(self._mapped):
            self.change(index, False)

    def begin(self) -> None:
        """The next operation: what lay() has laid out is no longer needed."""
        self._used = 0

    def lay(self, data: bytes) -> int:
        """The address of `data`, behind whose last byte nothing is mapped: what reads or writes on gets EFAULT."""
        place = self.base + rules.MAPS * rules.MAP_SIZE + self._used * (rules.MAP_SIZE + rules.PAGE)
        if self._used >= self._laid:
            self._put(place, rules.MAP_SIZE, 3, 0x10)  # MAP_FIXED
            self._laid += 1
        self._used += 1
        address = place + rules.MAP_SIZE - len(data)
        ctypes.memmove(address, data, len(data))
        return address

    def close(self) -> None:
        self._libc.munmap(self.base, self._size)


class DevKvmSequence:
    """One VM, and the memory that the sequence's pointers lead to."""

    def __init__(self, kernel: Kernel, system: int, segments: Segments, close: Callable[[list[int]], None]) -> None:
        """`close`: is given the descriptors at the end."""
        self._kernel, self._segments, self._close_all = kernel, segments, close
        vm = kernel.ioctl(system, BY_NAME["CREATE_VM"].number, 0)
        self.made: dict[str, list[int]] = {"system": [system], "vm": [vm]}
        self._close: list[int] = [vm]
        self._ops: list[Op] = []

    def begin(self, ops: list[Op]) -> None:
        """outcomes() does them."""
        self._ops = ops

    def outcomes(self) -> Iterator[Outcome]:
        """Do operations in order."""
        return map(self.perform, self._ops)

    def perform(self, op: Op) -> Outcome:
        """Do one operation; those that have no meaning here succeed without effect, as on the other target."""
        try:
            if op.do == "ioctl":
                return self._ioctl(op)
            if op.do == "run":
                return self._run(op)
            if op.do == "eventfd":
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                os.eventfd_write(fd, min(int(op.arg), (1 << 64) - 2))
                self._close.append(fd)
                self.made.setdefault("eventfd", []).append(fd)
            elif op.do in ("map", "unmap"):
                self._segments.change(int(op.arg) % rules.MAPS, op.do == "map")
            elif op.do == "close":
                fd = self.number(*op.on)
                self._kernel.close(fd)
                if fd in self._close:
                    self._close.remove(fd)
                self.made[op.on[0]][op.on[1]] = _NOWHERE  # Linux gives the number to the next one
        except OSError as error:
            return Outcome(-1, errno_name(error.errno or EINVAL))
        return Outcome()

    def number(self, kind: str, position: int) -> int:
        """The descriptor of a resource; one that is not open if there is none."""
        made = self.made.get(kind, [])
        return made[position] if position < len(made) else _NOWHERE

    def _run(self, op: Op) -> Outcome:
        """KVM_RUN with immediate_exit: no guest runs here."""
        vcpu = self.number(*op.on)
        if vcpu != _NOWHERE:
            with contextlib.suppress(OSError, ValueError), self._kernel.run_page(vcpu) as page:
                page[run_page.IMMEDIATE_EXIT] = 1
        return Outcome(self._kernel.ioctl(vcpu, _RUN, int(op.arg)))

    def _ioctl(self, op: Op) -> Outcome:
        row = BY_NAME.get(op.name)
        fd = self.number(*op.on)
        if row is None:
            return Outcome(self._kernel.ioctl(fd, int(op.extra.get("request", 0)), int(op.arg)))
        if row.argument is None or op.members is None:
            ret = self._kernel.ioctl(fd, row.number, int(op.arg) & (1 << 64) - 1)
            buffers: list[tuple[int, int]] = []
        else:
            self._segments.begin()
            buffers = []
            members = {name: self._resolve(value, buffers) for name, value in op.members.items()}
            for field in row.argument.fields:
                if isinstance(members.get(field.name), int) and field.count is None and field.type != "bytes":
                    value = members[field.name] & (1 << 8 * field.size) - 1
                    if field.name in _DESCRIPTORS and isinstance(op.members[field.name], int) and value < _OTHERS:
                        value += _OTHERS  # small numbers are descriptors of this process here, and nothing there
                    members[field.name] = value - (1 << 32) if field.type == "s32" and value >> 31 else value
            data = row.argument.build(**members) + bytes.fromhex(op.tail)
            address = self._segments.lay(data)
            ret = self._kernel.ioctl(fd, row.number, address)
            if op.name == "CREATE_DEVICE":
                made = row.argument.parse(ctypes.string_at(address, row.argument.size))
                ret = 0 if made.flags & CREATE_DEVICE_TEST else made.fd
        kind = rules.MAKES.get(op.name)
        if kind is not None and ret:  # 0: it was asked only whether there could be one
            self.made.setdefault(kind, []).append(ret)
            self._close.append(ret)
            ret = 0
        return Outcome(ret, "", {1 + place: ctypes.string_at(*buffer).hex() for place, buffer in enumerate(buffers)})

    def _resolve(self, value: Any, buffers: list[tuple[int, int]]) -> Any:
        if not isinstance(value, dict):
            return value
        if "ref" in value:
            return self.number(str(value["ref"][0]), int(value["ref"][1]))
        if "map" in value:
            return self._segments.base + int(value["map"])
        data = bytes.fromhex(value["in"]) if "in" in value else bytes(int(value["out"]))
        buffers.append((self._segments.lay(data), len(data)))
        return buffers[-1][0]

    def close(self) -> None:
        """Close everything."""
        self._close_all(self._close[::-1])
