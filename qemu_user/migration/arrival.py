"""The process of a VM that comes from elsewhere: out of a snapshot, or from another host. `python -m
qemu_user.migration.arrival` reads its order as JSON from standard input, says on a descriptor how it went, and is the
VM from then on. Started by spawn.py, detached from any terminal.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from protocol.channel import zmq_socket
from protocol.channel.zmq_socket import Curve
from qemu_user.cli.daemon import DaemonError, ensure
from qemu_user.devices.device import StateError
from qemu_user.machine.machine import Machine, StartError
from qemu_user.management.instance import Instance
from qemu_user.migration import machine_state
from qemu_user.migration.background import for_background
from qemu_user.migration.channel import Channel, StreamChannel, ZmqChannel
from qemu_user.migration.destination import Discarded, Incoming
from qemu_user.migration.host import authenticated
from qemu_user.migration.snapshot import Snapshot, SnapshotError


class Restore(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Start from a snapshot."""

    endpoint: str
    """kvmcore's."""
    snapshot: str
    """Folder of the snapshot."""
    name: str
    """What the VM is called from now on."""
    paused: bool = False


class TakeIn(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag=True):
    """Take a VM in that another process hands over: over `channel`, a connected Unix socket, or whoever has the public
    key `peer` calls us on the tcp address `listen`."""

    endpoint: str
    """kvmcore's; "": this user's daemon, started if none runs."""
    disks: str = ""
    channel: int = -1
    listen: str = ""
    public: str = ""
    secret: str = ""
    peer: str = ""


def load(machine: Machine, snapshot: Snapshot) -> None:
    """Memory and state of a snapshot into a machine that was started `arriving`. SnapshotError, StateError."""
    checked = machine_state.check(machine, snapshot.sections)
    snapshot.read("memory", machine.memory.regions[0][1])
    with machine.standing():
        machine_state.restore(machine, checked)


def restored(order: Restore) -> Instance:
    """The VM, running (or paused, as ordered). StartError, with nothing left behind but restored disks."""
    try:
        snapshot = Snapshot(Path(order.snapshot))
        config = for_background(snapshot.config, order.name)
        writable = [(f"disk{index}", drive) for index, drive in enumerate(config.drives) if not drive.readonly]
        for name, drive in writable:
            snapshot.write_disk(name, drive.file)
    except (SnapshotError, OSError) as error:
        raise StartError(str(error)) from error
    instance = Instance(config, order.endpoint)
    instance.start(arriving=True)
    try:
        load(instance.machine, snapshot)
    except (SnapshotError, StateError, OSError) as error:
        instance.machine.close()
        raise StartError(f"the snapshot in {order.snapshot} cannot be used: {error}") from error
    if not order.paused:
        instance.machine.resume()
    return instance


def taken_in(order: TakeIn, tell: int) -> Instance:
    """The VM that came, running. Discarded."""
    channel: Channel
    if order.channel >= 0:
        channel = StreamChannel(socket.socket(fileno=order.channel))
    else:
        context, _ = authenticated([order.peer.encode()])
        key = Curve(order.public.encode(), order.secret.encode())
        router = zmq_socket.router(context, order.listen, key)
        channel = ZmqChannel(router, is_router=True)
        _say(tell, {"port": int(zmq_socket.bound_to(router).rpartition(":")[2])})
    try:
        endpoint = order.endpoint or ensure()
    except DaemonError as error:
        raise Discarded(str(error)) from error
    return Incoming(channel, endpoint, Path(order.disks) if order.disks else None).run()


def main() -> int:
    """The order on stdin, `--tell FD` on the command line."""
    tell = int(sys.argv[sys.argv.index("--tell") + 1])
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=Restore | TakeIn)
        if isinstance(order, Restore):
            instance = restored(order)
            _say(tell, {"name": order.name, "pid": os.getpid()})
        else:
            instance = taken_in(order, tell)
    except (StartError, msgspec.MsgspecError) as error:
        _say(tell, {"error": str(error)})
        return 1
    except Discarded as error:
        sys.stderr.write(f"softkvm: a VM that came in was not taken: {error}\n")
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: instance.quit(128 + received))
    return instance.wait()


def _say(fd: int, what: dict[str, Any]) -> None:
    try:
        os.write(fd, json.dumps(what).encode() + b"\n")
        os.close(fd)
    except OSError:
        pass  # whoever started us has gone; the VM stays


if __name__ == "__main__":
    sys.exit(main())
