"""The side that a VM comes to: builds the machine that is announced, takes memory, disks and state, and runs it once the
source has let go. Runs in the new VM's own process (arrival.py), before anything else of it.

Nothing that a peer sends is believed: records, sections, places and lengths are checked against the machine that was
built here. Until COMMIT this is a machine that stands, with its I/O frozen from the moment its state is in place.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import psutil
import zmq

from protocol.abi.errors import KvmError
from protocol.channel import keys, zmq_socket
from qemu_user.backends.block.qcow2.create import create_qcow2
from qemu_user.backends.errors import BackendError
from qemu_user.config.background import for_background
from qemu_user.config.machine_config import MachineConfig
from qemu_user.devices.absent import AbsentPages, PageLost
from qemu_user.devices.device import StateError
from qemu_user.machine.keeper import Predecessor, reach
from qemu_user.machine.machine import Machine, StartError
from qemu_user.management.instance import Instance
from qemu_user.management.registry import ATTACH_FILE, find
from qemu_user.migration import identity, machine_state, messages, pages, places, sections, steps
from qemu_user.migration import job as jobs
from qemu_user.migration import journal as journals
from qemu_user.migration.announce import announce
from qemu_user.migration.channel import Channel, ChannelError, Frame, StreamChannel, ZmqChannel
from qemu_user.migration.delta import xor
from qemu_user.migration.host import authenticated
from qemu_user.migration.journal import Journal
from qemu_user.migration.left_memory import LeftPostcopy, encoded
from qemu_user.migration.messages import Accept, Hello
from qemu_user.migration.recovery import Door, Hopeless
from qemu_user.migration.sections import SectionError
from qemu_user.migration.spread import MOST, Gathered
from qemu_user.migration.volumes import FLASH, Disk, banks

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

_HELLO_SECONDS = 60.0
_LOCK_SECONDS = 2.0
_ASK_SECONDS = 0.02
_ENDED_SECONDS = 10.0
_PAGE_SECONDS = 30.0
_MOST_UNITS = 1 << 20
_FLUSH_EVERY = 64 << 20
"""Bytes written to a disk that travels along: its flush must be answered in time, however slow the disk."""
_PAGE = 4096
_ZEROES = bytes(1 << 20)
_MEMORY = (messages.DATA, messages.PACKED, messages.DELTA, messages.RUNS, messages.ZEROES)


class RemotePages:
    """A PageSource: the source of a post-copy migration, over the channel that is nobody else's by then."""

    cluster = messages.PIECE

    def __init__(self, channel: Channel, door: Door, left: LeftPostcopy, connected: bool = True) -> None:
        """`left`: how another process of ours would find the source. Not `connected`: this is one, and waits until it calls."""
        self._channel, self._door, self._left, self._connected = channel, door, left, connected
        self.lost: Callable[[str], None] = lambda reason: None
        """Called when the connection is lost, with the reason, and with "" when it is back."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fetch a piece, over another connection if this one breaks. Hopeless: the source is dead."""
        while True:
            try:
                self._look()
                self._channel.send(messages.FETCH, offset)
                steps.reached("destination:page", self._channel.cut)
                frame = self._channel.receive(_PAGE_SECONDS)
                if frame is None or frame.kind != messages.PAGE or frame.a != offset:
                    raise ChannelError(f"the source of the migration does not send the memory at {offset:#x}")
                self._channel.read_into(into)
                return
            except ChannelError as error:
                self.lost(str(error))
                self._door.again(self._gone)
                self._connected = True
                self.lost("")

    def _look(self) -> None:
        if not self._connected:
            raise ChannelError("this device process has taken another one's place")

    def _gone(self) -> bool:
        """Whether the source is known to be dead."""
        return bool(self._left.journal) and journals.is_dead(self._left.journal)

    def left(self) -> tuple[bytes, list[int]]:
        return encoded(self._left), self._door.descriptors()

    @classmethod
    def of(cls, left: LeftPostcopy, fds: list[int]) -> RemotePages:
        """What a device process that has died has left. ValueError: the source cannot be listened to."""
        channel: Channel
        listener = None
        if left.listen:
            try:
                key = keys.own()
                if key.public.decode() != left.public:
                    raise ValueError("the source of its memory knows another key of this host (host serve --key)")
                context, authenticator = authenticated([left.peer.encode()])
                channel = ZmqChannel(zmq_socket.router(context, left.listen, key), is_router=True)
            except (keys.KeyFileError, zmq.ZMQError) as error:
                raise ValueError(f"{left.listen}, where the source of its memory calls: {error}") from error
            channel.held = authenticator
        else:
            if len(fds) != 1:
                raise ValueError("the socket that the source of its memory calls is missing")
            listener = socket.socket(fileno=fds[0])
            channel = StreamChannel(socket.socketpair()[0])  # nobody's, until the source calls
        door = Door(channel, left.uuid, left.generation, listener, left.path)
        return cls(channel, door, left, connected=False)

    def close(self) -> None:
        """All of it is here: tell the source, which may have to call again to hear it."""
        try:
            while True:
                try:
                    self._look()
                    self._channel.send(messages.DONE)
                    self._channel.receive(_PAGE_SECONDS)  # it hangs up
                    break
                except ChannelError as error:
                    if "hung up" in str(error) or "gone" in str(error):
                        break
                    self._door.again(self._gone, _PAGE_SECONDS)
                    self._connected = True
        except Hopeless:
            pass  # it has died: it was not needed any more
        finally:
            self._door.close()
            self._channel.close()


