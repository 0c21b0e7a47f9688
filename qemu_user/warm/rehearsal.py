"""A small VM made, kept, restored, run and ended, by the parent of warm processes before it forks: CPython adapts code where it
lies when it has run some times, and a child that is the first to run it gets a copy of each page of it.

It is a VM of the daemon's as any other but for its directory, which is not where VMs are listed. Nothing is left behind:
neither a thread nor a descriptor.
"""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import msgspec

from protocol.channel import process_memory
from protocol.client import link
from qemu_user.config.background import for_background
from qemu_user.config.machine_config import MIN_MEMORY, Balloon, Chardev, Drive, MachineConfig, Net
from qemu_user.machine import virt
from qemu_user.machine.cpu import set_boot_state
from qemu_user.management.instance import Instance
from qemu_user.management.qmp_client import QmpClient
from qemu_user.management.registry import Registration, made_runtime_directory
from qemu_user.migration import arrival, snapshot
from qemu_user.migration.job import Job

WARM = 10
"""How often code runs until CPython has adapted it."""
_NAME, _TAG = "rehearsal", "kept"
_DISK = 1 << 20
_GUEST = (0x10500073).to_bytes(4, "little") + (0xFFDFF06F).to_bytes(4, "little")
"""wfi; j .-4"""


def rehearse(endpoint: str, times: int = WARM) -> None:
    """So often, at the daemon there; nobody else does it in this runtime directory (the parent's lock). StartError, KvmError,
    JobError, QmpError, OSError: it cannot be done."""
    folder = made_runtime_directory() / _NAME
    shutil.rmtree(folder, ignore_errors=True)  # of one that was killed meanwhile
    folder.mkdir(mode=0o700)
    try:
        _keep(_config(folder), endpoint, folder)
        for number in range(times):
            if number == times - 1:
                process_memory.forget_lookups()
            _restore(endpoint, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        gc.unfreeze()  # machines freeze what there is when they start
        gc.collect()
        link.end_context()


def _config(folder: Path) -> MachineConfig:
    disk = folder / "disk"
    disk.write_bytes(bytes(_DISK))
    config = MachineConfig(
        name=_NAME,
        memory=MIN_MEMORY,
        drives=(Drive(file=str(disk), format="raw"),),
        nets=(Net(kind="none"),),
        chardevs=(Chardev(id="console", kind="hub", stdio=True),),
        balloon=Balloon(),
        vmgenid=True,
    )
    return for_background(config, _NAME).validate(files=False)


def _keep(config: MachineConfig, endpoint: str, folder: Path) -> None:
    """A snapshot of a guest that waits for ever."""
    instance = Instance(config, endpoint, registration=_registration(folder))
    try:
        instance.start(arriving=True)
        instance.machine.memory.write(virt.RAM_BASE, _GUEST)
        set_boot_state(instance.machine.vcpus, virt.RAM_BASE, 0)
        snapshot.save(instance.machine, folder, _TAG, Job("snapshot"))
    finally:
        instance.abandon()
        _give_back(instance)


def _restore(endpoint: str, folder: Path) -> None:
    """As arrival.main() does with such an order."""
    told = arrival.Restore(endpoint=endpoint, snapshot=str(folder / _TAG), names=(_NAME,), fill=False)
    order = msgspec.json.decode(msgspec.json.encode(told), type=arrival.Restore)
    instance = arrival.restored(order, _NAME, arrival.read(order), registration=_registration(folder))
    try:
        with QmpClient(f"{instance.directory}/control.sock") as client:
            client.execute("query-status")
    finally:
        instance.quit()
        instance.wait()
        _give_back(instance)


def _give_back(instance: Instance) -> None:
    """What a process that ends need not."""
    machine = instance.machine
    if machine.memory.absent is not None:
        machine.memory.absent.close()
        os.close(machine.memory.absent.fd)
    if machine.ram_fd >= 0:
        os.close(machine.ram_fd)


def _registration(folder: Path) -> Registration:
    directory = folder / "vm"
    directory.mkdir(mode=0o700)
    return Registration.adopted(directory, os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
