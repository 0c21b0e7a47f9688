"""A VM that outlives its device process: device state in shared memory that kvmcore's session holds, and how a successor
takes it up.

Keeper writes: each device's State after every access and whatever else changes it, in one record with the exits that
have been dealt with; requests in flight (devices/virtio/flight.py); what the guest has asked of the power button. All of
it counts from one store on, so a kill -9 between two instructions leaves the one or the other. Predecessor reads. Made by
machine.py for machines whose configuration says `keep`.

An exit counts as dealt with when its number, the doorbell's sequence number of the RUN, stands in a record with its
effect: the successor deals with those that do not, and answers are in kvm_run already for those that do.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from protocol.abi import run_page
from protocol.channel.shared_memory import create_memfd
from qemu_user.devices.absent import AbsentPages, PageSource
from qemu_user.devices.device import Device, State, StateError, decode_state, encode_state
from qemu_user.devices.virtio.device import VirtioDevice
from qemu_user.devices.virtio.flight import Flight
from qemu_user.devices.virtio.queue import Queue
from qemu_user.devices.virtio.transport import VirtioTransport
from qemu_user.machine.records import RecordError, Records

if TYPE_CHECKING:
    from protocol.client import Vm
    from qemu_user.config.machine_config import MachineConfig
    from qemu_user.machine.machine import Machine

RECORDS_KEY, REGISTRATION_KEY, RAM_KEY, FLASH_KEY, AWAITED_KEY, BITMAP_KEY, DISK_KEY, SOURCE_KEY = 0, 1, 2, 3, 5, 6, 16, 64
"""What of ours the session holds (Vm.keep); banks of the flash, images and what pages come from count up from theirs."""
_CAPACITY = 1 << 20
_SHARE_CAPACITY = 64 << 20
"""A shared folder's state has every open file."""


class DeviceRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A device: its state, exits on it that were dealt with (CPU -> number of the RUN), and the answer that it was about
    to publish (queue, head, length, used index)."""

    state: bytes
    exits: dict[int, int]
    answer: tuple[int, int, int, int] | None = None


class MachineRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """`power`: (what, status) that the guest has asked for and that is not carried out."""

    status: str
    generation: int
    power: list[tuple[str, int]]
    exits: dict[int, int]


class Handles(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Numbers of the session's handles; -1 for what there is not."""

    vcpus: list[int]
    aia: int
    memory: int
    config: bytes
    created: float


