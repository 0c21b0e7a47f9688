"""The side that a VM leaves: offers it, copies it while it runs, hands it over, and forgets it; or keeps it.

Runs on the job's thread in the VM's own process. The order of messages is in messages.py, who may run the VM at each
moment in journal.py. Whatever fails before the journal says "committed" ends in the VM going on here.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import msgspec

from protocol.abi.errors import KvmError
from qemu_user.backends.errors import BackendError
from qemu_user.machine.machine import PAUSED, POSTMIGRATE, RUNNING, Machine
from qemu_user.migration import journal as journals
from qemu_user.migration import machine_state, messages, page_service, pages, sections, steps
from qemu_user.migration.channel import Channel, ChannelError, StreamChannel, ZmqChannel
from qemu_user.migration.connect import expect, refusal
from qemu_user.migration.delta import Sent, xor
from qemu_user.migration.job import DEVICE, Job, JobError
from qemu_user.migration.journal import Journal
from qemu_user.migration.messages import Accept, Hello
from qemu_user.migration.page_service import PageService
from qemu_user.migration.precopy import CHUNK, Precopy
from qemu_user.migration.recovery import Caller
from qemu_user.migration.spread import MOST, Spread
from qemu_user.migration.volumes import FLASH, Disk, Ram, banks, writable_disks

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

_ANSWER_SECONDS = 60.0
"""For the destination to build the machine."""
_PREPARED_SECONDS = 10.0
"""For it to load the state, while the guest stands."""
_ASK_SECONDS = 0.05
_RELOCK_SECONDS = 30.0
LINGER_SECONDS = 0.3
"""How long the process stays to be asked how it went."""
_PACKS_WELL = 8
"""Memory that compresses so many times is not worth a delta."""
_PACK_BELOW = 200e6
"""Bytes per second: slower links are worth the time that compressing takes."""


class Options(NamedTuple):
    """`max_downtime` in seconds, `bandwidth` in bytes per second (0: no limit)."""

    max_downtime: float = 0.03
    bandwidth: float = 0.0
    with_disks: bool = False
    hand_memory: bool = True
    """On one machine: give the memory itself instead of a copy."""
    postcopy: bool = False
    """Switch over after one round; the destination fetches what is missing when it is touched."""
    channels: int = 1
    """Connections that memory goes over."""


class _Wire:
    """A Sink that sends units to the destination."""

    def __init__(self, channel: Channel, packed: bool, delta: bool, job: Job) -> None:
        self._channel, self._job = channel, job
        self._packer = zstandard.ZstdCompressor(level=1) if packed and zstandard is not None else None
        self._sent = Sent() if delta else None
        self._round = 0
        self._spread = Spread(channel, [])
        self._runs: list[tuple[int, int]] = []
        self._bytes: list[bytes | memoryview] = []
        self._held = 0

    def use(self, more: list[Channel]) -> None:
        """Memory also goes over these channels, ours from now on, until alone()."""
        self._spread = Spread(self._channel, more)

    def alone(self) -> None:
        """After a round: everything goes over the main channel. Idempotent."""
        self._spread.close()

    def data(self, volume: Ram | Disk, first: int, count: int, content: memoryview) -> int:
        place = messages.place(volume.number, first)
        if self._packer is None:
            if isinstance(volume, Ram):
                return self._gather(first, count, content)
            return self._channel.send(messages.DATA, place, count, content)
        plain = bytes(content)  # the guest writes on: what is sent and what is remembered must be one
        packed = self._packer.compress(plain)
        if self._sent is not None and isinstance(volume, Ram):
            if len(packed) * _PACKS_WELL < len(plain):
                self._sent.forget(first, count)  # nothing that is worth the work of a delta
            else:
                before = self._sent.before(first, count)
                self._sent.now(first, plain)
                if before is not None and len(delta := self._packer.compress(xor(before, plain))) < len(packed) // 2:
                    return self._send(volume, messages.DELTA, place, count, delta)
        if len(packed) < len(plain) * 7 // 8:
            return self._send(volume, messages.PACKED, place, count, packed)
        return self._send(volume, messages.DATA, place, count, plain)

    def _send(self, volume: Ram | Disk, kind: int, place: int, count: int, payload: bytes) -> int:
        if not isinstance(volume, Ram):
            return self._channel.send(kind, place, count, payload)
        self._spread.send(kind, place, count, payload)
        return len(payload)

    def _gather(self, first: int, count: int, content: memoryview) -> int:
        """Memory goes in large frames, however it is scattered: a frame for each page would be mostly work for nothing."""
        self._runs.append((first, count))
        self._bytes.append(content)
        self._held += len(content)
        if self._held >= CHUNK or len(self._runs) >= messages.MOST_RUNS:
            self.flush()
        return len(content)

    def flush(self) -> None:
        """Nothing is held back any more."""
        if self._runs:
            runs, parts = self._runs, self._bytes
            self._runs, self._bytes, self._held = [], [], 0
            self._spread.send(messages.RUNS, len(runs), 0, [messages.runs_header(runs), *parts])

    def zeroes(self, volume: Ram | Disk, first: int, count: int, fresh: bool) -> int:
        if fresh:
            return 0  # the destination's memory is zero until something is said about it
        if self._sent is not None and isinstance(volume, Ram):
            self._sent.forget(first, count)
        return self._send(volume, messages.ZEROES, messages.place(volume.number, first), count, b"")

    def end_of_round(self) -> None:
        """Wait until the destination has taken everything: only then is a round's time the link's."""
        self.flush()
        self._round += 1
        self._spread.end_of_round(self._round)
        steps.reached("source:round", self._channel.cut)


def _pieces(left: bytearray, size: int) -> bytes:
    """The map of pieces of memory with a page that is `left` (a map of pages)."""
    per, found = messages.PIECE // Ram.unit, bytearray(size // messages.PIECE)
    for start, count in pages.runs(left, len(left)):
        first, last = start // per, (start + count - 1) // per
        found[first : last + 1] = b"\1" * (last + 1 - first)
    return bytes(found)


class Outgoing:
    """One hand-over of a machine whose memory is complete. run() returns when the VM lives on elsewhere; an exception means
    that it goes on here."""

    def __init__(self, machine: Machine, channel: Channel, options: Options, job: Job) -> None:
        self._machine, self._channel, self._options, self._job = machine, channel, options, job
        self._local = isinstance(channel, StreamChannel)
        """The other side is on this machine."""
        self._disks = writable_disks(machine)
        self._journal: Journal | None = None
        self._peer_journal = self._recover = ""
        self._unlocked = self._postcopy = False
        self._pages: PageService | None = None
        self._leaves = False
        """Something other than before follows this process."""
        self._more: list[Channel] = []
        """Channels that nobody uses yet."""
        channel.look = job.check

    def run(self) -> None:
        """JobError, Cancelled."""
        try:
            self._run()
        except ChannelError as error:
            reason = refusal(self._channel)
            raise JobError(f"the destination refuses it: {reason}" if reason else str(error)) from error
        except BackendError as error:
            raise JobError(str(error)) from error
        finally:
            if self._pages is not None:
                self._pages.close()
            for channel in [self._channel, *self._more]:
                channel.close()

    def _run(self) -> None:
        machine, job = self._machine, self._job
        self._journal = Journal(machine.config.uuid, "source")
        self._journal.write(journals.OFFERED, machine.generation)
        copy: Precopy | None = None
        wire: _Wire | None = None
        try:
            accepted = self._offer()
            if "memory-fd" in accepted.features:
                volumes: list[Ram | Disk] = []
            else:
                volumes = [Ram(machine)]
            volumes += [*self._disks, *banks(machine)] if self._options.with_disks else banks(machine)
            slow = 0 < self._options.bandwidth < _PACK_BELOW
            packed = slow and "zstd" in accepted.features
            wire = _Wire(self._channel, packed, packed and "delta" in accepted.features, job)
            options = self._options
            wire.use(self._more_channels(accepted))
            self._postcopy = "postcopy" in accepted.features
            self._prepare_to_leave()
            copy = Precopy(machine, volumes, wire, job, options.max_downtime, options.bandwidth, self._postcopy)
            copy.rounds()
            wire.alone()
            self._switch_over(copy)
        except BaseException:
            if self._journal.state == journals.OFFERED:
                self._journal.write(journals.ABORTED, machine.generation)
                self._say_abort()
            if machine.status != POSTMIGRATE:
                self._stay()
            self._journal.keep()
            raise
        finally:
            if wire is not None:
                wire.alone()
            if copy is not None:
                copy.close()
        if self._postcopy:
            assert self._pages is not None
            self._pages.serve()  # the journal is locked until then: by that the destination knows that we live
            self._stay()
        self._journal.keep()
        threading.Timer(LINGER_SECONDS, machine.quit).start()

    def _reached(self, step: str) -> None:
        steps.reached(step, self._channel.cut, self._machine.vm.pid)

    def _prepare_to_leave(self) -> None:
        """What is to follow this process if it is killed in the switch or behind it: kvmcore goes by our journal."""
        machine = self._machine
        assert self._journal is not None
        redial = self._channel.redial if isinstance(self._channel, ZmqChannel) else None
        caller = Caller(self._recover, redial, machine.config.uuid, machine.generation + 1)
        self._pages = PageService(machine, self._job, caller, self._channel)
        self._leaves = True
        if self._postcopy:
            page_service.leave(machine, self._journal, self._channel, self._recover)
        elif machine.keeper is not None:
            with self._journal.opened() as decision:
                words = journals.condition(journals.OFFERED, journals.ABORTED, journals.GRANTED)
                machine.vm.outlive(True, decision.fileno(), words)

    def _stay(self) -> None:
        """Nothing is to follow but what followed before: the VM goes on here, or all of it has gone. Idempotent."""
        if self._leaves:
            self._leaves = False
            with suppress(KvmError):  # its kvmcore process may have died
                self._machine.vm.outlive(self._machine.keeper is not None and self._machine.status != POSTMIGRATE)
                page_service.take_back(self._machine)

    def _say_abort(self) -> None:
        try:
            self._channel.look = lambda: None
            self._channel.send(messages.ABORT)
        except ChannelError:
            pass  # it will look at our journal

    def _offer(self) -> Accept:
        machine, options = self._machine, self._options
        assert self._journal is not None
        self._reached("source:connected")
        with machine.standing():
            parts = machine_state.capture(machine, with_config=False)
        state = sections.encode([machine_state.config_section(machine.config), *parts], not self._local)
        features = ["hot", "zstd", "delta"] if zstandard is not None else ["hot"]
        features += ["memory-fd"] if options.hand_memory else []
        features += ["postcopy"] if options.postcopy and not options.hand_memory else []
        hello = Hello(
            protocol=messages.PROTOCOL,
            name=machine.config.name,
            generation=machine.generation + 1,
            state=state,
            features=features,
            disks=self._travelling() if options.with_disks else {},
            running=machine.status == RUNNING,
            host=messages.boot_id(),
            journal=str(self._journal.path),
            channels=0 if options.hand_memory else min(options.channels, MOST) - 1,
        )
        self._say_hello(hello)
        self._reached("source:offered")
        expect(self._channel, messages.ACCEPT, _ANSWER_SECONDS)
        try:
            accepted = msgspec.msgpack.decode(self._channel.read(), type=Accept)
        except msgspec.MsgspecError as error:
            raise ChannelError(f"the destination's answer makes no sense: {error}") from error
        self._peer_journal, self._recover = accepted.journal, accepted.recover
        if "hot" in accepted.features and (hot := machine.vm.hot_here()):
            self._channel.send(messages.HOT, payload=hot)
        return accepted

    def _travelling(self) -> dict[int, int]:
        """Files that are made anew at the destination: volume -> bytes."""
        config = self._machine.config
        flash = [bank for bank in banks(self._machine) if not config.flash[bank.number - FLASH].readonly]
        return {disk.number: disk.size for disk in [*self._disks, *flash]}

    def _say_hello(self, hello: Hello) -> None:
        """With the descriptors that go along: memory that is given, and on one machine the other ends of extra channels."""
        theirs = []
        for _ in range(hello.channels if isinstance(self._channel, StreamChannel) else 0):
            ours, other = socket.socketpair()
            self._more.append(StreamChannel(ours))
            theirs.append(other)
        fds = [self._machine.ram_fd] if self._options.hand_memory else []
        fds += [other.fileno() for other in theirs]
        try:
            self._channel.send(messages.HELLO, payload=messages.encode(hello), fds=fds)
        finally:
            for other in theirs:
                other.close()

    def _more_channels(self, accepted: Accept) -> list[Channel]:
        """Those beside the main one. JobError: one of them cannot be made."""
        if isinstance(self._channel, ZmqChannel) and self._channel.beside is not None:
            if not all(0 < port < 1 << 16 for port in accepted.ports):
                raise ChannelError("the destination names ports that there cannot be")
            self._more = [self._channel.beside(port) for port in accepted.ports[: MOST - 1]]
        more, self._more = self._more, []
        return more

    # -- the hand-over proper ----------------------------------------------------------------------

    def _switch_over(self, copy: Precopy) -> None:
        machine, job, channel = self._machine, self._job, self._channel
        assert self._journal is not None
        was = machine.status
        job.status = DEVICE
        for disk in self._disks:
            disk.disk.flush()  # most of it while the guest still runs
        stopped = time.monotonic()
        with machine.standing():
            self._reached("source:standing")
            try:
                if not machine.settled:
                    raise JobError("the guest resets or shuts down at this moment")
                left = copy.finish()
                if self._postcopy:
                    channel.send(messages.ABSENT, payload=_pieces(left, machine.config.memory))
                for disk in self._disks:
                    if not (self._local and disk.disk.descriptor is not None):  # a file of this machine is one for both sides
                        disk.disk.flush()
                self._unlocked = True
                for image in machine.parts.images:
                    image.unlock()
                generation = machine.generation + 1
                state = sections.encode(machine_state.capture(machine, generation, with_config=False), not self._local)
                channel.send(messages.STATE, payload=state)
                self._reached("source:state")
                self._expect(messages.PREPARED)
                job.check()  # the last moment at which it can be called off
                self._reached("source:prepared")
            except BaseException:
                self._journal.write(journals.ABORTED, machine.generation)
                self._say_abort()
                self._keep_again()
                raise
            self._journal.write(journals.COMMITTED, generation)
            machine.status = POSTMIGRATE
            channel.look = lambda: None
            self._reached("source:committed")
            if self._commit(generation):
                job.downtime = time.monotonic() - stopped
                machine.disown()
            else:
                machine.generation = generation + 1
                machine.status = was
                self._keep_again()
                raise JobError("the destination has died before it ran the VM")
        self._reached("source:done")

    def _commit(self, generation: int) -> bool:
        """Tell the destination that the VM is its own, until it is certain that it has heard; False when it is dead and
        has never run it.
        """
        try:
            self._channel.send(messages.COMMIT, generation)
            self._reached("source:commit-sent")
            self._expect(messages.RUNNING)
            return True
        except (ChannelError, JobError) as error:
            self._job.error = f"the destination was told to run the VM and has not confirmed it ({error}); asking"
        while True:
            word = journals.ask_destination(self._peer_journal, generation + 1)
            if word in (journals.RUNNING, journals.REVOKED):
                self._job.error = ""
                return word == journals.RUNNING
            time.sleep(_ASK_SECONDS)

    def _expect(self, kind: int) -> None:
        """The answer that is due; memory that the destination needs for it is sent meanwhile."""
        assert self._pages is not None
        while (frame := expect(self._channel, kind, _PREPARED_SECONDS, messages.FETCH)).kind == messages.FETCH:
            self._pages.send(frame.a)

    def _keep_again(self) -> None:
        """The VM goes on here."""
        self._take_disks_back()
        self._stay()
        if self._machine.keeper is not None:
            self._machine.keeper.machine_changed()

    def _take_disks_back(self) -> None:
        """Before the guest goes on: the destination lets go of the disks when it reads our journal."""
        end = time.monotonic() + _RELOCK_SECONDS
        while self._unlocked:
            try:
                for image in self._machine.parts.images:
                    image.lock()
                self._unlocked = False
            except BackendError as error:
                if time.monotonic() > end:
                    self._machine.warn(f"stays paused: {error}")
                    self._machine.status = PAUSED
                    return
                time.sleep(0.02)
