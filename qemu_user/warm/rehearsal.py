"""A machine's devices made, saved, restored and thrown away, by the parent of warm processes before it forks: CPython adapts
code where it lies when it has run some times, and a child that is the first to run it gets a copy of each page of it.

There is no kvmcore here, nor a thread: what speaks to it is not rehearsed. Nothing is left behind.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, cast

import msgspec

from protocol.channel import process_memory
from protocol.channel.shared_memory import create_memfd
from qemu_user.backends.io_threads import IoThreads
from qemu_user.config.background import for_background
from qemu_user.config.machine_config import Balloon, Chardev, Drive, MachineConfig, Net
from qemu_user.devices.device import decode_state, encode_state
from qemu_user.devices.memory import GuestMemory
from qemu_user.machine import virt
from qemu_user.machine.build import Parts
from qemu_user.machine.irq import PlicInterrupts
from qemu_user.machine.kicks import Kicks
from qemu_user.migration import sections
from qemu_user.migration.sections import Section

WARM = 10
"""How often code runs until CPython has adapted it."""
_SIZE = 1 << 20


def rehearse(times: int = WARM) -> None:
    """So often."""
    disk = create_memfd("rehearsal", _SIZE)
    try:
        config = MachineConfig(
            name="rehearsal",
            drives=(Drive(file=f"/proc/self/fd/{disk}", format="raw"),),
            nets=(Net(kind="none"),),
            chardevs=(Chardev(id="console", kind="hub", stdio=True),),
            balloon=Balloon(),
            vmgenid=True,
        )
        for number in range(times):
            if number == times - 1:
                process_memory.forget_lookups()
            data = msgspec.msgpack.encode(for_background(config, config.name))
            _rehearse(msgspec.msgpack.decode(data, type=MachineConfig).validate(files=False))
    finally:
        os.close(disk)


def _rehearse(config: MachineConfig) -> None:
    threads = IoThreads(_failed)
    parts = Parts(config, threads, "")
    ram = mmap.mmap(-1, _SIZE)
    memory = GuestMemory([(virt.RAM_BASE, memoryview(ram))])
    try:
        parts.open_backends(lock_disks=False)
        kicks = Kicks(cast(Any, None))  # nobody asks it for anything while no device is in use
        parts.build(PlicInterrupts([]), memory, lambda what, status: None, kicks, [])
        states = [(device, encode_state(device.save())) for device in parts.devices]
        container = sections.encode(Section(device.name, 1, state) for device, state in states)
        for device, section in zip(parts.devices, sections.decode(container).values(), strict=True):
            device.restore(decode_state(type(device).State, section.payload))
        kicks.close()
    finally:
        parts.close()
        threads.close()
        memory.release()
        ram.close()


def _failed(error: BaseException) -> None:
    raise error
