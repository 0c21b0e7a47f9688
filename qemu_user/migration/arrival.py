"""The process of a VM that comes from elsewhere: out of a snapshot, or from another host. `python -m
qemu_user.migration.arrival` reads its order as JSON from standard input, says on a descriptor how it went, and is the
VM from then on. Started by spawn.py, detached from any terminal.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import zmq

from protocol.abi.errors import KvmError
from protocol.channel import fd_passing, process_memory, zmq_socket
from protocol.channel.shared_memory import PAGE
from protocol.channel.zmq_socket import Curve
from protocol.client import Vm
from qemu_user.backends.block.opening import format_by_name, is_nbd, open_disk
from qemu_user.backends.errors import BackendError
from qemu_user.cli.daemon import DaemonError, ensure
from qemu_user.cli.vm import VerbError, execute
from qemu_user.config.background import for_background
from qemu_user.config.machine_config import Flash, MachineConfig
from qemu_user.confinement import confine
from qemu_user.devices.absent import AbsentPages, PageLost
from qemu_user.devices.device import State, StateError
from qemu_user.machine.drives import open_drive
from qemu_user.machine.keeper import REGISTRATION_KEY
from qemu_user.machine.machine import Machine, StartError
from qemu_user.machine.made import make_vm
from qemu_user.management.instance import Instance
from qemu_user.management.registry import Registration, find
from qemu_user.migration import identity, journal, machine_state, page_service
from qemu_user.migration import job as jobs
from qemu_user.migration.channel import Channel, StreamChannel, ZmqChannel
from qemu_user.migration.destination import Discarded, Incoming, RemotePages, fill_behind, refuse
from qemu_user.migration.host import authenticated
from qemu_user.migration.left_memory import LeftSnapshot, SnapshotMemory, decoded, snapshot_memory
from qemu_user.migration.page_service import PageService
from qemu_user.migration.snapshot import Snapshot, SnapshotError
from qemu_user.migration.source import LINGER_SECONDS
from qemu_user.migration.written import Written

_GONE_SECONDS = 30.0
_FILL_AFTER = 0.05
"""Seconds that a VM has to itself at first."""
_FILL_PAUSE = 0.0005
"""Seconds between two clusters that nobody has asked for yet."""


class Restore(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Start from a snapshot."""

    endpoint: str
    """kvmcore's."""
    snapshot: str
    """Folder of the snapshot."""
    names: tuple[str, ...]
    """What the VM is called from now on; several: as many VMs, a process each."""
    paused: bool = False
    replace: bool = False
    """A VM that has this name is ended, when the snapshot is known to be whole."""
    new: bool = False
    """These are other VMs than the one that was saved: with a uuid, addresses and disks of their own."""
    fill: bool = True
    """Bring all memory in the background, not only what is touched."""


