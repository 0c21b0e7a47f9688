"""The source's side of a post-copy: the VM runs elsewhere, and part of its memory is here and sent as it is asked for.

The process that ran the VM serves it. What another one needs to go on with that, should the first be killed, is left with
kvmcore before the switch (leave()): the memory, whom to call, and the journal, with a lock that says to the destination that
the memory is still there. `softkvm attach` finds it (left()), if the journal says that the VM has gone.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from protocol.channel import fd_passing, keys
from protocol.channel.shared_memory import create_memfd
from protocol.channel.zmq_socket import Curve
from qemu_user.migration import journal as journals
from qemu_user.migration import messages, steps
from qemu_user.migration.channel import Channel, ChannelError, ZmqChannel
from qemu_user.migration.connect import dial
from qemu_user.migration.job import POSTCOPY, POSTCOPY_PAUSED, Job
from qemu_user.migration.journal import Journal
from qemu_user.migration.recovery import RETRY_SECONDS, Caller, Hopeless

if TYPE_CHECKING:
    from protocol.client import Vm
    from qemu_user.machine.machine import Machine

OWED_KEY, JOURNAL_KEY, MEMORY_KEY = 7, 8, 9
"""What kvmcore's session holds of it, between the keys of machine/keeper.py."""


class Owed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whose memory it is, and who needs the rest."""

    name: str
    uuid: str
    memory: int
    """Bytes of it."""
    cpus: int
    generation: int
    """The VM's over there."""
    path: str
    """Where the destination is called again."""
    uri: str = ""
    """tcp: who is called instead, with our key and his."""
    public: str = ""
    peer: str = ""

    def caller(self) -> Caller:
        """Calls the destination. ValueError: it knows another key of this host."""
        if not self.uri:
            return Caller(self.path, None, self.uuid, self.generation)
        try:
            own = keys.own()
        except keys.KeyFileError as error:
            raise ValueError(str(error)) from error
        if own.public.decode() != self.public:
            raise ValueError("the destination knows another key of this host (softkvm migrate --key)")
        curve = Curve(own.public, own.secret, self.peer.encode())
        return Caller("", lambda: dial(self.uri, curve), self.uuid, self.generation)


def leave(machine: Machine, journal: Journal, channel: Channel, path: str) -> None:
    """What follows this process once the journal says COMMITTED; a VM that outlives it anyhow does so in any case. KvmError."""
    vm = machine.vm
    if machine.introduce is None:
        return
    uri, public, peer = channel.called if isinstance(channel, ZmqChannel) else ("", "", "")
    config = machine.config
    owed = Owed(
        name=config.name, uuid=config.uuid, memory=config.memory, cpus=config.cpus, generation=machine.generation + 1,
        path=path, uri=uri, public=public, peer=peer,
    )  # fmt: skip
    data = msgspec.msgpack.encode(owed)
    note = create_memfd("owed-memory", len(data))
    held = journal.held()
    try:
        os.pwrite(note, data, 0)
        vm.keep(OWED_KEY, note)
        vm.keep(JOURNAL_KEY, held)
        vm.keep(MEMORY_KEY, machine.ram_fd)
        if machine.keeper is None:
            machine.introduce()
            vm.outlive(True, held, journals.condition(journals.COMMITTED))
    finally:
        fd_passing.close_all([note, held])


def take_back(machine: Machine) -> None:
    """Nobody needs it: the VM is here, or all of it is there. KvmError."""
    for key in (OWED_KEY, JOURNAL_KEY, MEMORY_KEY):
        machine.vm.keep(key, -1)


class Left(NamedTuple):
    """What a process that was killed has left: whose memory it is, and descriptors, which are ours. The journal's lock is held
    as long as it is open."""

    owed: Owed
    memory: int
    journal: int


def left(vm: Vm) -> Left | None:
    """None: it owes nothing, or the VM has not gone. ValueError: what it has left makes no sense."""
    fds = [vm.kept(key) for key in (OWED_KEY, JOURNAL_KEY, MEMORY_KEY)]
    try:
        note, journal, memory = fds
        if min(fds) < 0 or journals.state_of(journal) != journals.COMMITTED:
            return None
        try:
            owed = msgspec.msgpack.decode(os.pread(note, os.fstat(note).st_size, 0), type=Owed)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ValueError(f"what it has left cannot be read: {error}") from error
        if os.fstat(memory).st_size != owed.memory:
            raise ValueError("the memory that it has left is of another size")
        fds = [note]
        return Left(owed, memory, journal)
    finally:
        fd_passing.close_all([fd for fd in fds if fd >= 0])


class PageService:
    """Of a machine's memory; `channel`: None in a process that has taken another one's place."""

    def __init__(self, machine: Machine, job: Job, caller: Caller, channel: Channel | None) -> None:
        self._machine, self._job, self._caller, self._channel = machine, job, caller, channel

    def send(self, offset: int) -> None:
        """A piece that the destination has asked for. ChannelError."""
        memory = self._machine.memory.regions[0][1]
        if offset % messages.PIECE or offset >= len(memory):
            raise ChannelError(f"memory at {offset:#x} was asked for")
        if self._channel is None:
            raise ChannelError("the process that sent it has died")
        piece = memory[offset : offset + messages.PIECE]
        self._job.transferred += self._channel.send(messages.PAGE, offset, payload=piece)

    def serve(self) -> None:
        """Until the destination has everything, or is no more."""
        self._job.status = POSTCOPY
        while True:
            try:
                if self._channel is None:
                    raise ChannelError("the process that sent its memory has died")
                frame = self._channel.receive(None)
                if frame is None or frame.kind == messages.DONE:
                    return
                if frame.kind != messages.FETCH:
                    raise ChannelError(f"message {frame.kind} during post-copy")
                steps.reached("source:page", self._channel.cut, self._machine.vm.pid)
                self.send(frame.a)
            except ChannelError as error:
                if not self._call_again(error):
                    return

    def _call_again(self, error: ChannelError) -> bool:
        """The connection is lost, and memory that the VM needs is here: call the destination until it answers. False: it needs
        no more, or has died, and the VM with it.
        """
        job, machine = self._job, self._machine
        job.status, job.error = POSTCOPY_PAUSED, f"{error}; calling the destination again, which needs memory that is here"
        machine.warn(job.error)
        self.close()
        try:
            while (channel := self._caller.again()) is None:
                time.sleep(RETRY_SECONDS)
        except Hopeless:
            return False
        self._channel, job.status, job.error = channel, POSTCOPY, ""
        machine.warn("the destination is reached again")
        return True

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._channel is not None:
            self._channel.close()
