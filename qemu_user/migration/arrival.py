"""The process of a VM that comes from elsewhere: out of a snapshot, or from another host. `python -m
qemu_user.migration.arrival` reads its order as JSON from standard input, says on a descriptor how it went, and is the
VM from then on. Started by spawn.py, detached from any terminal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from qemu_user.config.machine_config import Chardev, MachineConfig
from qemu_user.devices.device import StateError
from qemu_user.machine.machine import Machine, StartError
from qemu_user.management.instance import Instance
from qemu_user.migration import machine_state
from qemu_user.migration.snapshot import Snapshot, SnapshotError


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the process is to become."""

    endpoint: str
    """kvmcore's."""
    snapshot: str
    """Folder of the snapshot to start from."""
    name: str
    """What the VM is called from now on."""
    new: bool = False
    """It is another VM than the one that was saved: its own uuid and addresses, and disks of its own in `disks`."""
    disks: str = ""
    paused: bool = False


def for_background(config: MachineConfig, name: str) -> MachineConfig:
    """The same machine without our terminal and descriptors: consoles are attached to with `softkvm console`."""
    chardevs = []
    for chardev in config.chardevs:
        if chardev.kind in ("stdio", "hub"):
            chardevs.append(Chardev(id=chardev.id, kind="hub"))
        elif chardev.kind == "fd":
            chardevs.append(Chardev(id=chardev.id, kind="null"))
        else:
            chardevs.append(chardev)
    return msgspec.structs.replace(config, name=name, chardevs=tuple(chardevs), qmp=())


def load(machine: Machine, snapshot: Snapshot) -> None:
    """Memory and state of a snapshot into a machine that was started `arriving`. SnapshotError, StateError."""
    checked = machine_state.check(machine, snapshot.sections)
    snapshot.read("memory", machine.memory.regions[0][1])
    with machine.standing():
        machine_state.restore(machine, checked)


def start(order: Order) -> Instance:
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


def main() -> int:
    """The order on stdin, `--tell FD` on the command line."""
    tell = int(sys.argv[sys.argv.index("--tell") + 1])
    instance: Instance | None = None
    try:
        order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
        instance = start(order)
    except (StartError, msgspec.MsgspecError) as error:
        _say(tell, {"error": str(error)})
        return 1
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, frame: instance.quit(128 + received))
    _say(tell, {"name": order.name, "pid": os.getpid()})
    return instance.wait()


def _say(fd: int, what: dict[str, Any]) -> None:
    try:
        os.write(fd, json.dumps(what).encode() + b"\n")
    except BrokenPipeError:
        pass  # whoever started us has gone; the VM stays
    os.close(fd)


if __name__ == "__main__":
    sys.exit(main())