class Awaited(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Memory that has yet to come."""

    piece: int
    """Bytes that come when a page is touched."""
    source: bytes
    """Where it comes from (PageSource.left())."""


def _stateful(virtio: VirtioDevice) -> bool:
    return type(virtio).changes_state is not VirtioDevice.changes_state


class Keeper:
    """Of a machine that stands, or has not run yet. `exits`: those that a predecessor has dealt with. Any thread."""

    def __init__(self, machine: Machine, predecessor: Predecessor | None = None) -> None:
        """StateError when the predecessor's records do not fit the machine."""
        self._machine = machine
        self._lock = threading.Lock()
        self._power: list[tuple[str, int]] = []
        self._exits: dict[int, int] = {}
        devices = machine.parts.devices
        self._device_exits: dict[str, dict[int, int]] = {device.name: {} for device in devices}
        self._pages = [memoryview(vcpu.run_page).cast("B") for vcpu in machine.vcpus]
        self._seen: dict[int, Any] = {}
        self._on = True
        self._left = 0
        """Descriptors that are left of where memory comes from."""
        if predecessor is not None:
            self._left = predecessor.sources
            self._records = predecessor.records
            for disk in machine.parts.disks:
                disk.outlives = True
            self._exits = dict(predecessor.machine.exits)
            self._power = list(predecessor.machine.power)
            for name, exits in predecessor.device_exits.items():
                self._device_exits[name] = dict(exits)
        else:
            self._records = self._make(machine)
        for device in devices:
            device.changed = partial(self.changed, device)
            transport = getattr(device, "transport", None)
            if isinstance(transport, VirtioTransport):
                self._watch(device, transport, predecessor is None)
            self.changed(device)
        if predecessor is None:
            self.machine_changed()

    def _make(self, machine: Machine) -> Records:
        handles = Handles(
            vcpus=[vcpu.number for vcpu in machine.vcpus],
            aia=machine.interrupts.handle,
            memory=machine.memory_handle,
            config=msgspec.msgpack.encode(machine.config),
            created=machine.created,
        )
        static = msgspec.msgpack.encode(handles)
        capacity = {"handles": len(static) + 64, "machine": _CAPACITY}
        areas = {}
        for device in machine.parts.devices:
            capacity[device.name] = _SHARE_CAPACITY if device.name.startswith("share-") else _CAPACITY
            transport = getattr(device, "transport", None)
            for queue in transport.virtio.queues if isinstance(transport, VirtioTransport) else ():
                areas[f"{device.name}/{queue.index}"] = Flight.size(queue.max_size)
        records = Records.make(capacity, areas)
        records.write("handles", static)
        machine.vm.keep(RECORDS_KEY, records.fd)
        if machine.memory_handle < 0:
            machine.vm.keep(RAM_KEY, machine.ram_fd)
        for number, fd in enumerate(machine.flash.fds if machine.flash is not None else ()):
            machine.vm.keep(FLASH_KEY + number, fd)
        for disk in machine.parts.disks:
            disk.outlives = True
        for key, fd in enumerate((fd for image in machine.parts.images for fd in image.locks()), DISK_KEY):
            machine.vm.keep(key, fd)
        if machine.memory.absent is not None:
            self._leave_source(machine.memory.absent)
        return records

    def _leave_source(self, absent: AbsentPages) -> None:
        """Memory has yet to come: what a successor needs to fetch it. The description counts, and comes last."""
        vm = self._machine.vm
        source, fds = absent.source.left()
        vm.keep(BITMAP_KEY, absent.fd)
        for key, fd in enumerate(fds, SOURCE_KEY):
            vm.keep(key, fd)
        data = msgspec.msgpack.encode(Awaited(piece=absent.piece, source=source))
        fd = create_memfd("awaited-memory", len(data))
        try:
            os.pwrite(fd, data, 0)
            vm.keep(AWAITED_KEY, fd)
        finally:
            os.close(fd)
        self._left = len(fds)

    def memory_came(self) -> None:
        """All of it is here."""
        for key in (AWAITED_KEY, BITMAP_KEY, *range(SOURCE_KEY, SOURCE_KEY + self._left)):
            self._machine.vm.keep(key, -1)
        self._left = 0

    def _watch(self, device: Device, transport: VirtioTransport, fresh: bool) -> None:
        transport.worked = partial(self._worked, device, transport)
        with transport.lock:
            for queue in transport.virtio.queues:
                if fresh:
                    queue.note_in(Flight(self._records.area(f"{device.name}/{queue.index}")))
                if _stateful(transport.virtio):
                    queue.before_push = partial(self._answering, device, transport)

    # -- what happens ------------------------------------------------------------------------------

    def changed(self, device: Device) -> None:
        """A device's state is another one."""
        with device.lock:
            self._write(device)

    def _write(self, device: Device, answer: tuple[int, int, int, int] | None = None) -> None:
        if self._on:
            state = encode_state(device.save())
            record = DeviceRecord(state, self._device_exits[device.name], answer)
            self._put(device.name, msgspec.msgpack.encode(record))

    def _put(self, name: str, data: bytes) -> None:
        try:
            self._records.write(name, data)
        except RecordError as error:
            self._machine.warn(f"will not outlive its device process any more: {error}")
            self.stop()

    def _answering(self, device: Device, transport: VirtioTransport, queue: Queue, head: int, written: int) -> None:
        if transport.virtio.changes_state(queue.index):
            self._write(device, (queue.index, head, written, queue.save().next_used))

    def _worked(self, device: Device, transport: VirtioTransport) -> None:
        """Queues were served: indices are in the flights, the rest is looked at."""
        virtio = transport.virtio
        now = (transport.status, transport.generation, virtio.save() if _stateful(virtio) else None)
        if self._seen.get(id(device)) != now:
            self._seen[id(device)] = now
            self._write(device)

    def exit_done(self, cpu: int, device: Device | None) -> None:
        """The exit of a CPU is dealt with, its answer is in kvm_run; `device` is what it went to."""
        number = run_page.U32.unpack_from(self._pages[cpu], run_page.DOORBELL_REQUEST)[0]
        if device is not None and device.name in self._device_exits:
            with device.lock:
                self._device_exits[device.name][cpu] = number
                self._write(device)
        else:
            with self._lock:
                self._exits[cpu] = number
                self._write_machine()

    def was_done(self, cpu: int) -> bool:
        """Whether the CPU's latest exit is."""
        number = run_page.U32.unpack_from(self._pages[cpu], run_page.DOORBELL_REQUEST)[0]
        return any(exits.get(cpu) == number for exits in (self._exits, *self._device_exits.values()))

    def machine_changed(self) -> None:
        """The machine's run state is another one."""
        with self._lock:
            self._write_machine()

    def _write_machine(self) -> None:
        if self._on:
            machine = self._machine
            record = MachineRecord(machine.status_to_keep, machine.generation, self._power, self._exits)
            self._put("machine", msgspec.msgpack.encode(record))

    def power_asked(self, what: str, status: int) -> None:
        """The guest wants to be reset or off."""
        with self._lock:
            self._power.append((what, status))
            self._write_machine()

    def power_done(self) -> None:
        """The first of these has been carried out."""
        with self._lock:
            if self._power:
                self._power.pop(0)
            self._write_machine()

    @property
    def power(self) -> list[tuple[str, int]]:
        """What is to be carried out."""
        return list(self._power)

    def stop(self) -> None:
        """The VM ends with this process again."""
        self._on = False
        self._machine.vm.outlive(False)


# -- the successor -----------------------------------------------------------------------------------


def introduce(machine: Machine, path: Path, lock: int) -> None:
    """Leave what a successor needs: how the VM is reached, in a file of its directory, and the directory's lock with kvmcore,
    so that the name stays taken."""
    vm: Vm = machine.vm
    vm.keep(REGISTRATION_KEY, lock)
    how = {
        "door": vm.door, "session": vm.link.session.hex(), "incarnation": vm.link.incarnation, "vm": vm.number, "pid": vm.pid,
    }  # fmt: skip
    fd = os.open(path.with_suffix(".partial"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump(how, file)
    path.with_suffix(".partial").rename(path)


def reach(path: Path) -> Vm:
    """The VM whose device process has died; we are its client from here on. `path`: what introduce() has written. KvmError:
    EBUSY while the VM has its device process; OSError: it is not made to be attached to."""
    from protocol.client import Kvm

    how = json.loads(path.read_text())
    session = bytes.fromhex(how["session"])
    return Kvm.attach_vm(how["door"], session, how["incarnation"], how["vm"], how["pid"])


class Predecessor:
    """What a device process that died has left of its VM."""

    def __init__(self, vm: Vm, source_of: Callable[[bytes, list[int]], PageSource] | None = None) -> None:
        """`vm`: of reach(). `source_of` makes a PageSource of what was left of one, descriptors and all; None: nobody goes on.
        StateError, KvmError; the VM waits as before then."""
        self.vm = vm
        try:
            fd = self.vm.kept(RECORDS_KEY)
            if fd < 0:
                raise StateError("it has left no device state")
            self.records = Records(fd, os.fstat(fd).st_size)
            self.handles = msgspec.msgpack.decode(self.records.read("handles"), type=Handles)
            self.machine = msgspec.msgpack.decode(self.records.read("machine"), type=MachineRecord)
            self.registration = self.vm.kept(REGISTRATION_KEY)
            self.ram = self.vm.kept(RAM_KEY)
        except (msgspec.MsgspecError, RecordError) as error:
            self.leave()
            raise StateError(f"what it has left cannot be read: {error}") from error
        except BaseException:
            self.leave()
            raise
        self.device_exits: dict[str, dict[int, int]] = {}
        self._source_of = source_of
        self.sources = 0
        """Descriptors of where memory comes from."""

    def absent(self, view: memoryview) -> AbsentPages | None:
        """What has yet to come of the memory `view`; None: nothing. StateError: it cannot be had any more."""
        fd = self.vm.kept(AWAITED_KEY)
        if fd < 0:
            return None
        assert self._source_of is not None
        fds: list[int] = []
        try:
            awaited = msgspec.msgpack.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=Awaited)
            while (source := self.vm.kept(SOURCE_KEY + len(fds))) >= 0:
                fds.append(source)
            self.sources = len(fds)
            return AbsentPages(view, self._source_of(awaited.source, fds), None, awaited.piece, self.vm.kept(BITMAP_KEY))
        except (msgspec.MsgspecError, ValueError, OSError) as error:
            raise StateError(f"the memory that has yet to come cannot be had: {error}") from error
        finally:
            os.close(fd)

    def config(self) -> MachineConfig:
        """The machine's."""
        from qemu_user.config.machine_config import MachineConfig

        return msgspec.msgpack.decode(self.handles.config, type=MachineConfig)

    def locks(self) -> Callable[[], int]:
        """Gives the descriptors that hold images' locks, in the order in which they were left."""
        numbers = iter(range(DISK_KEY, DISK_KEY + 48))
        return lambda: self.vm.kept(next(numbers))

    def bank(self, number: int) -> int:
        """The memfd of a bank of the flash. StateError."""
        fd = self.vm.kept(FLASH_KEY + number)
        if fd < 0:
            raise StateError(f"it has left no content of the flash (bank {number})")
        return fd

    def restore(self, machine: Machine) -> None:
        """Give each device the state that it had, and its queues what was in flight. StateError."""
        records: dict[str, DeviceRecord] = {}
        for device in machine.parts.devices:
            try:
                record = records[device.name] = msgspec.msgpack.decode(self.records.read(device.name), type=DeviceRecord)
            except (msgspec.MsgspecError, RecordError) as error:
                raise StateError(f"{device.name}: {error}") from error
            self.device_exits[device.name] = record.exits
            state: State = decode_state(device.State, record.state)
            device.restore(state)
            transport = getattr(device, "transport", None)
            if isinstance(transport, VirtioTransport):
                with transport.lock:
                    for queue in transport.virtio.queues:
                        due = record.answer[1:] if record.answer and record.answer[0] == queue.index else None
                        queue.recover(Flight(self.records.area(f"{device.name}/{queue.index}")), due)

    def settle(self, end: bool) -> None:
        """Nobody goes on with it: the VM ends, or waits as before."""
        if end:
            self.vm.close()
        else:
            self.vm.leave()
        for fd in (self.registration, self.ram):  # the name is taken as long as one is open
            if fd >= 0:
                os.close(fd)

    def leave(self) -> None:
        """It could not be taken up: the VM goes on waiting."""
        self.vm.leave()