class Attach(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Take the place of a VM's device process that has died."""

    directory: str
    """The VM's, in the registry."""
    gone: bool = False
    """Only if the VM has gone, and needs memory that is here."""


class TakeIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Take a VM in that another process hands over: over a connected Unix socket, or whoever has the public
    key `peer` calls us on the tcp address `listen`."""

    endpoint: str
    """kvmcore's; "": this user's daemon, started if none runs."""
    disks: str = ""
    called: bool = False
    """The socket came with the order."""
    listen: str = ""
    public: str = ""
    secret: str = ""
    peer: str = ""


def load(machine: Machine, snapshot: Snapshot, whole: bool) -> None:
    """Memory and state of a snapshot into a machine that was started `arriving`. Memory comes as it is touched: what will be
    needed as a `whole` in clusters, else page by page, so that it takes no more than it must. SnapshotError, StateError.
    """
    checked = machine_state.check(machine, snapshot.sections)
    for number, bank in enumerate(machine.flash.banks if machine.flash is not None else ()):
        snapshot.read(f"flash{number}", bank.content)
    memory = SnapshotMemory(snapshot.opened("memory"))
    machine.await_pages(AbsentPages(machine.memory.regions[0][1], memory, memory.offsets(), 0 if whole else PAGE))
    with machine.standing():
        machine_state.restore(machine, checked)


def _fill(machine: Machine) -> None:
    """All memory that has not been touched yet, once whoever waits for the VM has seen it run."""
    time.sleep(_FILL_AFTER)
    try:
        machine.complete_memory(threading.Event(), _FILL_PAUSE)
    except PageLost as error:
        machine.fail(str(error))
    except KvmError:
        if machine.vm.alive:  # else it has ended meanwhile
            raise


def read(order: Restore) -> Snapshot:
    """What it is to start from. StartError."""
    try:
        return Snapshot(Path(order.snapshot))
    except SnapshotError as error:
        raise StartError(str(error)) from error


def restored(
    order: Restore, name: str, snapshot: Snapshot | None = None, began: float = 0.0, registration: Registration | None = None
) -> Instance:
    """The VM, running (or paused, as ordered). StartError, with nothing left behind but restored disks. `snapshot`: what
    read() gave. The job of the VM counts from `began` to the moment at which its vCPUs may run, without the time in which
    nothing could be done but wait for the end of the VM that is replaced. `registration`: Instance's."""
    began = began or time.monotonic()
    snapshot = read(order) if snapshot is None else snapshot
    config = for_background(snapshot.config, name)
    if order.new:
        config = identity.renewed(config)
    made = None
    if order.replace and _told_to_end(name):
        try:
            made = make_vm(config, order.endpoint)  # kvmcore's half can be made meanwhile
            began += _wait_until_ended(name)
        except (KvmError, OSError) as error:
            raise StartError(f"kvmcore at {order.endpoint}: {error}") from error
        except StartError:
            if made is not None:
                made.close()
            raise
    try:
        written = _put_disks_back(config, snapshot)
    except (SnapshotError, BackendError, OSError) as error:
        if made is not None:
            made.close()
        raise StartError(str(error)) from error
    instance = Instance(config, order.endpoint, registration=registration)
    instance.start(arriving=True, made=made)
    job = jobs.arriving(instance.machine, "restore", jobs.SETUP)
    job.started = began
    try:
        load(instance.machine, snapshot, order.fill)
        identity.tell_generation(instance.machine)
        if order.new:
            identity.tell(instance.machine)
        written.wait()
    except (SnapshotError, StateError, PageLost, OSError) as error:
        instance.abandon()
        raise StartError(f"the snapshot in {order.snapshot} cannot be used: {error}") from error
    if order.paused:
        instance.machine.arrive_paused()
    else:
        instance.machine.resume()
    job.end(jobs.COMPLETED)
    job.ended = instance.machine.let_run or job.ended
    if order.fill:
        threading.Thread(target=_fill, args=(instance.machine,), name="fill", daemon=True).start()
    return instance


def _put_disks_back(config: MachineConfig, snapshot: Snapshot) -> Written:
    """Disks and banks of the flash are what was saved, and on their way to the disk. SnapshotError, BackendError, OSError."""
    written = Written()
    for index, drive in enumerate(config.drives):
        if not drive.readonly:
            if drive.layout or is_nbd(drive.file):
                with closing(open_drive(msgspec.structs.replace(drive, limits={}))) as disk:
                    snapshot.write_over(f"disk{index}", disk)
            else:
                Path(drive.file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                snapshot.write_disk(f"disk{index}", drive.file)
                written.add(drive.file)
    for index, bank in enumerate(config.flash):
        if not bank.readonly:
            _write_bank(snapshot, f"flash{index}", bank, written)
    written.start()
    return written


def _write_bank(snapshot: Snapshot, name: str, bank: Flash, written: Written) -> None:
    """Make a bank's file what was saved. SnapshotError, BackendError, OSError."""
    if format_by_name(bank.file, bank.format) == "raw":
        Path(bank.file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        snapshot.write_disk(name, bank.file)
        written.add(bank.file)
    else:
        with closing(open_disk(bank.file, bank.format)) as image:
            snapshot.write_over(name, image)


def attached(order: Attach) -> Instance:
    """The VM whose device process has died, and what has yet to come of its memory on its way. StartError."""
    coming: list[SnapshotMemory | RemotePages] = []

    def source_of(data: bytes, fds: list[int]) -> SnapshotMemory | RemotePages:
        left = decoded(data)
        coming.append(snapshot_memory(left, fds) if isinstance(left, LeftSnapshot) else RemotePages.of(left, fds))
        return coming[0]

    directory = Path(order.directory)
    vm = Instance.reached(directory)
    if (owed := _owed_by(directory, vm)) is not None:
        return owed
    if order.gone:
        vm.leave()
        raise StartError(f"VM {directory.name}: waits here; softkvm attach {directory.name} gives it another process")
    instance = Instance.attached(directory, vm, source_of, _is_ours)
    machine = instance.machine
    if coming and isinstance(coming[0], RemotePages):
        fill_behind(machine, coming[0])
    elif machine.memory.absent is not None and machine.memory.absent.comes_whole:
        threading.Thread(target=_fill, args=(machine,), name="fill", daemon=True).start()
    return instance


def _owed_by(directory: Path, vm: Vm) -> Instance | None:
    """What is left of a VM that has gone by post-copy, serving the rest of its memory until all of it has gone. StartError."""
    try:
        left = page_service.left(vm)
        if left is None:
            return None
        caller = left.owed.caller()
    except ValueError as error:
        vm.leave()
        raise StartError(f"VM {directory.name}: {error}") from error
    owed = left.owed
    config = MachineConfig(name=owed.name, uuid=owed.uuid, memory=owed.memory, cpus=owed.cpus)
    instance = Instance.remaining(directory, vm, vm.kept(REGISTRATION_KEY), config, left.memory)
    machine = instance.machine
    job = machine.job = jobs.Job("migration")

    def serve() -> None:
        PageService(machine, job, caller, None).serve()
        job.end(jobs.COMPLETED)
        os.close(left.journal)
        time.sleep(LINGER_SECONDS)
        machine.quit()

    threading.Thread(target=serve, name="pages", daemon=True).start()
    return instance


def _is_ours(uuid: str, generation: int) -> bool:
    end = time.monotonic() + _GONE_SECONDS
    while True:
        try:
            return journal.claim(uuid, generation)
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise StartError("the other host is about to decide who runs it; try again") from error
            time.sleep(0.02)


def several(order: Restore) -> str:
    """Fork a process for each name: imports are done and shared. The name that this one is; "" in the parent."""
    process_memory.settle()
    for name in order.names:
        if os.fork() == 0:
            os.setsid()
            fd_passing.make_room()
            return name
    return ""


def taken_in(order: TakeIn, fds: list[int], tell: int) -> Instance:
    """The VM that came, running. Discarded."""
    channel: Channel
    more: Callable[[], tuple[Channel, int]] | None = None
    if order.called:
        channel = StreamChannel(socket.socket(fileno=fds.pop()))
    else:
        context, authenticator = authenticated([order.peer.encode()])
        key = Curve(order.public.encode(), order.secret.encode())
        router = zmq_socket.router(context, order.listen, key)
        channel = ZmqChannel(router, is_router=True)
        channel.held = authenticator
        channel.called_at = (zmq_socket.bound_to(router), order.public, order.peer)
        _say(tell, {"port": _port(router)})

        def listen() -> tuple[Channel, int]:
            other = zmq_socket.router(context, order.listen, key)
            return ZmqChannel(other, is_router=True), _port(other)

        more = listen
    try:
        endpoint = order.endpoint or ensure()
    except DaemonError as error:
        refuse(channel, str(error))
        raise Discarded(str(error)) from error
    return Incoming(channel, endpoint, Path(order.disks) if order.disks else None, more).run()


def _port(router: zmq.Socket[bytes]) -> int:
    return int(zmq_socket.bound_to(router).rpartition(":")[2])


@cache
def preload() -> None:
    """What every VM needs and makes only then: imports, and what msgspec knows of types from their first use on. Done while
    nobody waits, and before clones are forked: each of them would have 2 MB of its own for it."""
    for module in ("protocol.client", *(f"qemu_user.devices.virtio.{name}" for name in ("blk", "console", "net", "rng"))):
        importlib.import_module(module)
    msgspec.json.Decoder(Restore | TakeIn | Attach)
    for kind in (MachineConfig, *State.__subclasses__()):
        msgspec.msgpack.Decoder(kind)


def _hear_order() -> tuple[bytes, list[int]]:
    """The order on stdin, a socket, to its end, and the descriptors that come with it."""
    data, fds = b"", []
    with socket.socket(fileno=os.dup(0)) as stdin:
        while True:
            part, came, _, _ = socket.recv_fds(stdin, 65536, 4)
            fds += came
            if not part:
                return data, fds
            data += part


def main(arguments: list[str]) -> int:
    """The order on stdin; the arguments are `--tell FD`."""
    tell = int(arguments[arguments.index("--tell") + 1])
    try:
        fd_passing.make_room()
        preload()
        data, fds = _hear_order()
        began = time.monotonic()
        if not data:
            return 0
        order = msgspec.json.decode(data, type=Restore | TakeIn | Attach)
        if isinstance(order, Restore):
            snapshot = read(order)  # before the fork: clones share it
            name = order.names[0] if len(order.names) == 1 else several(order)
            if not name:
                return 0
            instance = restored(order, name, snapshot, began)
            _say(tell, {"name": name, "pid": os.getpid()})
        elif isinstance(order, Attach):
            instance = attached(order)
            _say(tell, {"name": instance.config.name, "pid": os.getpid(), "status": instance.machine.status})
        else:
            instance = taken_in(order, fds, tell)
    except (StartError, msgspec.MsgspecError) as error:
        _say(tell, {"error": str(error)})
        return 1
    except Discarded as error:
        sys.stderr.write(f"softkvm: a VM that came in was not taken: {error}\n")
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: instance.quit(128 + received))
    if lack := confine(instance.config):
        sys.stderr.write(f"softkvm: {lack}\n")
    return instance.wait()


def _told_to_end(name: str) -> bool:
    """Tell the VM of that name to end; False if there is none. StartError if it does not listen."""
    if find(name) is None:
        return False
    try:
        execute(name, "quit")
    except VerbError as error:
        if find(name) is not None:
            raise StartError(str(error)) from error
    return True


def _wait_until_ended(name: str) -> float:
    """Until it is gone; the seconds that it took. StartError if it does not go."""
    began = time.monotonic()
    while find(name) is not None:
        if time.monotonic() > began + _GONE_SECONDS:
            raise StartError(f"VM {name}: does not end; softkvm kill {name} forces it")
        time.sleep(0.002)
    return time.monotonic() - began


def _say(fd: int, what: dict[str, Any]) -> None:
    try:
        os.write(fd, json.dumps(what).encode() + b"\n")
        os.close(fd)
    except OSError:
        pass  # whoever started us has gone; the VM stays


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
