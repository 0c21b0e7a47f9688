"""What an exit handler is given: its vCPU's run page, and the parts of the machine that exits reach.

Filled by machine/machine.py. Handlers are made once per vCPU (`make(context)`) and called without arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from qemu_user.devices.device import Counters, Device
from qemu_user.devices.memory import GuestMemory


class Bus(Protocol):
    """Where MMIO goes; machine/bus.py."""

    def read(self, gpa: int, size: int) -> int: ...

    def write(self, gpa: int, size: int, value: int) -> None: ...

    def device(self, gpa: int, size: int) -> Device | None: ...


class DebugConsole(Protocol):
    """Where SBI's debug console goes; machine/debug_console.py."""

    def write(self, data: bytes | memoryview) -> int: ...

    def read(self, count: int) -> bytes: ...


class ExitContext(NamedTuple):
    """One vCPU's surroundings."""

    cpu: int
    page: memoryview
    bus: Bus
    memory: GuestMemory
    console: DebugConsole
    power: Callable[[str, int], None]
    """("shutdown" | "reset", exit status)."""
    fail: Callable[[str], None]
    """The VM cannot go on; the sentence says why."""
    counters: Counters
    done: Callable[[int, Device | None], None] | None = None
    """An exit of this CPU is dealt with, and what device it went to: for VMs that outlive this process."""


Handlers = Mapping[int, Callable[[], None]]
"""exit reason -> handler."""
