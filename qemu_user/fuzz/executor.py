"""Performs sequences on kvmcore, in a fresh VM each: the target ipc://PATH. See Executor for what "fresh" is.

Keeps what the sequence has made (vCPUs, descriptors, mapped memory) by kind and position, and gives each operation's
outcome. As much as possible travels in one message: most sequences, from the making of their VM to their last operation. Must
end with everything closed, whatever the sequence was.
"""

from __future__ import annotations

import errno as errno_numbers
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import EBADF
from typing import Any, NamedTuple, cast

from protocol.abi import run_page
from protocol.abi.compat import Compat
from protocol.abi.errors import KvmError
from protocol.abi.ioctls import BY_NAME
from protocol.abi.structs import CREATE_DEVICE_TEST, Layout
from protocol.channel.shared_memory import Mapping, create_memfd
from protocol.client import Kvm
from protocol.client.handle import ARGUMENT, POINTEE
from protocol.codec import control, envelope
from protocol.codec.envelope import COPY_IN, COPY_OUT, Copy, FrameError, Reply
from protocol.codec.session import Op as Message
from qemu_user.fuzz import rules
from qemu_user.fuzz.place import SEGMENTS, Place, Slot
from qemu_user.fuzz.sequence import Op
from qemu_user.fuzz.wire import Gone, Hang, Wire

_RUN_SECONDS = 0.0005
"""A guest that runs longer is kicked."""
_BEHIND_RUN_SECONDS, _SELDOM_SECONDS = 0.003, 0.5
"""The same for what may wait behind a RUN that a scribble on the doorbell has begun; and where there was none."""
_RUN = BY_NAME["RUN"].number
_BRIEFLY = envelope.FLAG_INLINE_PAGE | envelope.FLAG_BRIEF
_MOST_BYTES = envelope.MAX_FRAME * 3 // 4
"""Of the requests in one message."""
UNKNOWN = "nobody can kick it any more"
"""Why it is not known what came of an operation."""
_NOWHERE = 0x7FFF_FFFF
"""A number that no resource has."""
_MADE = {"vm": "vm", "vcpu": "vcpu", "device": "device", "memfd": "guest_memfd", "file": "stats"}
"""Our word for a kind of resource -> the protocol's (control.made)."""


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


class Kind(NamedTuple):
    """Of sessions: whose KVM they see, what vCPUs run on, and after how many sequences the next kind's turn is."""

    compat: Compat
    accel: str
    sequences: int = 1000

    @classmethod
    def of(cls, header: dict[str, Any]) -> Kind:
        """What a finding's header says of the session that it was seen in. ValueError."""
        return cls(Compat(header.get("compat", USUAL.compat.value)), str(header.get("accel", USUAL.accel)))

    @property
    def header(self) -> dict[str, Any]:
        """What of() reads; nothing for what is usual."""
        words = {"compat": (self.compat.value, USUAL.compat.value), "accel": (self.accel, USUAL.accel)}
        return {name: value for name, (value, usual) in words.items() if value != usual}


USUAL = Kind(Compat.DEFAULT, "interpreter")
KINDS = (
    USUAL, Kind(Compat.LINUX_6_12, "interpreter", 100), Kind(Compat.STRICT, "interpreter", 50),
    Kind(Compat.DEFAULT, "reference", 100),
)  # fmt: skip
"""Taken in turn by campaigns."""