def fill_behind(machine: Machine, source: RemotePages) -> None:
    """The VM runs: the rest of its memory comes in the background."""
    job = jobs.arriving(machine, "arrival", jobs.POSTCOPY)
    source.lost = partial(_lost, machine, job)
    threading.Thread(target=fill, args=(machine, job), name="fill", daemon=True).start()


def fill(machine: Machine, job: jobs.Job) -> None:
    """Bring the memory that nobody has asked for yet, in the background."""
    absent = machine.memory.absent
    job.waits = absent.waits if absent is not None else []
    try:
        machine.complete_memory(threading.Event())
        job.end(jobs.COMPLETED)
    except PageLost as error:
        job.error = str(error)
        job.end(jobs.FAILED)
        machine.fail(str(error))
    except KvmError:
        if machine.vm.alive:  # else it has ended meanwhile
            raise


def _lost(machine: Machine, job: jobs.Job, reason: str) -> None:
    """Say that the connection of a post-copy is lost, or back."""
    job.status, job.error = (jobs.POSTCOPY_PAUSED, reason) if reason else (jobs.POSTCOPY, "")
    if reason:
        machine.warn(f"{reason}; it waits for the source, which has part of its memory, where it needs that")
    else:
        machine.warn("the source of its memory is back")


def refuse(channel: Channel, reason: str) -> None:
    """Tell the source, if it is still there."""
    with suppress(ChannelError):
        channel.send(messages.REJECT, payload=reason.encode()[:2000])


class Refused(Exception):
    """The VM is not taken; the text goes to the source."""


class Discarded(Exception):
    """The source keeps the VM: what was built here is to be forgotten."""


