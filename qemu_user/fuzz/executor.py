"""Performs sequences on kvmcore, in a fresh VM each: the target ipc://PATH. See Executor for what "fresh" is.

Keeps what the sequence has made (vCPUs, descriptors, mapped memory) by kind and position, and gives each operation's
outcome. Must end with everything closed, whatever the sequence was.
"""

from __future__ import annotations

import ctypes
import errno as errno_numbers
import os
import threading
from collections.abc import Callable, Iterator
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
_RUN_SECONDS = 0.0003
"""A guest that runs longer (than this and than some round trips) is kicked."""
_BEHIND_RUN_SECONDS = 0.5
_RUN = BY_NAME["RUN"].number
_SEGMENTS = 64
"""Segments that a sequence may name."""
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
    """One client of one daemon, whose sequences run one after the other.

    Its VMs share a process of kvmcore unless `apart`, and what VMs do not own (mapped memory) stays where it is for the next
    sequence, cleared: that makes a fresh VM cheap. After _TOGETHER sequences the process is replaced.
    """

    _TOGETHER = 500

    def __init__(self, endpoint: str, *, apart: bool = False) -> None:
        self.endpoint, self._apart = endpoint, apart
        self.kvm = Kvm.open(endpoint, name="fuzz", together=not apart)
        self._system = Wire(self.kvm.link)
        self._place: Place | None = None

    def start(self) -> Sequence:
        """A fresh VM to run a sequence in. KvmError."""
        place = self._place
        if place is not None and (place.used >= self._TOGETHER or not place.usable):
            self.settle()
            place = None
        if place is None:
            if not self._apart:
                self.kvm.leave_shared()
            vm = self.kvm.create_vm()
            place = Place(vm, self.kvm.shared_number)
            self._place = place if not self._apart else None
            return Sequence(self, vm.number, place)
        return Sequence(self, place.next_vm(), place)

    def quiet(self) -> None:
        """Between sequences: the last one's VM and memory go now, so that what is left can be counted. Hang, Gone, KvmError."""
        if self._place is not None and self._place.usable:
            self._place.quiet()

    def settle(self) -> None:
        """Let go of the process that sequences have run in."""
        if self._place is not None:
            self._place.close()
            self._place = None
            self.kvm.leave_shared()

    def close(self) -> None:
        self.settle()
        self._system.close()
        self.kvm.close()

    def system_wire(self) -> Wire:
        return self._system


class Place:
    """A process of kvmcore as sequences use it: its connection, and the memory mapped there."""

    def __init__(self, vm: Vm, system: int | None) -> None:
        """`system`: its /dev/kvm, where further VMs are made; None if it has but this one."""
        self.vm, self.system = vm, system
        self.wire = Wire(vm.link)
        self.used = 1
        self.done = 0
        """The VM of the last sequence, which goes when the next one comes."""
        self._segments: dict[int, int] = {}
        self._claimed: set[int] = set()
        self._lock = threading.RLock()

    @property
    def usable(self) -> bool:
        """Whether the process lives and answers."""
        return not self.wire.failed and self.vm.link.alive

    def next_vm(self) -> int:
        """Close the last VM and make one, in one message; its number. KvmError; Hang, Gone."""
        assert self.system is not None
        self.used += 1
        self._claimed.clear()
        self.wire.forget()
        frames = [self.wire.frame(self.done, control.CLOSE_VM)] if self.done else []
        frames.append(self.wire.frame(self.system, BY_NAME["CREATE_VM"].number))
        self.done = 0
        self.wire.batch([frame for _, frame in frames])
        reply = self.wire.wait(frames[-1][0])
        assert reply is not None
        if reply.errno:
            raise KvmError(reply.errno, "CREATE_VM", reply.extra.decode(errors="replace"))
        return reply.ret

    def quiet(self) -> None:
        """Close the last VM and unmap everything."""
        if self.done:
            sequence, frame = self.wire.frame(self.done, control.CLOSE_VM)
            self.done = 0
            self.wire.send(frame)
            self.wire.wait(sequence)
        self._claimed.clear()
        self.settle_memory()

    # -- memory of the session: mapped by the sequence, or still by one before it -------------------------------------

    def map(self, index: int) -> None:
        """Segment number `index`, empty. KvmError: EEXIST."""
        with self._lock:
            if index in self._segments and index not in self._claimed:
                _clear(self._segments[index])
                self._claimed.add(index)
                return
            self.settle_memory()
            fd = create_memfd("fuzz", rules.MAP_SIZE)
            try:
                self.vm.map_segment(MAP_BASE + index * rules.MAP_SIZE, rules.MAP_SIZE, fd)
            except BaseException:
                os.close(fd)
                raise
            self._segments[index] = fd
            self._claimed.add(index)

    def unmap(self, index: int) -> None:
        """KvmError: EINVAL."""
        with self._lock:
            self.settle_memory()
            self.vm.unmap_segment(MAP_BASE + index * rules.MAP_SIZE, rules.MAP_SIZE)
            self._claimed.discard(index)
            os.close(self._segments.pop(index))

    def settle_memory(self) -> None:
        """Before anything can look at memory: what only earlier sequences have mapped goes."""
        if len(self._segments) == len(self._claimed):
            return
        with self._lock:
            for index in [index for index in self._segments if index not in self._claimed]:
                self.vm.unmap_segment(MAP_BASE + index * rules.MAP_SIZE, rules.MAP_SIZE)
                os.close(self._segments.pop(index))

    def close(self) -> None:
        """The VM goes, and with the last one the process. Never raises for a server that is gone."""
        self.wire.close()
        for fd in self._segments.values():
            os.close(fd)
        self._segments.clear()
        if self.system is not None or self.wire.failed:
            self.vm.link.close()
            return
        try:
            self.vm.close()
        except (KvmError, OSError):
            pass