class Executor:
    """One client of one daemon, whose sequences run one after the other, or overlap: one is sent while another is awaited.

    Its VMs share a process of kvmcore unless `apart`. After so many sequences as its kind of session says the process is
    replaced, as soon as no sequence is under way.
    """

    def __init__(self, endpoint: str, *, apart: bool = False, kinds: tuple[Kind, ...] = (USUAL,)) -> None:
        self.endpoint, self._apart = endpoint, apart
        self._kinds, self._turn = kinds, 0
        self._place: Place | None = None
        self._open()

    def _open(self) -> None:
        kind = self.kind
        self.kvm = Kvm.open(self.endpoint, name="fuzz", compat=kind.compat, accel=kind.accel, together=not self._apart)
        self._system = Wire(self.kvm.link)

    @property
    def kind(self) -> Kind:
        """Of the session that is open."""
        return self._kinds[self._turn % len(self._kinds)]

    @property
    def full(self) -> bool:
        """Whether the process should be replaced: let no sequence overlap the next start()."""
        return self._place is not None and (self._place.used >= self.kind.sequences or not self._place.usable)

    def start(self) -> Sequence:
        """A fresh VM to run a sequence in; it may be made with the sequence's first operations. KvmError."""
        if self._place is not None and self.full and not self._place.busy:
            self.settle()
            if len(self._kinds) > 1:
                self._system.close()
                self.kvm.close()
                self._turn += 1
                self._open()
        if self._place is not None:
            return Sequence(self, self._place, self._place.slot())
        if not self._apart:
            self.kvm.leave_shared()
        vm = self.kvm.create_vm()
        place = Place(vm, self.kvm.shared_number)
        self._place = place if not self._apart else None
        return Sequence(self, place, place.slot(), vm.number)

    def quiet(self) -> None:
        """Between sequences: the last ones' VMs and memory go, so that what is left can be counted. Hang, Gone, KvmError."""
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

    @property
    def system_wire(self) -> Wire:
        """To the daemon's /dev/kvm, for VMs in processes of their own."""
        return self._system


