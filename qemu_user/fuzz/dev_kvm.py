"""The target /dev/kvm: the same sequences on a real KVM, by ioctl(2), for the ioctls that all architectures share.

Linux is reached through `Kernel`, so that the rest can be tested on hosts without /dev/kvm. Runs no guest: what is
compared is the API. Host code and data must have the same meaning on x86 and RISC-V (little-endian, 64 bits).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from errno import EINVAL
from typing import Any, Protocol

from protocol.abi.ioctls import BY_NAME
from qemu_user.fuzz import rules
from qemu_user.fuzz.executor import Outcome, errno_name
from qemu_user.fuzz.sequence import Op

_NOWHERE = 0x7FFF_FFFF


class Kernel(Protocol):
    """What is used of Linux."""

    def open(self) -> int:
        """A descriptor of /dev/kvm. OSError."""

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        """ioctl(2). OSError."""

    def close(self, fd: int) -> None:
        """close(2). OSError."""


class Linux:
    """The real one."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._path = path
        self._ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        self._ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)

    def open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)

    def ioctl(self, fd: int, request: int, argument: int) -> int:
        result = int(self._ioctl(fd, request, argument))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def close(self, fd: int) -> None:
        os.close(fd)


class DevKvm:
    """Performs sequences on /dev/kvm. Mapped memory is one anonymous mapping, with holes where nothing is mapped."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.system = kernel.open()

    def start(self) -> DevKvmSequence:
        """A fresh VM. OSError."""
        return DevKvmSequence(self._kernel, self.system)

    def close(self) -> None:
        self._kernel.close(self.system)


class DevKvmSequence:
    """One VM, and the memory that the sequence's pointers lead to."""

    def __init__(self, kernel: Kernel, system: int) -> None:
        self._kernel = kernel
        vm = kernel.ioctl(system, BY_NAME["CREATE_VM"].number, 0)
        self.made: dict[str, list[int]] = {"system": [system], "vm": [vm]}
        self._close: list[int] = [vm]
        self._memory = mmap.mmap(-1, rules.MAPS * rules.MAP_SIZE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def perform(self, op: Op) -> Outcome:
        """Do one operation; those that have no meaning here succeed without effect, as on the other target."""
        try:
            if op.do == "ioctl":
                return self._ioctl(op)
            if op.do == "eventfd":
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                os.eventfd_write(fd, min(int(op.arg), (1 << 64) - 2))
                self._close.append(fd)
                self.made.setdefault("eventfd", []).append(fd)
            elif op.do == "close":
                fd = self.number(*op.on)
                self._kernel.close(fd)
                if fd in self._close:
                    self._close.remove(fd)
        except OSError as error:
            return Outcome(-1, errno_name(error.errno or EINVAL))
        return Outcome()

    def number(self, kind: str, position: int) -> int:
        """The descriptor of a resource; one that is not open if there is none."""
        made = self.made.get(kind, [])
        return made[position] if position < len(made) else _NOWHERE

    def _ioctl(self, op: Op) -> Outcome:
        row = BY_NAME.get(op.name)
        fd = self.number(*op.on)
        if row is None:
            return Outcome(self._kernel.ioctl(fd, int(op.extra.get("request", 0)), int(op.arg)))
        if row.argument is None or op.members is None:
            ret = self._kernel.ioctl(fd, row.number, int(op.arg) & (1 << 64) - 1)
            buffers: list[Any] = []
        else:
            pointees: list[Any] = []
            members = {name: self._resolve(value, pointees) for name, value in op.members.items()}
            for field in row.argument.fields:
                if isinstance(members.get(field.name), int) and field.count is None and field.type != "bytes":
                    value = members[field.name] & (1 << 8 * field.size) - 1
                    members[field.name] = value - (1 << 32) if field.type == "s32" and value >> 31 else value
            data = ctypes.create_string_buffer(
                row.argument.build(**members) + bytes.fromhex(op.tail), row.argument.size + len(op.tail) // 2
            )
            ret = self._kernel.ioctl(fd, row.number, ctypes.addressof(data))
            buffers = [data, *pointees]
        kind = rules.MAKES.get(op.name)
        if kind is not None:
            self.made.setdefault(kind, []).append(ret)
            self._close.append(ret)
            ret = 0
        return Outcome(ret, "", {place: buffer.raw.hex() for place, buffer in enumerate(buffers) if place})

    def _resolve(self, value: Any, pointees: list[Any]) -> Any:
        if not isinstance(value, dict):
            return value
        if "ref" in value:
            return self.number(str(value["ref"][0]), int(value["ref"][1]))
        if "map" in value:
            return self._base + int(value["map"])
        data = bytes.fromhex(value["in"]) if "in" in value else bytes(int(value["out"]))
        pointees.append(ctypes.create_string_buffer(data, max(len(data), 1)))
        return ctypes.addressof(pointees[-1])

    def close(self) -> None:
        """Close everything."""
        for fd in reversed(self._close):
            try:
                self._kernel.close(fd)
            except OSError:
                pass