def _clear(memfd: int) -> None:
    """Make it all zeros again."""
    _fallocate(memfd, _PUNCH_HOLE | _KEEP_SIZE, 0, rules.MAP_SIZE)


_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Sequence:
    """A VM and what its sequence has made."""

    def __init__(self, executor: Executor, number: int, place: Place, wire: Wire | None = None) -> None:
        """`wire`: a connection of one's own, for one thread of several."""
        self._executor, self.place = executor, place
        self.wire = wire or place.wire
        self.made: dict[str, list[int]] = {"system": [executor.kvm.number], "vm": [number]}
        self._fds: list[int] = []
        self._passed: set[int] = set()
        self._pages: dict[int, Mapping] = {}

    @property
    def pid(self) -> int:
        """The process that it runs in."""
        return self.place.vm.pid

    def perform_all(self, ops: list[Op]) -> Iterator[Outcome]:
        """Do them in order, as many in one message as do not depend on what the ones before give. Hang, Gone."""
        at = 0
        while at < len(ops):
            group = self._group(ops, at)
            if len(group) == 1:
                yield self.perform(ops[at])
            else:
                yield from self._perform_group(group)
            at += len(group)

    def perform(self, op: Op) -> Outcome:
        """Do one operation. wire.Hang, wire.Gone: the server does not answer."""
        do: Callable[[Op], Outcome] | None = getattr(self, f"_do_{op.do}", None)
        if do is None:
            raise ValueError(f"no operation {op.do!r}")
        try:
            if op.do != "map":
                self.place.settle_memory()
            return do(op)
        except KvmError as error:
            if error.errno == errno_numbers.ECONNRESET:
                raise Gone(str(error)) from error
            return Outcome(-1, error.name, reason=error.reason)

    def release(self) -> None:
        """Give back what is ours, and leave the VM."""
        for mapping in self._pages.values():
            mapping.close()
        self._pages.clear()
        for number in self._passed if self.place.usable and self.place.system is not None else ():
            try:
                self.place.vm.link.say(Message.CLOSE_FILE, "close", number)
            except KvmError:
                pass
        self._passed.clear()
        if self.wire is not self.place.wire:
            self.wire.close()
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def close(self) -> None:
        """Destroy the VM, at once or when the next sequence begins. Never raises for a server that is gone."""
        self.release()
        if self.place.system is None:
            self.place.close()
        else:
            self.place.done = self.made["vm"][0]

    # -- several operations in one message ------------------------------------------------------------------------------

    def _group(self, ops: list[Op], at: int) -> list[Op]:
        """The operations from `at` on that can travel together: at least one."""
        group: list[Op] = []
        pending: set[str] = set()
        for op in ops[at : at + control.MAX_BATCH]:
            if not _travels(op) or any(kind in pending for kind in _uses(op)):
                break
            group.append(op)
            if op.do == "ioctl" and (kind := rules.MAKES.get(op.name)):
                pending.add(kind)
        return group or [ops[at]]

    def _perform_group(self, group: list[Op]) -> Iterator[Outcome]:
        self.place.settle_memory()
        waiting: list[tuple[Op, int | None]] = []
        frames: list[bytes] = []
        for op in group:
            try:
                sequence, frame = self._frame(op)
            except FrameError:
                waiting.append((op, None))
                continue
            waiting.append((op, sequence))
            frames.append(frame)
        if frames:
            self.wire.batch(frames)
        for op, number in waiting:
            if number is None:
                yield Outcome(-1, errno_name(EBADF))
                continue
            try:
                outcome = _outcome(self._await(self.wire, number, op, _BEHIND_RUN_SECONDS))
            except KvmError as error:
                yield Outcome(-1, error.name, reason=error.reason)
                continue
            self._keep(op, outcome)
            yield outcome

    def _frame(self, op: Op) -> tuple[int, bytes]:
        number = self.number(*op.on)
        if op.do == "close":
            return self.wire.frame(number, control.CLOSE)
        if op.do == "control":
            return self.wire.frame(number, int(op.extra["request"]), int(op.arg), (), bytes.fromhex(op.tail))
        if op.name not in BY_NAME:
            return self.wire.frame(number, int(op.extra.get("request", 0)), int(op.arg) & (1 << 64) - 1)
        argument, copies = self.argument(op)
        return self.wire.frame(number, BY_NAME[op.name].number, argument, copies)

    def _keep(self, op: Op, outcome: Outcome) -> None:
        """Note what the operation has made; the outcome says 0 for a handle's number."""
        kind = rules.MAKES.get(op.name)
        if op.do != "ioctl" or not kind or outcome.errno:
            return
        number = outcome.ret
        if op.name == "CREATE_DEVICE":
            data = bytes.fromhex(outcome.out.pop(0, ""))
            number = BY_NAME[op.name].argument.parse(data).fd if data else 0  # type: ignore[union-attr]
        if number and not (op.members or {}).get("flags", 0) & CREATE_DEVICE_TEST * (op.name == "CREATE_DEVICE"):
            self.made.setdefault(kind, []).append(number)
        outcome.ret = 0

    # -- operations -------------------------------------------------------------------------------------------------

    def _do_ioctl(self, op: Op) -> Outcome:
        if op.name not in BY_NAME:
            return self._request(op, int(op.extra.get("request", 0)), int(op.arg), ())
        argument, copies = self.argument(op)
        outcome = self._request(op, BY_NAME[op.name].number, argument, copies)
        self._keep(op, outcome)
        return outcome

    def _do_attack(self, op: Op) -> Outcome:
        from qemu_user.fuzz import transport

        transport.attack(self._executor.endpoint, str(op.extra["seed"]))
        return Outcome()

    def _do_control(self, op: Op) -> Outcome:
        return self._request(op, int(op.extra["request"]), int(op.arg), (), bytes.fromhex(op.tail))

    def _do_close(self, op: Op) -> Outcome:
        if op.on[0] == "eventfd":
            number = self.number(*op.on)
            self.place.vm.link.say(Message.CLOSE_FILE, "close", number)
            self._passed.discard(number)
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
        reply = self._await(wire, sequence, op, max(_RUN_SECONDS, 2 * wire.round_trip))
        return Outcome(reply.ret, errno_name(reply.errno))

    def _do_map(self, op: Op) -> Outcome:
        self.place.map(int(op.arg) % _SEGMENTS)
        return Outcome()

    def _do_unmap(self, op: Op) -> Outcome:
        self.place.unmap(int(op.arg) % _SEGMENTS)
        return Outcome()

    def _do_eventfd(self, op: Op) -> Outcome:
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        os.eventfd_write(fd, min(int(op.arg), (1 << 64) - 2))
        self._fds.append(fd)
        self.place.vm.link.say(Message.PASS_FILE, "sendmsg", fd, fds=[fd])
        self._passed.add(fd)
        self.made.setdefault("eventfd", []).append(fd)
        return Outcome()

    def _do_scribble(self, op: Op) -> Outcome:
        """Bytes into a vCPU's shared pages, as a hostile client writes them."""
        number = self.number(*op.on)
        mapping = self._pages.get(number)
        if mapping is None:
            fds = self.place.vm.link.say(Message.SHARE, "mmap", number)
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
        patience = max(_RUN_SECONDS, 2 * wire.round_trip) if number == _RUN else _BEHIND_RUN_SECONDS
        return _outcome(self._await(wire, sequence, op, patience))

    def _await(self, wire: Wire, sequence: int, op: Op, patience: float) -> Reply:
        """The reply. A vCPU's ioctls wait while it runs, which a scribble on the doorbell may have asked for: kick it."""
        if op.on[0] != "vcpu":
            reply = wire.wait(sequence)
        else:
            left = wire.deadline
            while (reply := wire.wait(sequence, patience)) is None:
                left -= patience
                if left < 0:
                    wire.failed = True
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


def _travels(op: Op) -> bool:
    """Whether the operation is one request to the VM's process whose answer does not keep others waiting."""
    if op.on[0] == "system" or (op.do == "close" and op.on[0] in ("eventfd", "vm")):
        return False
    if op.do == "control":
        return int(op.extra["request"]) not in (control.CLOSE, control.CLOSE_VM, control.GOODBYE, control.BATCH)
    return op.do == "close" or (op.do == "ioctl" and op.name != "RUN" and op.extra.get("request") != _RUN)


def _uses(op: Op) -> Iterator[str]:
    """Kinds of the resources that an operation names."""
    yield op.on[0]
    for value in (op.members or {}).values():
        if isinstance(value, dict) and "ref" in value:
            yield str(value["ref"][0])


def _outcome(reply: Reply) -> Outcome:
    out = {0 if va == ARGUMENT else 1 + (va - POINTEE) // (1 << 20): data.hex() for va, data in reply.copies}
    reason = reply.extra.decode(errors="replace") if reply.errno else ""
    return Outcome(reply.ret, errno_name(reply.errno), out, reason)