class Incoming:
    """One VM that comes in over `channel`. run() gives its Instance, running."""

    def __init__(
        self, channel: Channel, endpoint: str, disks_folder: Path | None = None,
        listen: Callable[[], tuple[Channel, int]] | None = None,
    ) -> None:  # fmt: skip
        """`listen`: makes another channel that the source may call, on a port of it (tcp)."""
        self._channel, self._endpoint, self._listen = channel, endpoint, listen
        self._gathered: Gathered | None = None
        self._disks_folder = disks_folder if disks_folder is not None else places.disks()
        self._instance: Instance | None = None
        self._journal: Journal | None = None
        self._features: list[str] = []
        self._made: list[Path] = []
        self._door: Door | None = None
        self._source: RemotePages | None = None
        self._fresh = -1
        """RAM's memfd in the first round, in which every page is new."""
        self._unflushed = 0
        """Bytes written to disks that travel along since they were last flushed."""
        self._pages_follow = False
        """Post-copy: the channel goes on as where memory comes from."""

    def run(self) -> Instance:
        """Discarded, when nothing came of it; nothing is left then."""
        try:
            return self._run()
        except (
            Refused, StartError, StateError, SectionError, BackendError, KvmError, ChannelError, OSError, PageLost,
        ) as error:  # fmt: skip
            refuse(self._channel, str(error))
            self._forget()
            raise Discarded(str(error)) from error
        except Discarded as error:
            self._forget()
            raise Discarded("the source keeps the VM") from error
        finally:
            if not self._pages_follow:
                if self._door is not None:
                    self._door.close()
                self._channel.close()
            if self._gathered is not None:
                self._gathered.close()

    def _forget(self) -> None:
        if self._instance is not None:
            self._instance.abandon()
        for path in self._made:
            path.unlink(missing_ok=True)
        if self._journal is not None:
            self._journal.write(journals.ABORTED, 0)
            self._journal.keep()

    def _run(self) -> Instance:
        hello = self._hear_hello()
        steps.reached("destination:hello", self._channel.cut)
        instance, trial = self._build(hello)
        steps.reached("destination:built", self._channel.cut, instance.machine.vm.pid)
        self._journal = Journal(instance.config.uuid, "destination")
        with instance.machine.standing(), self._all_or_nothing(instance.machine):
            # Most of it stays so, and need not be done while the guest stands.
            machine_state.restore(instance.machine, trial)
            for transport in instance.machine.parts.transports:
                transport.prepare()
            instance.machine.interrupts.prepare()
            instance.machine.rehearse()
            if "postcopy" in self._features:
                self._door = Door(self._channel, instance.config.uuid, hello.generation)
            recover = self._door.path if self._door is not None else ""
            ports = self._gather(instance.machine, hello)
            accept = Accept(features=self._features, journal=str(self._journal.path), recover=recover, ports=ports)
            self._channel.send(messages.ACCEPT, payload=messages.encode(accept))
            state = self._take_volumes(instance.machine, hello)
            checked = machine_state.check(instance.machine, sections.decode(state), trial)
            if checked.machine.generation != hello.generation:
                raise Refused(f"generation {checked.machine.generation} where {hello.generation} was announced")
            machine_state.restore(instance.machine, checked, trial)
            self._lock_disks(instance.machine, hello)
            with self._journal.opened() as decision:  # it may fetch pages, which cannot be done while a decision is due
                instance.machine.keep_what_arrives(hello.running, decision.fileno(), journals.condition(journals.RUNNING))
            self._journal.write(journals.PREPARED, hello.generation)
            steps.reached("destination:prepared", self._channel.cut, instance.machine.vm.pid)
            with suppress(ChannelError):
                self._channel.send(messages.PREPARED)
            steps.reached("destination:prepared-sent", self._channel.cut, instance.machine.vm.pid)
            if not self._may_run(hello):
                raise Discarded
            steps.reached("destination:commit", self._channel.cut, instance.machine.vm.pid)
            if not instance.machine.vm.alive:
                raise Refused(f"the VM's kvmcore process on this host ({instance.machine.vm.pid}) has died")
            self._journal.write(journals.RUNNING, hello.generation)
            steps.reached("destination:decided", self._channel.cut, instance.machine.vm.pid)
        if self._pages_follow:  # from here on the channel is for pages only
            with suppress(ChannelError):
                self._channel.send(messages.RUNNING, hello.generation)
        job = jobs.arriving(instance.machine, "arrival", jobs.POSTCOPY)
        if self._source is not None:
            self._source.lost = partial(_lost, instance.machine, job)
        announce(instance.machine)  # frames for it come this way from now on, and wait for it
        if hello.running:
            instance.machine.resume()
        else:
            instance.machine.arrive_paused()
        steps.reached("destination:running", self._channel.cut, instance.machine.vm.pid)
        if not self._pages_follow:
            with suppress(ChannelError):
                self._channel.send(messages.RUNNING, hello.generation)
        instance.take_name(instance.config.name)
        self._journal.keep()
        if self._source is not None:
            threading.Thread(target=fill, args=(instance.machine, job), name="fill", daemon=True).start()
        else:
            job.end(jobs.COMPLETED)
        steps.reached("destination:done", self._channel.cut, instance.machine.vm.pid)
        return instance

    @contextmanager
    def _all_or_nothing(self, machine: Machine) -> Iterator[None]:
        """Whatever goes wrong inside, this machine never serves a device again: its memory may be the source's."""
        try:
            yield
        except BaseException:
            machine.disown()
            raise

    # -- what is to come ---------------------------------------------------------------------------

    def _hear_hello(self) -> Hello:
        frame = self._channel.receive(_HELLO_SECONDS)
        if frame is None or frame.kind != messages.HELLO:
            raise ChannelError(f"no announcement within {_HELLO_SECONDS:g} s")
        try:
            hello = msgspec.msgpack.decode(self._channel.read(), type=Hello)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Refused(f"its announcement cannot be read: {error}") from error
        if hello.protocol != messages.PROTOCOL:
            raise Refused(f"it speaks version {hello.protocol} of the migration protocol, this host {messages.PROTOCOL}")
        return hello

    def _build(self, hello: Hello) -> tuple[Instance, machine_state.Checked]:
        """The machine that is announced, and its trial state. Refused and what start() and check() raise."""
        state = sections.decode(hello.state)
        config = for_background(machine_state.read_config(state), hello.name).validate(files=False)
        if not config.uuid:
            raise Refused("the VM has no uuid")
        writable = {1 + index for index, drive in enumerate(config.drives) if not drive.readonly}
        writable |= {FLASH + index for index, flash in enumerate(config.flash) if not flash.readonly}
        if set(hello.disks) - writable:
            raise Refused("disks are announced that the machine does not have")
        ram_fd = self._memory(config, hello)
        if ram_fd < 0:
            available = psutil.virtual_memory().available
            if config.memory > available:
                raise Refused(f"not enough memory: the VM has {config.memory >> 20} MiB, {available >> 20} MiB are free")
        self._features = [name for name in hello.features if name in ("zstd", "delta") and zstandard is not None]
        self._features += ["memory-fd"] if ram_fd >= 0 else []
        self._features += [name for name in hello.features if name == "hot" or (name == "postcopy" and ram_fd < 0)]
        config = self._make_disks(config, hello)
        instance = Instance(config, self._endpoint, provisional=True)
        self._instance = instance
        instance.start(arriving=True, lock_disks=False, ram_fd=ram_fd)
        return instance, machine_state.check(instance.machine, state)

    def _memory(self, config: MachineConfig, hello: Hello) -> int:
        if not self._channel.fds or "memory-fd" not in hello.features:
            return -1
        fd = self._channel.fds.pop(0)
        if os.fstat(fd).st_size != config.memory:
            os.close(fd)
            raise Refused("the memory that came along has another size than the machine's")
        return fd

    def _make_disks(self, config: MachineConfig, hello: Hello) -> MachineConfig:
        drives, flash = list(config.drives), list(config.flash)
        for number, size in hello.disks.items():
            folder = self._disks_folder / config.uuid
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = os.statvfs(folder)
            if not 0 < size <= free.f_bavail * free.f_frsize:
                raise Refused(f"no room in {self._disks_folder} for a disk of {size >> 20} MiB")
            if number >= FLASH:
                path = folder / f"flash{number - FLASH}.{hello.generation}.raw"
                self._make_file(path, size)
                flash[number - FLASH] = msgspec.structs.replace(flash[number - FLASH], file=str(path), format="raw")
                continue
            drive = identity.placed(drives[number - 1], str(folder / f"disk{number - 1}.{hello.generation}"))
            if drive.format == "qcow2":
                create_qcow2(drive.file, size)
                self._made.append(Path(drive.file))
            else:
                self._make_file(Path(drive.file), size)
            drives[number - 1] = drive
        return msgspec.structs.replace(config, drives=tuple(drives), flash=tuple(flash))

    def _make_file(self, path: Path, size: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._made.append(path)
        os.ftruncate(fd, size)
        os.close(fd)

    def _gather(self, machine: Machine, hello: Hello) -> list[int]:
        """Take memory from the other channels as well, if there are any; the ports that they are called on."""
        more: list[Channel] = [StreamChannel(socket.socket(fileno=fd)) for fd in self._channel.fds]
        self._channel.fds.clear()
        ports = []
        for _ in range(min(hello.channels, MOST - 1) if self._listen is not None else 0):
            channel, port = self._listen()  # type: ignore[misc]
            more.append(channel)
            ports.append(port)
        if more:
            ram = machine.memory.regions[0][1]
            self._gathered = Gathered(more, partial(self._take_extra, ram), self._channel.cut)
        return ports

    def _take_extra(self, ram: memoryview, channel: Channel) -> bool:
        """A frame of one of them. False: it was the last one."""
        frame = channel.receive(None)
        assert frame is not None
        steps.reached("destination:extra", channel.cut)
        if frame.kind == messages.ROUND:
            channel.send(messages.ROUND, frame.a)
        elif frame.kind in _MEMORY and "memory-fd" not in self._features:
            self._take_memory(channel, frame, ram)
        elif frame.kind == messages.DONE:
            return False
        else:
            raise ChannelError(f"message {frame.kind} on a channel for memory")
        return True

    # -- memory and disks --------------------------------------------------------------------------

    def _take_volumes(self, machine: Machine, hello: Hello) -> bytes:
        """Everything up to the final state, whose bytes are returned."""
        channel = self._channel
        self._fresh = machine.ram_fd
        ram = machine.memory.regions[0][1]
        disks = {number: Disk(number, machine.parts.disks[number - 1]) for number in hello.disks if number < FLASH}
        made = list(disks.values())
        for bank in banks(machine):
            disks[bank.number] = bank
            if bank.number in hello.disks and machine.flash is not None:
                machine.flash.contents[bank.number - FLASH].through = True
                made.append(bank)
        for disk in made:
            disk.disk.lock()  # nobody else knows them yet
        first = True
        while True:
            frame = channel.receive(None)
            assert frame is not None
            if frame.kind in (messages.DATA, messages.PACKED, messages.DELTA, messages.ZEROES):
                volume, start = messages.placed(frame.a)
                if volume == 0 and "memory-fd" not in self._features:
                    self._take_memory(channel, frame, ram)
                elif volume in disks:
                    self._take_disk(frame, disks[volume], start)
                else:
                    raise ChannelError(f"data for volume {volume}")
            elif frame.kind == messages.RUNS and "memory-fd" not in self._features:
                self._take_memory(channel, frame, ram)
            elif frame.kind == messages.ROUND:
                if frame.a == 1:
                    self._fresh = -1
                    self._prepare_hot(machine)
                self._flush_copied(machine, hello)
                channel.send(messages.ROUND, frame.a)
            elif frame.kind == messages.HOT and "hot" in self._features:
                with suppress(KvmError):  # a promise of speed, no more
                    machine.vm.hot_elsewhere(channel.read())
            elif frame.kind == messages.ABSENT and "postcopy" in self._features:
                self._leave_pages(machine, ram, channel.read(), hello)
            elif frame.kind == messages.STATE:
                steps.reached("destination:state", channel.cut, machine.vm.pid)
                if self._gathered is not None:
                    self._gathered.finish(_LOCK_SECONDS)
                return channel.read()
            elif frame.kind == messages.ABORT:
                raise Discarded
            else:
                raise ChannelError(f"message {frame.kind} during the copy")
            if first and frame.kind in (messages.DATA, messages.PACKED, messages.RUNS):
                first = False
                steps.reached("destination:data", channel.cut, machine.vm.pid)

    def _prepare_hot(self, machine: Machine) -> None:
        """Memory is here, if perhaps not as it will be at the switch."""
        with suppress(KvmError):
            machine.vm.prepare_hot()

    def _leave_pages(self, machine: Machine, ram: memoryview, left: bytes, hello: Hello) -> None:
        """Post-copy: these pieces stay at the source until they are touched."""
        if len(left) * messages.PIECE != len(ram):
            raise ChannelError("a map of other memory than the machine's")
        offsets = [index * messages.PIECE for index, there in enumerate(left) if there]
        self._pages_follow = True
        assert self._door is not None
        local = hello.host == messages.boot_id()
        listen, public, peer = self._channel.called_at if isinstance(self._channel, ZmqChannel) else ("", "", "")
        where = LeftPostcopy(
            uuid=machine.config.uuid, generation=hello.generation, journal=hello.journal if local else "",
            path=self._door.path, listen=listen, public=public, peer=peer,
        )  # fmt: skip
        self._source = RemotePages(self._channel, self._door, where)
        machine.await_pages(AbsentPages(ram, self._source, offsets))

    def _take_runs(self, channel: Channel, frame: Frame, ram: memoryview) -> None:
        if not 0 < frame.a <= messages.MOST_RUNS:
            raise ChannelError(f"{frame.a} runs of memory in a frame")
        pages = len(ram) // _PAGE
        runs = messages.runs_of(channel.read_part(8 * frame.a))
        if any(first + count > pages for first, count in runs):
            raise ChannelError("memory beyond the machine's")
        if self._fresh >= 0:
            channel.read_to(self._fresh, [(first * _PAGE, count * _PAGE) for first, count in runs])
        else:
            channel.read_into(*[ram[first * _PAGE : (first + count) * _PAGE] for first, count in runs])

    def _take_memory(self, channel: Channel, frame: Frame, ram: memoryview) -> None:
        if frame.kind == messages.RUNS:
            self._take_runs(channel, frame, ram)
            return
        volume, start = messages.placed(frame.a)
        if volume:
            raise ChannelError("a disk's data where memory was due")
        if not 0 < frame.b <= _MOST_UNITS or (start + frame.b) * _PAGE > len(ram):
            raise ChannelError("memory beyond the machine's")
        view = ram[start * _PAGE : (start + frame.b) * _PAGE]
        if frame.kind == messages.DATA:
            channel.read_into(view)
        elif frame.kind == messages.PACKED:
            view[:] = self._unpack(channel, len(view))
        elif frame.kind == messages.DELTA:
            view[:] = xor(view, self._unpack(channel, len(view)))
        else:
            for at in range(0, len(view), len(_ZEROES)):
                part = view[at : at + len(_ZEROES)]
                part[:] = _ZEROES[: len(part)]

    def _take_disk(self, frame: Frame, disk: Disk, start: int) -> None:
        offset = start * disk.unit
        length = min(frame.b * disk.unit, disk.size - offset)
        if not 0 < frame.b <= _MOST_UNITS or length <= 0 or frame.kind in (messages.ZEROES, messages.DELTA):
            raise ChannelError("a block beyond the disk's end")
        data = self._unpack(self._channel, length) if frame.kind == messages.PACKED else self._channel.read()
        if len(data) != length:
            raise ChannelError("a block of the wrong length")
        view = memoryview(bytearray(data))
        if pages.is_zero(data):
            disk.disk.zero(offset, length, unmap=True)
            return
        disk.disk.write(offset, [view])
        self._unflushed += length
        if self._unflushed >= _FLUSH_EVERY:
            disk.disk.flush()
            self._unflushed = 0

    def _flush_copied(self, machine: Machine, hello: Hello) -> None:
        """Disks that travel along; not others' files, which we have not written to. After each round: at the switch nothing is
        left to write but what the last one has brought."""
        for number in hello.disks:
            if number < FLASH:
                machine.parts.disks[number - 1].flush()
        self._unflushed = 0

    def _unpack(self, channel: Channel, length: int) -> bytes:
        if "zstd" not in self._features:
            raise ChannelError("compressed data was not agreed upon")
        try:
            with zstandard.ZstdDecompressor().stream_reader(channel.read()) as reader:
                data = reader.read(length + 1)
        except zstandard.ZstdError as error:
            raise ChannelError(f"compressed data is damaged: {error}") from error
        if len(data) != length:
            raise ChannelError("compressed data of the wrong length")
        return data

    # -- the hand-over proper ----------------------------------------------------------------------

    def _lock_disks(self, machine: Machine, hello: Hello) -> None:
        """The source has let go of them. Refused when somebody else has one."""
        self._flush_copied(machine, hello)
        end = time.monotonic() + _LOCK_SECONDS
        for image in machine.parts.images:
            while True:
                try:
                    image.lock()
                    break
                except BackendError as error:
                    if time.monotonic() > end:
                        raise Refused(str(error)) from error
                    time.sleep(0.005)

    def _may_run(self, hello: Hello) -> bool:
        """The source's decision; when the source is dead, the last word of its journal."""
        try:
            while True:
                frame = self._channel.receive(None)
                assert frame is not None
                if frame.kind == messages.COMMIT and frame.a == hello.generation:
                    return True
                if frame.kind == messages.ABORT:
                    return False
                raise ChannelError(f"message {frame.kind} instead of a decision")
        except ChannelError:
            return self._ask(hello)

    def _ask(self, hello: Hello) -> bool:
        assert self._journal is not None
        local = hello.host == messages.boot_id()
        told = self._journal.path.with_suffix(".verdict")
        assert self._instance is not None
        if not local:
            self._instance.machine.warn(
                "in doubt: its source on another host cannot be reached any more. It waits. Only if the source is "
                f"certainly dead, `softkvm host settle {self._instance.config.uuid} run`; else `... forget`"
            )
        while True:
            if told.exists():
                return told.read_text().strip() == journals.COMMITTED
            if local:
                word = journals.ask_source(hello.journal, hello.generation, not self._pages_follow)
                if word == journals.GRANTED:
                    threading.Thread(target=self._end_what_waits, args=(hello,), name="end-left", daemon=True).start()
                if word in (journals.COMMITTED, journals.GRANTED):
                    return True
                if word == journals.ABORTED:
                    return False
            time.sleep(_ASK_SECONDS)

    def _end_what_waits(self, hello: Hello) -> None:
        """The VM is ours, its source's device process being dead: if what was the source waits for another one here, as it was
        made to, it ends. Elsewhere `attach` finds out, and ends it."""
        assert self._instance is not None
        uuid, end = self._instance.config.uuid, time.monotonic() + _ENDED_SECONDS
        while time.monotonic() < end and not _has_ended(hello.name, uuid, hello.generation):
            time.sleep(_ASK_SECONDS)


def _has_ended(name: str, uuid: str, generation: int) -> bool:
    """Whether no VM of that name waits that is an earlier `generation` of ours. If one does, it ends."""
    entry = find(name)
    if entry is None:
        return True
    if not entry.waits:
        return False  # perhaps its process has not quite ended
    try:
        left = Predecessor(reach(entry.directory / ATTACH_FILE))
        left.settle(end=left.config().uuid == uuid and left.machine.generation < generation)
    except (KvmError, StateError, OSError, ValueError):
        return False
    return True
