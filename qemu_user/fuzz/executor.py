"""Performs sequences on kvmcore, in a fresh VM each: the target ipc://PATH.

Keeps what the sequence has made (vCPUs, descriptors, mapped memory) by kind and position, and gives each operation's
outcome. Must end with everything closed, whatever the sequence was.
"""

from __future__ import annotations

import errno as errno_numbers
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import EBADF
from typing import Any

from protocol.abi import run_page
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs import CREATE_DEVICE_TEST
from protocol.channel.shared_memory import Mapping, create_memfd
from protocol.client import Kvm, Vm
from protocol.client.handle import ARGUMENT, POINTEE
from protocol.codec import control, envelope
from protocol.codec.envelope import COPY_IN, COPY_OUT, Copy, FrameError, Reply
from protocol.codec.session import Op as Message
from qemu_user.fuzz import rules
from qemu_user.fuzz.sequence import Op
from qemu_user.fuzz.wire import Gone, Hang, Wire

MAP_BASE = 0x10_0000_0000
"""Where the session's address space has the memory that {"map": n} points into."""
_RUN_SECONDS = 0.01
"""A guest that runs longer is kicked."""
_BEHIND_RUN_SECONDS = 0.5
_RUN = BY_NAME["RUN"].number
_NOWHERE = 0x7FFF_FFFF
"""A number that no resource has."""


@dataclass
class Outcome:
    """What came of one operation: ioctl(2)'s value (handles as 0), the errno's name or "", the bytes that came out."""

    ret: int = 0
    errno: str = ""
    out: dict[int, str] = field(default_factory=dict)
    reason: str = ""

    def same_as(self, other: Outcome) -> bool:
        """Equal in what a client can rely on."""
        return (self.ret, self.errno, self.out) == (other.ret, other.errno, other.out)

    def __str__(self) -> str:
        return self.errno or f"{self.ret}" + (f" {self.out}" if self.out else "")


def errno_name(number: int) -> str:
    """The symbol: 22 -> "EINVAL"."""
    return (
        {errno_numbers.EOPNOTSUPP: "EOPNOTSUPP"}.get(number) or errno_numbers.errorcode.get(number, str(number))
        if number
        else ""
    )