class Sequence:
    """A VM and what its sequence has made."""

    def __init__(self, executor: Executor, place: Place, slot: Slot, number: int = 0, wire: Wire | None = None) -> None:
        """`number`: the VM's, if it is there already. `wire`: a connection of one's own, for one thread of several."""
        self._executor, self.place, self._slot = executor, place, slot
        self.extended = executor.kind.compat.extended
        self.wire = wire or place.wire
        self.made: dict[str, list[int]] = {"system": [executor.kvm.number if place.system is None else place.system]}
        if number:
            self.made["vm"] = [number]
        self._ops: list[Op] = []
        self._at = 0
        self._begun = False
        self._waiting: deque[tuple[Op, int | Outcome]] = deque()
        self._creating = 0
        """The number of the request that makes the VM."""
        self._coming: set[str] = set()
        """Kinds of what the message makes that is being put together."""
        self._ready: set[int] = set()
        """Segments that are mapped and empty, for the sequence's first operations."""
        self._used: set[int] = set()
        """Segments that the sequence has mapped before."""
        self._again: dict[int, int] = {}
        """Segments that the message maps with other memory -> the requests' numbers."""
        self._events: set[int] = set()
        self._closed: list[int] = []
        self._vm_closed = False
        self._strays: list[int] = []
        """Handles that no kind of resource has: duplicates, and what requests without a name have made."""
        self._said: set[tuple[int, int]] = set()
        """(address, size) of memory that messages have mapped."""
        self._pages: dict[int, Mapping] = {}
        self._patience = _SELDOM_SECONDS

    @property
    def pid(self) -> int:
        """The process that it runs in."""
        return self.place.vm.pid

    def perform_all(self, ops: list[Op]) -> Iterator[Outcome]:
        """Do them in order. Hang, Gone: the server does not answer; KvmError: there is no VM."""
        self.begin(ops)
        yield from self.outcomes()

    def perform(self, op: Op) -> Outcome:
        """Do one operation. Hang, Gone, KvmError."""
        (outcome,) = self.perform_all([op])
        return outcome

    def begin(self, ops: list[Op]) -> None:
        """Send what can be sent before anything is known of what comes of it; outcomes() does the rest. Gone."""
        self._ops, self._at = ops, 0
        frames: list[bytes] = []
        if not self._begun:
            self._begun = True
            frames = self._prologue(ops)
        self._send(frames)

    def outcomes(self) -> Iterator[Outcome]:
        """What comes of begin()'s operations, in order."""
        while True:
            yield from self._receive()
            if self._at >= len(self._ops):
                return
            if _travels(self._ops[self._at], self.place):
                self._send([])
            else:
                self._at += 1
                yield self._alone(self._ops[self._at - 1])

    def release(self) -> None:
        """Give back what is ours, and leave the VM."""
        for mapping in self._pages.values():
            mapping.close()
        self._pages.clear()
        if self.wire is not self.place.wire:
            self.wire.close()
        for fd in self._events:
            self._slot.event_back(fd)
        for fd in self._closed:
            os.close(fd)
        self._events.clear()
        self._closed.clear()
        self._slot.busy = False

    def close(self) -> None:
        """Destroy the VM, at once or when the next sequence begins. Never raises for a server that is gone."""
        try:
            while self.place.usable and (self._waiting or self._creating):  # nobody has asked what came of these
                for _ in self._receive():
                    pass
            for address, size in self._said:  # at once: others would see it
                self.place.vm.link.say(Message.UNMAP, "munmap", address, size)
        except (KvmError, Hang, Gone):
            pass
        self.release()
        if self.place.system is None:
            self.place.close()
        else:
            self._slot.left = self._left()

    def _left(self) -> list[tuple[int, int]]:
        """What ends what the sequence has made: all of the VM's at once, unless it has closed the VM's own handle."""
        numbers = list(self._strays)
        if self._vm_closed:
            numbers += [number for kind in ("vcpu", "device", "memfd", "file") for number in self.made.get(kind, ())]
            whole = []
        else:
            whole = [(number, control.CLOSE_VM) for number in self.made.get("vm", ())]
        return whole + [(number, control.CLOSE) for number in numbers]

    # -- several operations in one message ------------------------------------------------------------------------------

    def _prologue(self, ops: list[Op]) -> list[bytes]:
        """What ends the sequence before this one, and makes the VM."""
        first: set[int] = set()
        for op in ops:
            if op.do != "map":
                break
            first.add(int(op.arg) % SEGMENTS)
        frames = [frame for _, frame in self._slot.clean_up(first)]
        self._ready = set(self._slot.mapped)
        if "vm" not in self.made:
            assert self.place.system is not None
            self._creating, frame = self.wire.frame(self.place.system, BY_NAME["CREATE_VM"].number)
            self._coming.add("vm")
            frames.append(frame)
        return frames

    def _send(self, frames: list[bytes]) -> None:
        """Put a message together, beginning with `frames`: the operations from here on that can be in it."""
        size = sum(map(len, frames))
        if not self._waiting:
            self._again.clear()
        while self._at < len(self._ops) and len(frames) < control.MAX_BATCH and size < _MOST_BYTES:
            op = self._ops[self._at]
            if not _travels(op, self.place) or self._needs_answer(op):
                break
            self._at += 1
            try:
                sequence, frame = self._frame(op)
            except FrameError:
                self._waiting.append((op, Outcome(-1, errno_name(EBADF))))
                continue
            except KvmError as error:
                if error.errno == errno_numbers.ECONNRESET:
                    raise Gone(str(error)) from error
                self._waiting.append((op, Outcome(-1, error.name, reason=error.reason)))
                continue
            if frame:
                frames.append(frame)
                size += len(frame)
            self._waiting.append((op, sequence if frame else Outcome()))
            if op.do == "ioctl" and (kind := rules.MAKES.get(op.name)):
                self._coming.add(kind)
        self._coming.clear()
        if frames:
            self.wire.batch(frames)

    def _needs_answer(self, op: Op) -> bool:
        """Whether an operation cannot be put into words before an earlier one of the message is answered."""
        if op.do == "map" and int(op.arg) % SEGMENTS in self._again:
            return True
        if op.on[0] == "file" and "file" in self._coming:
            return True  # a vCPU's may be made later than its turn in the message, behind a RUN
        return bool(self._coming) and any(
            isinstance(value, dict) and "ref" in value and value["ref"][0] in self._coming
            for value in (op.members or {}).values()
        )

    def _receive(self) -> Iterator[Outcome]:
        """The outcomes of the message that is on its way."""
        if self._creating:
            reply = self.wire.wait(self._creating)
            self._creating = 0
            assert reply is not None
            if reply.errno:
                raise KvmError(reply.errno, "CREATE_VM", reply.extra.decode(errors="replace"))
            self.made["vm"] = [reply.ret]
        while self._waiting:
            op, number = self._waiting.popleft()
            if isinstance(number, Outcome):
                yield number
                continue
            try:
                outcome = _outcome(self._await(self.wire, number, op, self._patience))
            except KvmError as error:
                yield Outcome(-1, error.name, reason=error.reason)
                continue
            self._keep(op, outcome, number)
            yield outcome

    def _frame(self, op: Op) -> tuple[int, bytes]:
        """(sequence number, request); no bytes if there is nothing to ask. FrameError; KvmError: the outcome."""
        match op.do:
            case "ioctl" if op.name in BY_NAME:
                argument, copies = self.argument(op)
                return self.wire.frame(self.number(*op.on), BY_NAME[op.name].number, argument, copies)
            case "ioctl":
                return self.wire.frame(self.number(*op.on), int(op.extra.get("request", 0)), int(op.arg) & (1 << 64) - 1)
            case "close":
                return self.wire.frame(self.number(*op.on), control.CLOSE)
            case "control":
                payload = bytes.fromhex(op.tail)
                return self.wire.frame(self.number(*op.on), int(op.extra["request"]), int(op.arg), (), payload)
            case "run":
                return self._run(op, _BRIEFLY)
            case "map":
                return self._map(int(op.arg) % SEGMENTS)
            case "unmap":
                return self._slot.unmap(self.wire, int(op.arg) % SEGMENTS)
            case _:
                fd = self._slot.event(min(int(op.arg), (1 << 64) - 2))
                self._events.add(fd)
                self.made.setdefault("eventfd", []).append(fd)
                return 0, b""

    def _map(self, index: int) -> tuple[int, bytes]:
        if index in self._ready:
            self._ready.discard(index)
            self._used.add(index)
            return 0, b""
        if index in self._used and self._waiting:
            self._again[index], frame = self._slot.map_again(self.wire, index)
            return self._again[index], frame
        if index not in self._slot.mapped:
            self._slot.clear(index)
        self._used.add(index)
        return self._slot.map(self.wire, index)

    def _run(self, op: Op, flags: int) -> tuple[int, bytes]:
        head = bytearray(run_page.UNION)
        head[run_page.IMMEDIATE_EXIT] = int(op.extra.get("immediate", 0))
        return self.wire.frame(self.number(*op.on), _RUN, int(op.arg), payload=bytes(head), flags=flags)

    def _keep(self, op: Op, outcome: Outcome, number: int = 0) -> None:
        """Note what the operation, request `number`, has made or ended; the outcome says 0 for a handle's number."""
        if outcome.errno:
            return
        if op.do == "map":
            index = int(op.arg) % SEGMENTS
            self._slot.mapped.add(index)
            if self._again.get(index) == number:
                self._slot.mapped_again(index)
        elif op.do == "unmap":
            self._slot.mapped.discard(int(op.arg) % SEGMENTS)
        elif op.do == "close" and op.on[0] == "eventfd":
            fd = self.number(*op.on)
            self._events.discard(fd)
            self._closed.append(fd)
        kind = rules.MAKES.get(op.name)
        if op.do == "ioctl" and not op.name and outcome.ret >= _HANDLES:
            self._strays.append(outcome.ret)
        if op.do != "ioctl" or not kind:
            return
        number = outcome.ret
        if op.name == "CREATE_DEVICE":
            data = bytes.fromhex(outcome.out.pop(0, ""))
            number = BY_NAME[op.name].argument.parse(data).fd if data else 0  # type: ignore[union-attr]
        if number and not (op.members or {}).get("flags", 0) & CREATE_DEVICE_TEST * (op.name == "CREATE_DEVICE"):
            self.made.setdefault(kind, []).append(number)
        outcome.ret = 0

    # -- operations that go by themselves ----------------------------------------------------------------------------------

    def _alone(self, op: Op) -> Outcome:
        do: Callable[[Op], Outcome] | None = getattr(self, f"_do_{op.do}", None)
        if do is None:
            raise ValueError(f"no operation {op.do!r}")
        try:
            return do(op)
        except KvmError as error:
            if error.errno == errno_numbers.ECONNRESET:
                raise Gone(str(error)) from error
            return Outcome(-1, error.name, reason=error.reason)

    def _do_ioctl(self, op: Op) -> Outcome:
        wire = self._executor.system_wire if op.on[0] == "system" and self.place.system is None else self.wire
        patience = _RUN_SECONDS if op.name == "RUN" or op.extra.get("request") == _RUN else self._patience
        number = BY_NAME[op.name].number if op.name in BY_NAME else int(op.extra.get("request", 0))
        argument, copies = self.argument(op) if op.name in BY_NAME else (int(op.arg), ())
        try:
            sequence, frame = wire.frame(self.number(*op.on), number, argument, copies)
        except FrameError as error:
            return Outcome(-1, errno_name(EBADF), reason=str(error))
        wire.send(frame)
        outcome = _outcome(self._await(wire, sequence, op, patience))
        self._keep(op, outcome)
        return outcome

    def _do_attack(self, op: Op) -> Outcome:
        from qemu_user.fuzz import transport

        transport.attack(self._executor.endpoint, str(op.extra["seed"]))
        return Outcome()

    def _do_control(self, op: Op) -> Outcome:
        wire = self._executor.system_wire if op.on[0] == "system" and self.place.system is None else self.wire
        sequence, frame = wire.frame(
            self.number(*op.on), int(op.extra["request"]), int(op.arg), payload=bytes.fromhex(op.tail)
        )
        wire.send(frame)
        outcome = _outcome(self._await(wire, sequence, op, self._patience))
        if int(op.extra["request"]) == control.DUP and not outcome.errno:
            self._strays.append(outcome.ret)
        return outcome

    def _do_close(self, op: Op) -> Outcome:
        sequence, frame = self.wire.frame(self.number(*op.on), control.CLOSE)
        self.wire.send(frame)
        outcome = _outcome(self._await(self.wire, sequence, op, self._patience))
        self._vm_closed |= op.on[0] == "vm" and not outcome.errno
        return outcome

    def _do_run(self, op: Op) -> Outcome:
        """KVM_RUN by message; a guest that does not come out by itself is kicked."""
        sequence, frame = self._run(op, envelope.FLAG_INLINE_PAGE)
        self.wire.send(frame)
        reply = self._await(self.wire, sequence, op, _RUN_SECONDS)
        return Outcome(reply.ret, errno_name(reply.errno))

    def _do_say(self, op: Op) -> Outcome:
        """A message on the session's socket, with descriptors of the kinds that extra["fds"] names."""
        number = int(op.extra["op"])
        if number in _NOT_SAID and int(op.arg) < _NO_DESCRIPTOR:
            return Outcome()
        if number == Message.OUTLIVE:
            return Outcome()
        fds = [_descriptor(str(kind)) for kind in op.extra.get("fds", ())]
        a = self.number(*op.on) if number in (Message.SHARE, Message.HOT) else int(op.arg)
        try:
            b, c, d = (int(op.extra.get(word, 0)) for word in "bcd")
            back = self.place.vm.link.say(cast("Message", number), "say", a, b, c, d, fds)
        finally:
            for fd in fds:
                os.close(fd)
        for fd in back:
            os.close(fd)
        if number == Message.MAP:
            self._said.add((a, b))
        elif number == Message.UNMAP:
            self._said.discard((a, b))
        return Outcome()

    def _do_scribble(self, op: Op) -> Outcome:
        """Bytes into a vCPU's shared pages, as a hostile client writes them."""
        self._patience = _BEHIND_RUN_SECONDS
        number = self.number(*op.on)
        mapping = self._pages.get(number)
        if mapping is None:
            fds = self.place.vm.link.say(Message.SHARE, "mmap", number)
            try:
                if len(fds) < 2:
                    return Outcome()
                pieces = [(fd, 0, os.fstat(fd).st_size) for fd in fds]  # kvm_run, the coalesced ring, the dirty ring
                mapping = self._pages[number] = Mapping(pieces)
            finally:
                for fd in fds:
                    os.close(fd)
        data, at = bytes.fromhex(op.tail), int(op.arg) % mapping.size
        data = data[: mapping.size - at]
        mapping.view[at : at + len(data)] = data
        return Outcome()

    # -- requests ---------------------------------------------------------------------------------------------------

    def number(self, kind: str, position: int) -> int:
        """What the server calls a resource, or will call it when the message makes it; a number of nothing if there is none."""
        made = self.made.get(kind, ())
        if position < len(made):
            return made[position]
        if kind in self._coming:
            return control.made(_MADE[kind], position - len(made))
        return _NOWHERE

    def argument(self, op: Op) -> tuple[int, tuple[Copy, ...]]:
        """The ioctl's argument, and the memory that it and what is in it point at."""
        row = BY_NAME[op.name]
        if row.argument is None or op.members is None:
            return int(op.arg) & (1 << 64) - 1, ()
        pointees: list[Copy] = []
        members = {
            name: self._resolve(value, pointees) if isinstance(value, dict) else value for name, value in op.members.items()
        }
        try:
            data = row.argument.build(**members)
        except struct.error:  # what a file's author may have written too large
            data = row.argument.build(**_fitted(row.argument, members))
        data += bytes.fromhex(op.tail)
        return ARGUMENT, (Copy(ARGUMENT, len(data), COPY_IN | COPY_OUT, data), *pointees)

    def _resolve(self, value: dict[str, Any], pointees: list[Copy]) -> Any:
        if "ref" in value:
            return self.number(str(value["ref"][0]), int(value["ref"][1])) & 0xFFFFFFFF
        if "map" in value:
            return self._slot.address(int(value["map"]))
        va = POINTEE + len(pointees) * (1 << 20)
        if "in" in value:
            data = bytes.fromhex(value["in"])
            pointees.append(Copy(va, len(data), COPY_IN, data))
        else:
            size = int(value["out"])
            pointees.append(Copy(va, size, COPY_IN | COPY_OUT, bytes(size)))
        return va

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
                if kicked is not None and kicked.errno and (reply := wire.wait(sequence, 0.5)) is None:
                    # It has been closed under this RUN, by another thread or later in the message, which ends with the VM.
                    raise KvmError(kicked.errno, op.name, UNKNOWN)
                if reply is not None:
                    break
                patience = 0.1  # another thread's RUN may have taken the kick
        assert reply is not None  # Hang was raised otherwise
        return reply