class Executor:
    """One client of one daemon. perform() may be called for one sequence after the other."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.kvm = Kvm.open(endpoint, name="fuzz")
        self._system = Wire(self.kvm.link)

    def start(self) -> Sequence:
        """A fresh VM to run a sequence in. KvmError."""
        return Sequence(self, self.kvm.create_vm())

    def close(self) -> None:
        self._system.close()
        self.kvm.close()

    def system_wire(self) -> Wire:
        return self._system


class Sequence:
    """A VM and what its sequence has made."""

    def __init__(self, executor: Executor, vm: Vm) -> None:
        self._executor, self.vm = executor, vm
        self.wire = Wire(vm.link)
        self.made: dict[str, list[int]] = {"system": [executor.kvm.number], "vm": [vm.number]}
        self._fds: list[int] = []
        self._pages: dict[int, Mapping] = {}

    def perform(self, op: Op) -> Outcome:
        """Do one operation. wire.Hang, wire.Gone: the server does not answer."""
        do: Callable[[Op], Outcome] | None = getattr(self, f"_do_{op.do}", None)
        if do is None:
            raise ValueError(f"no operation {op.do!r}")
        try:
            return do(op)
        except KvmError as error:
            if error.errno == errno_numbers.ECONNRESET:
                raise Gone(str(error)) from error
            return Outcome(-1, error.name, reason=error.reason)

    def release(self) -> None:
        """Give back what is ours, and leave the VM."""
        for mapping in self._pages.values():
            mapping.close()
        self.wire.close()
        for fd in self._fds:
            os.close(fd)

    def close(self) -> None:
        """Destroy the VM. Never raises for a server that is gone."""
        try:
            self.vm.close()
        except (KvmError, OSError):
            pass
        self.release()

    # -- operations -------------------------------------------------------------------------------------------------

    def _do_ioctl(self, op: Op) -> Outcome:
        if op.name not in BY_NAME:
            return self._request(op, int(op.extra.get("request", 0)), int(op.arg), ())
        row = BY_NAME[op.name]
        argument, copies = self.argument(op)
        outcome = self._request(op, row.number, argument, copies)
        kind = rules.MAKES.get(op.name)
        if kind and not outcome.errno:
            number = outcome.ret
            if op.name == "CREATE_DEVICE":
                data = bytes.fromhex(outcome.out.pop(0, ""))
                number = BY_NAME[op.name].argument.parse(data).fd if data else 0  # type: ignore[union-attr]
            if number and not (op.members or {}).get("flags", 0) & CREATE_DEVICE_TEST * (op.name == "CREATE_DEVICE"):
                self.made.setdefault(kind, []).append(number)
            outcome.ret = 0
        return outcome

    def _do_attack(self, op: Op) -> Outcome:
        from qemu_user.fuzz import transport

        transport.attack(self._executor.endpoint, str(op.extra["seed"]))
        return Outcome()

    def _do_control(self, op: Op) -> Outcome:
        return self._request(op, int(op.extra["request"]), int(op.arg), (), bytes.fromhex(op.tail))

    def _do_close(self, op: Op) -> Outcome:
        if op.on[0] == "eventfd":
            self.vm.link.say(Message.CLOSE_FILE, "close", self.number(*op.on))
            return Outcome()
        return self._request(op, control.CLOSE, 0, ())

    def _do_run(self, op: Op) -> Outcome:
        """KVM_RUN by message; a guest that does not come out by itself is kicked."""
        head = bytearray(run_page.UNION)
        head[run_page.IMMEDIATE_EXIT] = int(op.extra.get("immediate", 0))
        wire, number = self.wire, self.number(*op.on)
        sequence, frame = wire.frame(
            number, BY_NAME["RUN"].number, int(op.arg), payload=bytes(head), flags=envelope.FLAG_INLINE_PAGE
        )
        wire.send(frame)
        reply = self._await(wire, sequence, op, _RUN_SECONDS)
        return Outcome(reply.ret, errno_name(reply.errno))

    def _do_map(self, op: Op) -> Outcome:
        fd = create_memfd("fuzz", rules.MAP_SIZE)
        self._fds.append(fd)
        self.vm.map_segment(MAP_BASE + int(op.arg) * rules.MAP_SIZE, rules.MAP_SIZE, fd)
        return Outcome()

    def _do_unmap(self, op: Op) -> Outcome:
        self.vm.unmap_segment(MAP_BASE + int(op.arg) * rules.MAP_SIZE, rules.MAP_SIZE)
        return Outcome()

    def _do_eventfd(self, op: Op) -> Outcome:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        os.eventfd_write(fd, min(int(op.arg), (1 << 64) - 2))
        self._fds.append(fd)
        self.vm.link.say(Message.PASS_FILE, "sendmsg", fd, fds=[fd])
        self.made.setdefault("eventfd", []).append(fd)
        return Outcome()

    def _do_scribble(self, op: Op) -> Outcome:
        """Bytes into a vCPU's shared pages, as a hostile client writes them."""
        number = self.number(*op.on)
        mapping = self._pages.get(number)
        if mapping is None:
            fds = self.vm.link.say(Message.SHARE, "mmap", number)
            try:
                if len(fds) < 2:
                    return Outcome()
                mapping = self._pages[number] = Mapping([(fd, 0, run_page.PAGE) for fd in fds[:2]])
            finally:
                for fd in fds:
                    os.close(fd)
        data, at = bytes.fromhex(op.tail), int(op.arg) % run_page.MMAP_SIZE
        data = data[: run_page.MMAP_SIZE - at]
        mapping.view[at : at + len(data)] = data
        return Outcome()

    # -- requests ---------------------------------------------------------------------------------------------------

    def number(self, kind: str, position: int) -> int:
        """What the server calls a resource; a number of nothing if there is none."""
        made = self.made.get(kind, [])
        return made[position] if position < len(made) else _NOWHERE

    def argument(self, op: Op) -> tuple[int, tuple[Copy, ...]]:
        """The ioctl's argument, and the memory that it and what is in it point at."""
        row = BY_NAME[op.name]
        if row.argument is None or op.members is None:
            return int(op.arg) & (1 << 64) - 1, ()
        pointees: list[Copy] = []
        members = {name: self._resolve(value, pointees) for name, value in op.members.items()}
        for member in row.argument.fields:  # what a file's author may have written too large
            if isinstance(members.get(member.name), int) and member.count is None and member.type != "bytes":
                bits = 8 * member.size
                value = members[member.name] & (1 << bits) - 1
                members[member.name] = value - (1 << bits) if member.type == "s32" and value >> 31 else value
        data = row.argument.build(**members) + bytes.fromhex(op.tail)
        return ARGUMENT, (Copy(ARGUMENT, len(data), COPY_IN | COPY_OUT, data), *pointees)

    def _resolve(self, value: Any, pointees: list[Copy]) -> Any:
        if not isinstance(value, dict):
            return value
        if "ref" in value:
            return self.number(str(value["ref"][0]), int(value["ref"][1])) & 0xFFFFFFFF
        if "map" in value:
            return MAP_BASE + int(value["map"])
        va = POINTEE + len(pointees) * (1 << 20)
        if "in" in value:
            data = bytes.fromhex(value["in"])
            pointees.append(Copy(va, len(data), COPY_IN, data))
        else:
            size = int(value["out"])
            pointees.append(Copy(va, size, COPY_IN | COPY_OUT, bytes(size)))
        return va

    def _request(self, op: Op, number: int, arg: int, copies: tuple[Copy, ...], payload: bytes = b"") -> Outcome:
        wire = self._executor.system_wire() if op.on[0] == "system" else self.wire
        try:
            sequence, frame = wire.frame(self.number(*op.on), number, arg, copies, payload)
        except FrameError as error:
            return Outcome(-1, errno_name(EBADF), reason=str(error))
        wire.send(frame)
        return _outcome(self._await(wire, sequence, op, _RUN_SECONDS if number == _RUN else _BEHIND_RUN_SECONDS))

    def _await(self, wire: Wire, sequence: int, op: Op, patience: float) -> Reply:
        """The reply. A vCPU's ioctls wait while it runs, which a scribble on the doorbell may have asked for: kick it."""
        if op.on[0] != "vcpu":
            reply = wire.wait(sequence)
        else:
            end = time.monotonic() + wire.deadline
            while (reply := wire.wait(sequence, patience)) is None:
                if time.monotonic() > end:
                    raise Hang(f"no reply in {wire.deadline:g} s, though kicked")
                kick, frame = wire.frame(self.number(*op.on), control.KICK, 1)
                wire.send(frame)
                kicked = wire.wait(kick)
                if kicked is not None and kicked.errno and (reply := wire.wait(sequence, _BEHIND_RUN_SECONDS)) is None:
                    # Another thread has closed the vCPU under this RUN, which now ends with the VM, as in Linux.
                    raise KvmError(kicked.errno, op.name, "nobody can kick it any more")
                if reply is not None:
                    break
                patience = _BEHIND_RUN_SECONDS  # another thread's RUN may have taken the kick
        assert reply is not None  # Hang was raised otherwise
        return reply


def _outcome(reply: Reply) -> Outcome:
    out = {0 if va == ARGUMENT else 1 + (va - POINTEE) // (1 << 20): data.hex() for va, data in reply.copies}
    reason = reply.extra.decode(errors="replace") if reply.errno else ""
    return Outcome(reply.ret, errno_name(reply.errno), out, reason)