_NOT_SAID = (Message.OUTLIVE, Message.PASS_FILE, Message.CLOSE_FILE)
"""OUTLIVE: the VM would outlive us. The others: the slot's descriptors are known by their numbers here."""
_NO_DESCRIPTOR = _HANDLES = 1 << 16
"""Descriptors are below it, handles are not."""


def _descriptor(kind: str) -> int:
    if kind == "eventfd":
        return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    return create_memfd("fuzz", 4096, sealed=kind == "sealed")


def _fitted(layout: Layout, members: dict[str, Any]) -> dict[str, Any]:
    """Numbers cut to their members' sizes."""
    for member in layout.fields:
        value = members.get(member.name)
        if isinstance(value, int) and member.count is None and member.type != "bytes":
            value &= (1 << 8 * member.size) - 1
            members[member.name] = value - (1 << 32) if member.type == "s32" and value >> 31 else value
    return members


def _travels(op: Op, place: Place) -> bool:
    """Whether the operation is one request to the VM's process whose answer does not keep others waiting, or none at all."""
    if op.on[0] == "system" and place.system is None:
        return False
    match op.do:
        case "ioctl":
            return op.name != "RUN" and op.extra.get("request") not in _UNNAMED
        case "map" | "unmap" | "eventfd":
            return True
        case "close":
            return op.on[0] != "vm"
        case "run":
            return bool(op.extra.get("brief"))
        case "control":
            return int(op.extra["request"]) not in _BY_ITSELF
        case _:
            return False


_UNNAMED = {_RUN, *(BY_NAME[name].number for name in ("CREATE_VM", *rules.MAKES))}
"""Requests that go by themselves when they are made up of numbers: what they make is none of the message's resources."""
_BY_ITSELF = {control.CLOSE, control.CLOSE_VM, control.GOODBYE, control.BATCH, control.DUP}


def _outcome(reply: Reply) -> Outcome:
    if not reply.errno and not reply.copies:
        return Outcome(reply.ret)
    out = {0 if va == ARGUMENT else 1 + (va - POINTEE) // (1 << 20): data.hex() for va, data in reply.copies}
    return Outcome(reply.ret, errno_name(reply.errno), out, reply.extra.decode(errors="replace") if reply.errno else "")
